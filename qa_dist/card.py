"""Write the model card of a run, with the hub's metadata: `qa-dist card RUN [--references FILE]`.

The card says what was measured: scores, with --references also their intervals and those of slices; the data, what it
allows at best, and how the model was trained and is loaded. docs/publishing.md says more.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qa_dist.common import command
from qa_dist.common.errors import ConfigError, DataError, ScoringError
from qa_dist.reporting.hub_ids import hub_id

if TYPE_CHECKING:
    from qa_dist.reporting.run_record import RunRecord

PROG = "qa_dist.card"

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,40}")


def build_parser() -> argparse.ArgumentParser:
    """The flags of this entry point."""
    parser = command.Parser(
        prog=PROG,
        description="Writes README.md into the folder of a run: the hub's metadata, how to load the model, its data, "
        "its scores and its training. Nothing in it says where on this machine files are.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        type=os.path.expanduser,
        help="--output_dir of a run that has ended, or the folder of a merged model",
    )
    parser.add_argument(
        "--references",
        metavar="FILE",
        type=os.path.expanduser,
        help="the questions that the run was evaluated on, for intervals and scores by slice",
    )
    parser.add_argument(
        "--merged_dir",
        metavar="DIR",
        type=os.path.expanduser,
        help="folder that qa-dist merge made of the run: the card is for the merged model, and goes there",
    )
    parser.add_argument("--repo_id", type=hub_id, metavar="ID", help="where the model will be on the hub, as me/model")
    parser.add_argument(
        "--base_model", type=hub_id, metavar="ID", help="hub id of the base model, if the run had it from a folder"
    )
    parser.add_argument("--license", type=_license, metavar="NAME", help="the model's licence, as apache-2.0")
    parser.add_argument(
        "--language", type=_language, nargs="+", default=(), metavar="CODE", help="languages of the data, as en de"
    )
    parser.add_argument(
        "--output", metavar="FILE", type=os.path.expanduser, help="write the card there (default: README.md in RUN)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a card that was written or edited by hand")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command.run_command(PROG, lambda: _card(build_parser().parse_args(argv)))


def _card(options: argparse.Namespace) -> int:
    # Imported here, so that --help and mistakes in the options do not wait for it.
    from qa_dist.reporting.card import FILE, CardOptions, card, write_card
    from qa_dist.reporting.run_record import read_run

    run = read_run(options.run)
    folder = options.merged_dir or options.run
    if options.merged_dir is not None:
        if not run.is_adapter:
            raise ConfigError([f"--merged_dir: {options.run} holds a whole model; leave the option out"])
        if read_run(options.merged_dir).is_adapter:
            raise ConfigError([f"--merged_dir {options.merged_dir} holds an adapter; name what qa-dist merge wrote"])
    analysis = _analysis(run, options.references) if options.references else None
    text = card(
        run,
        CardOptions(
            repo_id=options.repo_id,
            folder_name=Path(folder).resolve().name,
            base_model=options.base_model,
            license=options.license,
            languages=tuple(options.language),
            is_merged=options.merged_dir is not None,
        ),
        analysis,
    )
    path = Path(options.output or Path(folder) / FILE)
    write_card(text, path, overwrite=options.overwrite)
    sys.stdout.write(f"{path}\n")
    return 0


def _analysis(run: "RunRecord", references: str) -> dict[str, Any]:
    """Scores of the run's predictions with intervals and slices, as `qa-dist analyze` gives them.

    Raises:
        UserError: The references cannot be used, or are of other questions.
    """
    from qa_dist.reporting.analysis import analyze, rules_for
    from qa_dist.reporting.questions import evaluated_questions, read_questions
    from qa_dist.reporting.systems import read_systems

    systems = read_systems([str(run.folder)])
    questions, notes = evaluated_questions(read_questions(references), systems)
    sys.stderr.writelines(f"{PROG}: note: {note}\n" for note in notes)
    try:
        return analyze(systems, questions, rules_for(systems, None))
    except ScoringError as error:
        raise DataError(
            f"the predictions in {run.folder} leave out questions of {references}; give the --references that the run "
            "was evaluated on"
        ) from error


def _license(text: str) -> str:
    return _of(_LICENSE, text, "the hub's name of a licence, such as apache-2.0 or other")


def _language(text: str) -> str:
    return _of(_LANGUAGE, text, "the code of a language, such as en or pt-BR")


def _of(pattern: re.Pattern[str], text: str, what: str) -> str:
    if not pattern.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return text


if __name__ == "__main__":
    sys.exit(main())
