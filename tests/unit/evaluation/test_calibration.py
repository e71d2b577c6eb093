"""Calibration against hand-computed cases, a grid search, and data whose temperature is known."""

import numpy as np
import pytest

from qa_dist.common.arrays import Float64
from qa_dist.evaluation.calibration import (
    Choices,
    calibration_error,
    fitted_temperature,
    kept_temperature,
    reliability,
)


def simulated(num_questions: int, temperature: float, seed: int) -> Choices:
    """The best of five candidates is the answer, and each is right as often as its scores at a temperature say."""
    random = np.random.default_rng(seed)
    score_EW = np.sort(random.normal(0, 3, (num_questions, 5)))[:, ::-1].copy()
    score_EW[::4, 3:] = -np.inf
    weights = np.exp(score_EW / temperature)
    likely_E = weights[:, 0] / weights.sum(axis=1)
    return Choices(score_EW, np.zeros(num_questions, np.int64), random.random(num_questions) < likely_E)


@pytest.fixture(scope="module")
def overconfident() -> Choices:
    return simulated(20_000, 2.5, 0)


def log_likelihood(choices: Choices, temperature: float) -> float:
    confidence = choices.confidence(temperature)
    return float(np.log(np.where(choices.right_E, confidence, 1 - confidence)).mean())


def test_confidence_is_a_softmax() -> None:
    choices = Choices.of([[np.log(6), np.log(3), 0.0], [1000.0]], [1, 0], [True, False])
    assert choices.confidence() == pytest.approx([0.3, 1])
    assert choices.confidence(1e9) == pytest.approx([1 / 3, 1])
    assert choices.only(np.array([False, True])).confidence().tolist() == [1]


def test_the_temperature_of_simulated_data_is_found(overconfident: Choices) -> None:
    found = fitted_temperature(overconfident)
    assert found == pytest.approx(2.5, rel=0.05)
    grid = np.linspace(2.3, 2.7, 51)
    assert found == pytest.approx(grid[np.argmax([log_likelihood(overconfident, each) for each in grid])], abs=0.006)
    # Scores that were divided by it need none.
    scaled = overconfident._replace(score_EW=overconfident.score_EW / found)
    assert fitted_temperature(scaled) == pytest.approx(1, abs=1e-4)


def test_the_error_falls_to_what_chance_leaves(overconfident: Choices) -> None:
    temperature = fitted_temperature(overconfident)
    for adaptive in (False, True):
        before, after = (
            calibration_error(reliability(overconfident.confidence(each), overconfident.right_E, adaptive=adaptive))
            for each in (1.0, temperature)
        )
        assert before > 8
        assert after < 1.5


@pytest.mark.parametrize(("right", "bound"), [(True, 0.01), (False, 100)])
def test_where_all_are_right_or_wrong_the_temperature_stays_in_its_bounds(right: bool, bound: float) -> None:
    choices = Choices.of([[2.0, 1.0], [3.0, 0.0]], [0, 0], [right, right])
    found = fitted_temperature(choices)
    assert 0.01 <= found <= 100
    assert (found - 1) * (bound - 1) > 0
    assert log_likelihood(choices, found) > log_likelihood(choices, 1)


def test_lists_of_one_entry_say_nothing_of_the_temperature() -> None:
    assert fitted_temperature(Choices.of([[2.0], [1.0]], [0, 0], [True, False])) == 1
    some = simulated(500, 2.0, 1)
    lone = Choices.of([[1.0]] * 9, [0] * 9, [False] * 9)
    padded = np.full((9, 5), -np.inf)
    padded[:, :1] = lone.score_EW
    both = Choices(
        np.concatenate([some.score_EW, padded]),
        np.concatenate([some.chosen_E, lone.chosen_E]),
        np.concatenate([some.right_E, lone.right_E]),
    )
    assert fitted_temperature(both) == pytest.approx(fitted_temperature(some))


def of_two(*groups: tuple[int, float, float]) -> Choices:
    """Lists of two entries: groups of so many answers with a confidence, of which a share is right."""
    lists, right = [], []
    for count, confidence, share in groups:
        lists += [[np.log(confidence / (1 - confidence)), 0.0]] * count
        right += [at < round(share * count) for at in range(count)]
    return Choices.of(lists, [0] * len(lists), right)


def test_a_temperature_that_raises_the_error_is_not_kept() -> None:
    # Likelihood is about the few answers that are too sure; the others are not sure enough, and become less so.
    both = of_two((320, 0.62, 0.66), (80, 0.99, 0.9))
    fitted = fitted_temperature(both)
    assert log_likelihood(both, fitted) > log_likelihood(both, 1)
    kept, not_kept = kept_temperature(both)
    assert kept == 1
    assert not_kept is not None
    assert not_kept["temperature"] == fitted
    assert not_kept["before"] == pytest.approx(0.8 * (100 * 211 / 320 - 62) + 0.2 * 9)
    assert not_kept["after"] == calibration_error(reliability(both.confidence(fitted), both.right_E))
    assert not_kept["after"] > not_kept["before"] + 2
    assert "is_at_end" not in not_kept


@pytest.mark.parametrize(("right", "end"), [(True, 0.01), (False, 100)])
def test_a_temperature_at_an_end_of_those_that_are_tried_is_not_kept(right: bool, end: float) -> None:
    # As of an untrained model, whose answers are nearly all wrong: a likelier one would be beyond.
    choices = Choices.of([[2.0, 1.0], [3.0, 0.0]] * 50, [0, 0] * 50, [right, right] * 50)
    kept, not_kept = kept_temperature(choices)
    assert kept == 1
    assert not_kept is not None
    assert not_kept["temperature"] == pytest.approx(end, rel=1e-4)
    assert not_kept["is_at_end"]
    assert not_kept["after"] < not_kept["before"]


def test_a_temperature_that_lowers_the_error_is_kept(overconfident: Choices) -> None:
    assert kept_temperature(overconfident) == (fitted_temperature(overconfident), None)
    assert kept_temperature(Choices.of([[2.0], [1.0]], [0, 0], [True, False])) == (1, None)


def test_calibration_errors_by_hand() -> None:
    confidence: Float64 = np.array([0.95] * 4 + [0.3] * 6)
    right = np.array([True] * 3 + [False] + [True] * 3 + [False] * 3)
    bins = reliability(confidence, right)
    assert [(each.num_questions, each.exact_match) for each in bins] == [(6, 50), (4, 75)]
    assert calibration_error(bins) == pytest.approx(0.4 * 20 + 0.6 * 20)
    # Fifteen bins of ten answers: each for itself.
    assert calibration_error(reliability(confidence, right, adaptive=True)) == pytest.approx(
        (3 * 5 + 95 + 3 * 70 + 3 * 30) / 10
    )


def test_bins_have_their_upper_end() -> None:
    ends = np.arange(1, 16) / 15
    bins = reliability(np.concatenate([[0.0], ends - 1e-9, ends[-1:]]), np.ones(17, bool))
    assert [each.num_questions for each in bins] == [2, *[1] * 13, 2]
