"""A run with R-Drop that was stopped goes on exactly."""

from pathlib import Path

from tests.distributed.forking import Fault
from tests.distributed.launching import lines
from tests.distributed.test_resume import Runs, assert_same_run


def test_a_run_that_computes_features_twice_goes_on(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs")
    twice, output = ("--rdrop_alpha", "1", "--model_dropout", "0.2"), tmp_path / "run"
    assert runs.start(output, *twice, num_processes=2, fault=Fault("step", 8)).wait() == [85] * 2
    assert runs.resume(output, *twice, num_processes=2).wait() == [0, 0]
    whole = runs.whole(2, *twice)
    assert_same_run(output, whole)
    apart = [line["loss"] for line in lines(whole / "metrics.jsonl") if "loss" in line]
    assert apart != [line["loss"] for line in lines(runs.whole(2) / "metrics.jsonl") if "loss" in line]
