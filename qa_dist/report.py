"""One page about runs, to read, keep and send: `qa-dist report RUN [RUN ...] --output report.html`.

The page holds what was run, curves, scores with intervals, slices, calibration, and answers in their contexts. It loads
nothing from anywhere. Runs that still go on, or were killed, are shown as far as they came. docs/report.md explains it.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from qa_dist.common import command
from qa_dist.reporting.flags import add_score_flags

PROG = "qa_dist.report"


def build_parser() -> argparse.ArgumentParser:
    """The flags of this entry point."""
    parser = command.Parser(
        prog=PROG,
        description="One HTML page about runs: what was run, curves, scores with 95 % intervals, slices, calibration, "
        "and answers in their contexts. It loads nothing from anywhere, and needs no script.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        type=os.path.expanduser,
        help="output folders of runs, also of one that still goes on or was killed; several are compared",
    )
    parser.add_argument(
        "--output",
        default="report.html",
        metavar="FILE",
        type=os.path.expanduser,
        help="the page, which appears whole and replaces one of that name (default: report.html)",
    )
    parser.add_argument(
        "--references",
        metavar="FILE",
        type=os.path.expanduser,
        help="the questions that were answered, in any layout that training reads (default: the validation data that "
        "the config.yaml of a run names)",
    )
    add_score_flags(parser, of_seed="the resamples, and of the questions that are shown by chance")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command.run_command(PROG, lambda: _report(build_parser().parse_args(argv)))


def _report(options: argparse.Namespace) -> int:
    # Imported here, so that --help and mistakes in the options do not wait for it.
    from qa_dist.reporting.report_file import write_report

    written = write_report(
        options.runs,
        options.output,
        references=options.references,
        answer_normalization=options.answer_normalization,
        resamples=options.resamples,
        seed=options.seed,
    )
    for note in written.notes:
        sys.stderr.write(f"{PROG}: note: {note}\n")
    sys.stdout.write(f"{written.path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
