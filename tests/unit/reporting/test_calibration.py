"""The null threshold of results in files."""

from qa_dist.evaluation.normalization import SQUAD
from qa_dist.reporting.calibration import best_null_threshold


def test_the_null_threshold_is_the_official_one() -> None:
    entries = {
        "a": [{"text": ""}, {"text": "cat"}],
        "b": [{"text": "dog"}, {"text": ""}],
        "c": [{"text": "cow"}, {"text": ""}],
        "d": [{"text": ""}],
    }
    references = {"a": ["cat"], "b": [], "c": ["cow"], "d": []}
    odds = {"a": 0.5, "b": 1.5, "c": -2.0, "d": 9.0}
    # Letting in c and a, and not b, is right everywhere.
    assert best_null_threshold(references, entries, odds, SQUAD) == {"best_f1": 100, "best_f1_thresh": 0.5}
    # Nothing but silence is right anywhere, which a threshold of 0 is not: it would let c in.
    wrong = {"a": ["bee"], "b": [], "c": ["bee"], "d": []}
    assert best_null_threshold(wrong, entries, odds, SQUAD) == {"best_f1": 50, "best_f1_thresh": None}
