"""Intervals and p-values against hand-computed cases, scipy, and the truth of simulated data."""

import numpy as np
import pytest
from scipy import stats

from qa_dist.reporting.intervals import Groups, differences, intervals, randomization_p, resampled

ONE_OF_TWO = Groups(np.array([[1.0], [0.0]]), np.array([1, 1]))


def grouped(num_groups: int, seed: int) -> Groups:
    """Groups whose sums are nearly all different."""
    random = np.random.default_rng(seed)
    sizes_G = random.integers(1, 6, num_groups)
    return Groups(sizes_G[:, None] * random.random((num_groups, 2)), sizes_G)


def test_questions_of_a_context_are_summed_up() -> None:
    groups = Groups.of(np.array([[1, 0.5], [0, 0.25], [1, 1]]), np.array([7, 2, 7]))
    assert groups.sums_GK.tolist() == [[0, 0.25], [2, 1.5]]
    assert groups.sizes_G.tolist() == [1, 2]
    for interval, value in zip(intervals(groups, 200, 0), (200 / 3, 175 / 3), strict=True):
        assert interval.value == pytest.approx(value, abs=1e-12)


def test_two_groups_are_drawn_as_often_as_they_should() -> None:
    # Of the four draws of two, one has the first twice, one the second twice, and two have both.
    values, counts = np.unique(resampled(ONE_OF_TWO, 4000, 0), return_counts=True)
    assert values.tolist() == [0, 0.5, 1]
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    (interval,) = intervals(ONE_OF_TWO, 4000, 0)
    assert (interval.value, interval.low, interval.high) == (50, 0, 100)


def test_the_size_of_a_resample_varies_with_the_groups_drawn() -> None:
    # One right of one, none of three: 1/1 twice, 1/4 of both, 0/3 twice.
    means = resampled(Groups(np.array([[1.0], [0.0]]), np.array([1, 3])), 500, 0)
    assert sorted(set(means[:, 0].tolist())) == [0, 0.25, 1]


@pytest.mark.parametrize("num_copies", [1, 20], ids=["one by one", "counts of equal groups"])
def test_percentiles_are_those_of_scipy(num_copies: int) -> None:
    once = grouped(30, 1)
    groups = Groups(np.repeat(once.sums_GK, num_copies, axis=0), np.repeat(once.sizes_G, num_copies))
    found = intervals(groups, 20_000, 0)
    for column, interval in zip(groups.sums_GK.T, found, strict=True):
        expected = stats.bootstrap(
            (column, groups.sizes_G),
            lambda sums, sizes, axis: 100 * sums.sum(axis) / sizes.sum(axis),
            paired=True,
            method="percentile",
            n_resamples=20_000,
            batch=1000,
            rng=np.random.default_rng(1),
        )
        error = 0.1 * float(expected.standard_error)
        assert interval.value == pytest.approx(100 * column.sum() / groups.sizes_G.sum(), abs=1e-9)
        assert interval.low == pytest.approx(expected.confidence_interval.low, abs=error)
        assert interval.high == pytest.approx(expected.confidence_interval.high, abs=error)


def test_resamples_are_the_same_however_many_are_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    once = grouped(30, 1)
    for groups in (once, Groups(np.repeat(once.sums_GK, 20, axis=0), np.repeat(once.sizes_G, 20))):
        expected = resampled(groups, 500, 0)
        with monkeypatch.context() as patch:
            patch.setattr("qa_dist.reporting.intervals._DRAWN_AT_ONCE", 700)
            assert resampled(groups, 500, 0) == pytest.approx(expected, rel=1e-14)


def test_the_order_of_groups_and_questions_does_not_matter() -> None:
    groups = grouped(50, 2)
    order = np.random.default_rng(0).permutation(50)
    shuffled = Groups(groups.sums_GK[order], groups.sizes_G[order])
    assert (resampled(groups, 300, 5) == resampled(shuffled, 300, 5)).all()
    assert (resampled(groups, 300, 5) != resampled(groups, 300, 6)).any()


def test_a_single_context_has_no_interval() -> None:
    (interval,) = intervals(Groups(np.array([[3.0]]), np.array([4])), 200, 0)
    assert (interval.value, interval.low, interval.high) == (75, None, None)
    (found,) = differences(np.array([[1.0], [1.0]]), np.array([[0.0], [1.0]]), np.array([0, 0]), 200, 0)
    assert (found.interval.value, found.interval.low, found.p_bootstrap) == (50, None, None)
    assert found.p_randomization == 1


# ------------------------------------------------------------------------------------------------------------ p-values


