"""Where progress bars are drawn."""

from pathlib import Path

import pytest

from qa_dist import train
from tests.tiny import tiny_inputs
from tests.unit.trained import reset_accelerate, words


@pytest.mark.parametrize(("option", "num_bars"), [("true", 0), ("false", 2)])
def test_a_run_without_bars_draws_none_while_it_tokenises_trains_and_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, num_bars: int
) -> None:
    reset_accelerate()
    inputs = tiny_inputs(tmp_path, num_train=8, num_validation=8)
    capsys.readouterr()
    own = {"store_dir": str(tmp_path / "store"), "output_dir": str(tmp_path / "out"), "disable_tqdm": option}
    small = {"max_seq_length": "64", "doc_stride": "16", "global_batch_size": "8", "max_train_steps": "1"}
    assert train.main(words({**inputs, **small, **own, "tuning": "full"})) == 0
    said = capsys.readouterr().err
    assert [said.count("tokenising: 100%"), said.count("Writing")] == [num_bars, 0]
    assert ("|" in said) is bool(num_bars)
    reset_accelerate()
