"""What a sweep says of itself."""

import pytest

from qa_dist.sweeping.running import command


@pytest.mark.parametrize("start", [["/usr/bin/qa-dist", "sweep"], ["/site/qa_dist/sweep.py"]])
def test_the_command_that_starts_a_sweep_again(start: list[str]) -> None:
    words = ["/data/sweeps/few.yaml", "--output_dir", "out", "--train_file=hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"]
    shown = command([*start, *words])
    assert shown[:5] == ["qa-dist", "sweep", "few.yaml", "--output_dir", "out"]
    assert "abcdefgh" not in shown[5]
