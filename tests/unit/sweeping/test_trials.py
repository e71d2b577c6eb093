"""What the record of a trial takes from the folder of its run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qa_dist.sweeping.trials import _logged, _seconds_of_steps, _trained
from qa_dist.training.checkpoints import Checkpoint, write_checkpoint
from qa_dist.training.run_state import RunState


def saved(folder: Path, step: int, size: int) -> Path:
    state = RunState(world_size=1, max_tokens_per_device=64)
    return write_checkpoint(Checkpoint(step, {"a": torch.zeros(size, 2)}, {}, None, {}, state), folder)


def test_what_is_trained_is_that_of_the_newest_checkpoint_and_of_no_copy(tmp_path: Path) -> None:
    trial: Any = SimpleNamespace(folder=tmp_path)
    assert _trained(trial) == {}
    saved(tmp_path / "checkpoints", 5, 3)
    newest = saved(tmp_path / "checkpoints", 10, 4)
    saved(tmp_path / "copies", 10, 9).rename(tmp_path / "checkpoints" / "step-00000010.bak")
    size = (newest / "trained.safetensors").stat().st_size
    assert _trained(trial) == {"trainable_parameters": 8, "saved_bytes": size}


def test_a_line_that_was_cut_short_counts_for_nothing(tmp_path: Path) -> None:
    trial: Any = SimpleNamespace(folder=tmp_path)
    assert (_seconds_of_steps(trial), _logged(trial)) == (0, {})
    (tmp_path / "timings.jsonl").write_text('{"step": 1, "step_seconds": 1.5}\n{"step": 2, "step_sec')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval_f1": 50.0}\n{"step": 1, "loss": 2.0}\n{"step": 2, "eval')
    assert (_seconds_of_steps(trial), _logged(trial)) == (1.5, {"f1": 50.0})
