"""Measurements beside which others used the machine: noticed, made again, marked, and kept out of headlines."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qa_dist.benchmarking import evaluation, job, neighbours, scaling, trainer
from qa_dist.benchmarking.job import alternate, medians
from qa_dist.benchmarking.neighbours import UNSTABLE, Reading, busy_seconds, describe, undisturbed_result

STAT = """\
cpu  1000 20 300 5000 60 7 8 90 400 10
cpu0 600 10 100 2000 30 3 4 50 300 10
cpu1 400 10 200 3000 30 4 4 40 100 0
intr 12345 0 9
ctxt 678
"""


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "num_cores", lambda: 2)


def test_the_busy_time_of_the_cores_that_may_be_used() -> None:
    # user, nice, system, irq, softirq and steal; idle time and waiting for disks are nobody's, guests are in user.
    first, second = 600 + 10 + 100 + 3 + 4 + 50, 400 + 10 + 200 + 4 + 4 + 40
    assert busy_seconds(STAT, {0}, 100) == first / 100
    assert busy_seconds(STAT, {0, 1}, 100) == (first + second) / 100
    assert busy_seconds(STAT, {0, 7}, 100) is None, "a core that the file does not name"
    assert busy_seconds("", {0}, 100) is None


def test_a_machine_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    stat.write_text(STAT, encoding="ascii")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    monkeypatch.setattr(os, "times", lambda: (1.0, 2.0, 30.0, 40.0, 999.0))
    found = neighbours.read_machine(stat)
    assert (found.own_seconds, found.busy_seconds) == (73.0, 6.58)
    assert neighbours.read_machine(tmp_path / "none").busy_seconds is None


def test_what_others_used_is_what_is_left() -> None:
    noted = describe(Reading(100.0, 5.0, 1000.0), Reading(110.0, 20.0, 1027.5))
    assert noted == {"wall_seconds": 10.0, "cpu_seconds": 15.0, "others_cores": 1.25, "disturbed": True}
    assert not describe(Reading(0.0, 0.0, 0.0), Reading(10.0, 10.0, 12.5))["disturbed"], "a quarter of a core"
    assert describe(Reading(0.0, 0.0, 0.0), Reading(10.0, 10.0, 12.6))["disturbed"]
    assert describe(Reading(0.0, 0.0, 0.0), Reading(1.0, 1.02, 1.0))["others_cores"] == 0.0
    unknown = describe(Reading(0.0, 0.0, None), Reading(10.0, 10.0, None))
    assert (unknown["others_cores"], unknown["disturbed"]) == (None, False)
    ranks = describe(Reading(0.0, 0.0, 0.0), Reading(10.0, 10.0, 20.0), own_seconds=20.0)
    assert (ranks["cpu_seconds"], ranks["others_cores"]) == (20.0, 0.0)


def test_a_large_machine_has_more_services(monkeypatch: pytest.MonkeyPatch) -> None:
    assert neighbours.most_others() == 0.25
    monkeypatch.setattr(neighbours, "num_cores", lambda: 128)
    assert neighbours.most_others() == 2.56


def machine(*others: float) -> Callable[[], Reading]:
    """A reader of a machine of which others use so many cores in each measurement, of ten seconds each."""

    def readings() -> Iterator[Reading]:
        wall = own = busy = 0.0
        for cores in others:
            yield Reading(wall, own, busy)
            wall, own, busy = wall + 10, own + 15, busy + 15 + 10 * cores
            yield Reading(wall, own, busy)

    return readings().__next__


def test_an_undisturbed_measurement_is_made_once() -> None:
    made: list[int] = []
    result = undisturbed_result(lambda: made.append(1) or {"figure": len(made)}, read=machine(0.1, 0.0))
    assert len(made) == 1
    noted = {"wall_seconds": 10.0, "cpu_seconds": 15.0, "others_cores": 0.1, "disturbed": False, "tries": 1}
    assert result == {"figure": 1, "neighbours": noted}


def test_a_disturbed_one_is_made_again() -> None:
    made: list[int] = []
    result = undisturbed_result(lambda: made.append(1) or {"figure": len(made)}, read=machine(1.0, 0.2))
    assert (result["figure"], result["neighbours"]["tries"], result["neighbours"]["disturbed"]) == (2, 2, False)


def test_of_measurements_that_stay_disturbed_the_least_is_kept_and_marked() -> None:
    made: list[int] = []
    result = undisturbed_result(lambda: made.append(1) or {"figure": len(made)}, read=machine(1.0, 0.5, 0.8))
    assert len(made) == 3
    assert (result["figure"], result["neighbours"]["tries"]) == (2, 3)
    assert neighbours.is_disturbed(result)
    assert neighbours.in_words(result) == " (disturbed: others used 0.50 cores)"


def results(*rates: float, disturbed: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Repeats with these features per second; some disturbed."""
    return [
        {
            "features_per_second": value,
            "phase_seconds": dict.fromkeys(evaluation.PHASES, 1 / value),
            "neighbours": {"others_cores": float(number in disturbed), "disturbed": number in disturbed},
        }
        for number, value in enumerate(rates)
    ]


