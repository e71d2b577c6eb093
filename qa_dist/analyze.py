"""How sure scores and their differences are, and where answers go wrong: `qa-dist analyze RUN --references FILE`.

Takes output folders of runs and predictions files, several of which are compared. Prints tables, or one JSON object.
docs/analysis.md says how each number is found.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from qa_dist.common import command
from qa_dist.evaluation.normalization import unfit_note
from qa_dist.reporting.flags import add_score_flags

PROG = "qa_dist.analyze"


def build_parser() -> argparse.ArgumentParser:
    """The flags of this entry point."""
    parser = command.Parser(
        prog=PROG,
        description="Scores with 95 % intervals, by slice and by kind of mistake; differences of two and more systems "
        "with intervals and p-values; mean and deviation over seeds.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "systems",
        nargs="+",
        metavar="PREDICTIONS|RUN",
        type=os.path.expanduser,
        help="output folders of runs, and predictions files as `qa-dist score` takes them",
    )
    parser.add_argument(
        "--references",
        required=True,
        metavar="FILE",
        type=os.path.expanduser,
        help="questions with contexts and answers, in any layout that training reads",
    )
    parser.add_argument("--allow_missing", action="store_true", help="score questions without a prediction 0")
    add_score_flags(parser, of_seed="the resamples")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command.run_command(PROG, lambda: _analyze(build_parser().parse_args(argv)))


def _analyze(options: argparse.Namespace) -> int:
    # Imported here, so that --help and mistakes in the options do not wait for it.
    from qa_dist.reporting.analysis import Resampling, analyze, rules_for
    from qa_dist.reporting.questions import evaluated_questions, read_questions
    from qa_dist.reporting.systems import read_systems
    from qa_dist.reporting.tables import lines

    systems = read_systems(options.systems)
    rules = rules_for(systems, options.answer_normalization)
    questions = read_questions(options.references)
    systems = [
        replace(system, notes=(*system.notes, note)) if (note := questions.unknown_in(system.texts)) else system
        for system in systems
    ]
    notes = list(questions.references.notes)
    if not options.allow_missing:
        questions, left_out = evaluated_questions(questions, systems)
        notes += left_out
    if unfit := unfit_note(questions.references.answers.values(), rules):
        notes.append(unfit)
    for note in notes:
        sys.stderr.write(f"{PROG}: note: {note}\n")
    found = analyze(
        systems,
        questions,
        rules,
        allow_missing=options.allow_missing,
        resampling=Resampling(options.resamples, options.seed),
    )
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
