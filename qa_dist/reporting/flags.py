"""Flags that the commands about scores have in common."""

import argparse

from qa_dist.common.command import whole_number
from qa_dist.evaluation.normalization import NORMALIZATIONS
from qa_dist.reporting.analysis import FEWEST_RESAMPLES


def add_score_flags(parser: argparse.ArgumentParser, *, of_seed: str) -> None:
    """Which answers are the same, and how intervals are drawn; `of_seed` says what the seed is of."""
    parser.add_argument(
        "--answer_normalization",
        metavar="NAME",
        help="whose official script says which answers are the same and what F1 counts (default: that of the runs, "
        "else squad): " + ", ".join(NORMALIZATIONS),
    )
    parser.add_argument(
        "--resamples",
        # More leave no time.
        type=whole_number(FEWEST_RESAMPLES, 1_000_000),
        default=2000,
        metavar="N",
        help="resamples of each interval and p-value (default: 2000; the smallest p-value is 1 / (N + 1), of the "
        "bootstrap 2 / (N + 1))",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**63 - 1),
        default=0,
        metavar="N",
        help=f"of {of_seed} (default: 0)",
    )
