"""The token budget: as it is wanted, a constant on a CPU, and on CUDA what passes of the longest features show."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qa_dist.common.errors import ConfigError, LocalTrainingError
from qa_dist.distributed.launch_config import LaunchConfig
from qa_dist.features.token_budget import CPU_TOKENS
from qa_dist.training import memory_probe
from qa_dist.training.memory_probe import token_budget

LENGTHS = np.array([30, 10, 50, 20, 40], dtype=np.int32)


class FakeRanks:
    """Ranks on such a device, of which another one has room for 70 tokens less."""

    def __init__(self, kind: str) -> None:
        self.device = SimpleNamespace(type=kind)
        self.launch_config = LaunchConfig(strategy="zero2")

    def autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    def minimum(self, value: int) -> int:
        return value - 70


class FakeEngine:
    """Notes the features of each pass, and that it had the precision of the run and left nothing behind."""

    holds_shards = False

    def __init__(self) -> None:
        self.dropped = 0
        self.module = self
        self.passes: list[list[int]] = []
        self.is_training = False
        self.dry_passes = 0

    def train(self) -> None:
        self.is_training = True

    def __call__(self, features: list[int], types: Any, lengths: Any, row: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert torch.is_autocast_enabled("cpu")
        self.passes.append(features)
        return torch.zeros(1), torch.zeros(1)

    def dry_backward(self, loss: torch.Tensor) -> None:
        assert not loss.ndim
        self.dry_passes += 1

    def zero_grad(self) -> None:
        self.dropped += 1


def budget(kind: str, engine: Any = None, **options: Any) -> int:
    ranks: Any = FakeRanks(kind)
    store: Any = SimpleNamespace(lengths=LENGTHS)
    wanted = {"wanted": None, "longest": 50, "max_features": 4, "reserved_bytes": 7, **options}
    return token_budget(ranks, engine or FakeEngine(), store, np.array([1, 2, 3, 4]), **wanted)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and losses that cost nothing."""
    monkeypatch.setattr(memory_probe, "loss_of", lambda alpha: lambda *_: torch.zeros(3))
    batch = SimpleNamespace(token_type_ids_T=None, lengths=None, labels_B2=None, row=None)
    monkeypatch.setattr(
        memory_probe.FeatureBatch,
        "of",
        lambda store, chosen, device: SimpleNamespace(input_ids_T=chosen.tolist(), **vars(batch)),
    )


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_is_wanted_is_taken_if_the_longest_feature_fits(kind: str) -> None:
    assert budget(kind, wanted=50) == 50
    with pytest.raises(ConfigError, match=r"--max_tokens_per_device 49 is less than one feature, .* have 50 tokens"):
        budget(kind, wanted=49)


def test_on_a_cpu_it_is_a_constant_or_the_longest_feature() -> None:
    assert budget("cpu") == CPU_TOKENS
    assert budget("cpu", longest=CPU_TOKENS + 1) == CPU_TOKENS + 1


def test_on_cuda_it_is_measured_by_passes_of_the_longest_features(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    tokens: list[int] = []

    def measured(run_pass: Any, **options: Any) -> int:
        given.update(options)
        tokens.extend(run_pass(wanted) for wanted in (20, 100, 1000))
        return 130

    monkeypatch.setattr(memory_probe, "measured_budget", measured)
    stand_in(monkeypatch)
    engine = FakeEngine()
    assert budget("cuda", engine) == 60, "the smallest of all ranks"
    # Feature 0 is not trained on; each pass counts as if all its features were of the longest.
    assert engine.passes == [[2], [2, 4], [2, 4, 3, 1]]
    assert tokens == [50, 100, 200]
    assert (engine.dry_passes, engine.is_training) == (3, True)
    assert (given["longest"], given["most"], given["reserved_bytes"]) == (50, 200, 7)
    budget("cuda", FakeEngine(), max_features=3)
    assert given["most"] == 150
    tokens.clear()
    doubled = FakeEngine()
    budget("cuda", doubled, rdrop_alpha=2.0)
    assert doubled.passes == [[2, 2], [2, 4, 2, 4], [2, 4, 3, 1, 2, 4, 3, 1]]
    assert tokens == [50, 100, 200], "a budget counts each feature once"


@pytest.mark.parametrize("text", ["CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_a_rank_out_of_memory_in_a_trial_takes_part_in_the_agreement(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = torch.OutOfMemoryError if "CUDA" in text else RuntimeError
    shown: list[int | None] = []

    def measured(run_pass: Any, **options: Any) -> int:
        shown.append(run_pass(100))
        return 100

    def fail(loss: torch.Tensor) -> None:
        raise kind(text)

    monkeypatch.setattr(memory_probe, "measured_budget", measured)
    stand_in(monkeypatch)
    engine = FakeEngine()
    monkeypatch.setattr(engine, "dry_backward", fail)
    assert budget("cuda", engine) == 30, "the smallest of all ranks"
    assert (shown, engine.dropped) == ([None], 1)
    # Where others are in the middle of the same pass nobody can go on.
    monkeypatch.setattr(engine, "holds_shards", True, raising=False)
    with pytest.raises(LocalTrainingError, match="a trial with 2 features of 50 tokens, and with zero2"):
        budget("cuda", engine)
    monkeypatch.setattr(engine, "dry_backward", lambda loss: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        budget("cuda", engine)
