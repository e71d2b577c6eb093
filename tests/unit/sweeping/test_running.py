"""What a sweep says of itself."""

import pytest

from qa_dist.sweeping.running import command


@pytest.mark.parametrize(
    "start",
    [["/usr/bin/qa-dist", "sweep"], ["/site/qa_dist/sweep.py"], ["/site/qa_dist/cli.py", "sweep"], ["-c", "sweep"]],
)
def test_the_command_that_starts_a_sweep_again(start: list[str]) -> None:
    words = ["/data/sweeps/few.yaml", "--output_dir", "out", "--validation_file=/home/u/dev.json"]
    shown = command([*start, *words, "--train_file=hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"])
    assert shown[:6] == ["qa-dist", "sweep", "few.yaml", "--output_dir", "out", "--validation_file=dev.json"]
    assert "abcdefgh" not in shown[6]