def test_few_groups_have_exact_p_values() -> None:
    # Of the eight ways to choose three signs, those with all alike are as far from 0; groups without a difference are
    # no matter. 1, 1, -1: six of eight sums are +-1, and two are +-3.
    rows = np.array([[1.0, 1.0], [2.0, 1.0], [0.0, 0.0], [0.5, -1.0]])
    assert randomization_p(rows, 100, 0) == [0.25, 1.0]
    assert randomization_p(np.zeros((4, 1)), 100, 0) == [1.0]


def test_p_values_are_those_of_scipy() -> None:
    rows = np.random.default_rng(3).normal(0.3, 1, (10, 2)).round(2)
    for column, chance in zip(rows.T, randomization_p(rows, 2000, 0), strict=True):
        exact = stats.permutation_test(
            (column,), lambda x, axis: x.sum(axis), permutation_type="samples", n_resamples=np.inf
        )
        assert chance == pytest.approx(exact.pvalue)
    # The same by draws, as there are more ways than these.
    assert randomization_p(rows, 1000, 0) == pytest.approx(randomization_p(rows, 2000, 0), abs=0.05)


def test_p_values_of_systems_that_are_alike_are_evenly_spread_and_a_difference_is_found() -> None:
    random = np.random.default_rng(4)
    alike, better = [], []
    for _ in range(300):
        first, second = (random.random((60, 1)) < 0.5).astype(float), (random.random((60, 1)) < 0.5).astype(float)
        context_E = np.arange(60) // 2
        alike.append(differences(first, second, context_E, 200, 0)[0])
        better.append(differences(np.maximum(first, random.random((60, 1)) < 0.6), second, context_E, 200, 0)[0])
    for name in ("p_randomization", "p_bootstrap"):
        assert 0.02 < np.mean([getattr(found, name) <= 0.05 for found in alike]) < 0.09
        assert np.mean([getattr(found, name) <= 0.5 for found in alike]) == pytest.approx(0.5, abs=0.1)
        assert np.mean([getattr(found, name) <= 0.05 for found in better]) > 0.8
    assert all(0 < found.p_bootstrap <= 1 for found in alike + better if found.p_bootstrap is not None)


def test_a_difference_is_paired() -> None:
    # The second is wrong where the first is, and in one of ten questions more: every context says so.
    first = np.tile([[1.0], [0.0]], (50, 1))
    second = first.copy()
    second[::10] = 0
    (found,) = differences(first, second, np.arange(100) // 10, 1100, 0)
    assert (found.interval.value, found.interval.low, found.interval.high) == (10, 10, 10)
    assert found.p_bootstrap == pytest.approx(2 / 1101)
    assert found.p_randomization == 2 / 2**10
    (backwards,) = differences(second, first, np.arange(100) // 10, 1100, 0)
    assert backwards.interval.value == -10
    assert backwards.p_bootstrap == found.p_bootstrap


# ------------------------------------------------------------------------------------------------------------ coverage


def simulated(random: np.random.Generator, num_contexts: int) -> tuple[Groups, Groups]:
    """By context and by question: 1 to 7 questions each, of which a share of Beta(3, 1), 75 % on average, is right."""
    sizes_G = random.integers(1, 8, num_contexts)
    right_G = random.binomial(sizes_G, random.beta(3, 1, num_contexts))
    scores_E = np.concatenate([np.arange(size) < right for size, right in zip(sizes_G, right_G, strict=True)])
    return Groups(right_G[:, None].astype(float), sizes_G), Groups.single(scores_E[:, None].astype(float))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    over_contexts, over_questions = [], []
    for draw in range(1000):
        by_context, by_question = simulated(random, 100)
        over_contexts.append(holds_75(by_context, draw))
        if draw < 300:
            over_questions.append(holds_75(by_question, draw))
    assert 0.93 <= np.mean(over_contexts) <= 0.97
    # Questions of a context are alike here, so that taking them for independent says too much.
    assert np.mean(over_questions) < 0.91


def holds_75(groups: Groups, seed: int) -> bool:
    """Whether an interval holds the share that is right in truth."""
    (found,) = intervals(groups, 400, seed)
    return found.low is not None and found.high is not None and found.low <= 75 <= found.high


def test_the_simulation_is_one_of_dependent_questions() -> None:
    by_context, by_question = simulated(np.random.default_rng(1), 20_000)
    assert by_context.sums_GK.sum() == by_question.sums_GK.sum()
    assert by_question.sums_GK.mean() == pytest.approx(0.75, abs=0.01)
    pairs = by_context.sizes_G * (by_context.sizes_G - 1)
    both = by_context.sums_GK[:, 0] * (by_context.sums_GK[:, 0] - 1)
    # Two questions of one context are both right more often than two of any.
    assert both.sum() / pairs.sum() > 0.75**2 + 0.02
