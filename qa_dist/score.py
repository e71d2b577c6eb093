"""`python -m qa_dist.score`: score a predictions file as the official SQuAD scripts do.

    python -m qa_dist.score --references dev-v1.1.json --predictions predictions.json

Prints the official keys as JSON; `answer_normalization` stands before them where other rules than SQuAD's were asked
for. Exit code 0, or 2 with one sentence on standard error.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qa_dist.common import command
from qa_dist.common.errors import ScoringError
from qa_dist.evaluation.normalization import NORMALIZATIONS, Normalization, normalization, unfit_note
from qa_dist.evaluation.scoring import Scores, score_v1, score_v2, unknown_predictions

if TYPE_CHECKING:
    from qa_dist.evaluation.score_files import References

PROG = "qa_dist.score"


def build_parser() -> argparse.ArgumentParser:
    """The flags of this entry point."""
    parser = command.Parser(
        prog=PROG,
        description="Score predictions as the official SQuAD v1.1 or v2.0 script does; the references decide which. "
        "All files may be gzipped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--references",
        required=True,
        metavar="FILE",
        type=_path,
        help="questions with answers, in any layout that training reads",
    )
    parser.add_argument(
        "--predictions",
        required=True,
        metavar="FILE",
        type=_path,
        help="JSON object from question ids to predicted texts, or rows with id and prediction_text as JSON, JSONL, "
        "CSV, TSV or Parquet",
    )
    parser.add_argument(
        "--null_odds",
        metavar="FILE",
        type=_path,
        help="v2.0 only: JSON object from question ids to how likely there is no answer; adds the best thresholds",
    )
    parser.add_argument(
        "--na_prob_thresh",
        type=_limit,
        metavar="X",
        help="v2.0 only: take a question as unanswered where its null odds exceed X (default: 1.0, as officially)",
    )
    parser.add_argument(
        "--answer_normalization",
        default="squad",
        metavar="NAME",
        help="whose official script says which answers are the same and what F1 counts (default: squad): "
        + ", ".join(NORMALIZATIONS),
    )
    parser.add_argument("--allow_missing", action="store_true", help="score questions without a prediction 0")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command.run_command(PROG, lambda: _print_scores(argv))


def _print_scores(argv: Sequence[str] | None) -> int:
    scores = _scores(build_parser().parse_args(argv))
    sys.stdout.write(json.dumps(scores, indent=2) + "\n")
    return 0


def _scores(options: argparse.Namespace) -> dict[str, Any]:
    # Imported here, so that --help and mistakes in the options do not wait for it.
    from qa_dist.evaluation.score_files import load_predictions, load_references

    rules = normalization(options.answer_normalization)
    references = load_references(options.references)
    predictions, notes = load_predictions(options.predictions)
    for note in (*references.notes, *notes):
        _notice(note)
    known: dict[str, object] = {**references.answers, **dict.fromkeys(references.unlabelled)}
    _notice(unknown_predictions(known, predictions))
    _notice(unfit_note(references.answers.values(), rules))
    named = {} if rules.name == "squad" else {"answer_normalization": rules.name}
    return {**named, **_official(options, references, predictions, rules)}


def _official(
    options: argparse.Namespace, references: "References", predictions: dict[str, str], rules: Normalization
) -> Scores:
    if not references.version_2:
        for flag in ("null_odds", "na_prob_thresh"):
            if getattr(options, flag) is not None:
                raise ScoringError(f"--{flag} is for SQuAD v2.0, but {options.references} is v1.1; leave it out.")
        return score_v1(references.answers, predictions, allow_missing=options.allow_missing, rules=rules)
    if options.null_odds is None:
        if options.na_prob_thresh is not None:
            raise ScoringError("--na_prob_thresh is a limit on null odds, but there are none; give --null_odds too.")
        return score_v2(references.answers, predictions, allow_missing=options.allow_missing, rules=rules)
    from qa_dist.evaluation.score_files import load_null_odds

    null_odds = load_null_odds(options.null_odds)
    _notice(unknown_predictions(references.answers, null_odds, what="null odds"))
    return score_v2(
        references.answers,
        predictions,
        null_odds=null_odds,
        na_prob_thresh=1.0 if options.na_prob_thresh is None else options.na_prob_thresh,
        allow_missing=options.allow_missing,
        rules=rules,
    )


def _notice(line: str | None) -> None:
    if line is not None:
        sys.stderr.write(f"{PROG}: note: {line}\n")


def _path(text: str) -> str:
    """A path whose `~` stands for a home folder."""
    return os.path.expanduser(text)


def _limit(text: str) -> float:
    """The number that `--na_prob_thresh` gives."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


if __name__ == "__main__":
    sys.exit(main())
