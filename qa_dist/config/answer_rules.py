"""The sets of rules that say when two answers are the same, by name."""

from typing import Literal

AnswerNormalization = Literal[
    "squad",
    "xquad",
    "mlqa:ar",
    "mlqa:de",
    "mlqa:en",
    "mlqa:es",
    "mlqa:hi",
    "mlqa:vi",
    "mlqa:zh",
    "korquad",
    "cmrc",
    "none",
]
"""Whose rules say what counts as the same answer; `evaluation.normalization` has them."""