def test_every_repeat_of_every_cell_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(job, "measure", lambda *jobs: made.append(jobs) or [{"features_per_second": len(made)}])
    # a and b, then a disturbed, again a, and b.
    monkeypatch.setattr(neighbours, "read_machine", machine(0, 0, 1, 0, 0))
    work = job.Job(kind="train", options={}, num_features=1)
    said: list[str] = []
    found = alternate({"a": work, "b": work}, repeats=2, notice=said.append)
    assert [[each["features_per_second"] for each in found[name]] for name in "ab"] == [[1, 4], [2, 5]]
    assert [each["neighbours"]["tries"] for each in found["a"]] == [1, 2]
    assert said[2] == "2/2 a: 4.00 features/s"


def test_figures_are_of_the_undisturbed_repeats() -> None:
    found = medians(results(10, 12, 2, disturbed=(2,)), "features_per_second")
    assert found["features_per_second"] == {"median": 11.0, "min": 10.0, "max": 12.0}
    assert (found["num_disturbed"], len(found["repeats"])) == (1, 3)
    alone = medians(results(10, 12, disturbed=(0, 1)), "features_per_second")
    assert (alone["features_per_second"]["median"], alone["num_disturbed"]) == (11.0, 2), "there are no others"
    assert "num_disturbed" not in medians(results(10, 12), "features_per_second")


def test_a_headline_needs_two_undisturbed_repeats_on_both_sides() -> None:
    def found(ours: list[dict[str, Any]]) -> Any:
        measured = {trainer.TUTORIAL: results(1, 1, 9, disturbed=(2,)), trainer.OURS: ours}
        return trainer.headline(measured, trainer.OURS)["speedup_vs_tutorial_recipe"]

    assert found(results(4, 4)) == 4.0
    assert found(results(4, 4, 1, disturbed=(2,))) == 4.0
    assert found(results(4, 1, disturbed=(1,))) == UNSTABLE
    assert found(results(4)) == UNSTABLE, "one repeat"
    speedup = evaluation._speedup(results(4, 4), results(2, 2))
    assert speedup == 2.0
    assert evaluation._speedup(results(4, 4), results(2, 2, disturbed=(0,))) == UNSTABLE


def test_efficiencies_are_of_repeats_that_nobody_disturbed() -> None:
    measured = {
        "1 process": results(10, 10, 10),
        "2 independent": results(20, 20, 10, disturbed=(2,)),
        "2 ranks, weak": results(19, 19, 19),
        "2 ranks, strong": results(18, 18, 18, disturbed=(0, 1)),
    }
    efficiency = scaling.efficiency(measured, 2)
    assert efficiency["weak_over_independent"] == {"median": 0.95, "min": 0.95, "max": 0.95}
    assert efficiency["undisturbed_repeats"] == {
        "weak_over_independent": 2,
        "weak_over_one_process": 3,
        "strong_over_one_process": 1,
    }
    assert scaling.headline([efficiency]) == {
        "weak_scaling_efficiency": 0.95,
        "weak_scaling_vs_one_process": 0.95,
        "strong_scaling_efficiency": UNSTABLE,
    }
