"""The tracer counts storages while they live; tests/integration/test_traced_passes.py holds it against real passes."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from qa_dist.config.options import ModelConfig
from qa_dist.features.rows import Row
from qa_dist.memory.by_strategy import TracedPass
from qa_dist.memory.tracing import StorageTracer, trace_passes
from qa_dist.model.building import build_meta_model
from tests.tiny import tiny_model

LENGTH = 64
CPU = torch.device("cpu")


def test_storages_are_counted_while_they_live() -> None:
    with FakeTensorMode(), StorageTracer() as tracer:
        first = torch.empty(1000)
        tracer.part = "activations"
        second = first + 1
        assert second.view(10, 100)[3:].shape == (7, 100), "views share a storage"
        third = second.double()
        assert tracer.live == {"weights": 4000, "activations": 12000}
        del second
        assert tracer.live == {"weights": 4000, "activations": 8000}
        assert tracer.peak == {"weights": 4000, "activations": 12000}
        tracer.rename("activations", "gradients")
        tracer.reset_peak()
        assert tracer.peak == {"weights": 4000, "gradients": 8000}
        del third
        assert tracer.live["gradients"] == 0


def test_autograd_keeps_what_the_backward_pass_needs() -> None:
    with FakeTensorMode(), StorageTracer() as tracer:
        weight = torch.empty(8, 8, requires_grad=True)
        rows = torch.empty(100, 8)
        tracer.part = "activations"
        # The product keeps its input, exp its output, and the sum nothing.
        loss = (rows @ weight.t()).exp().sum()
        assert tracer.live["activations"] == 100 * 8 * 4 + 4
        tracer.part = "workspace"
        loss.backward()  # type: ignore[no-untyped-call]
        assert tracer.live == {"weights": 4 * (64 + 800), "activations": 4, "workspace": 4 * 64}


def test_boundaries_can_be_read() -> None:
    with FakeTensorMode(), StorageTracer():
        cumulative = Row.of((3, 1, 5), CPU).cumulative
        assert cumulative.tolist() == [0, 3, 4, 9]
        assert int(cumulative.diff().max()) == 5
        cumulative.copy_(torch.empty(4))
        with pytest.raises(DataDependentOutputException):
            cumulative.tolist()


def peaks(passes: list[TracedPass]) -> list[int]:
    return [sum(traced.made.values()) for traced in passes]


def traced(
    folder: Path, sizes: tuple[int, ...], *, checkpointing: bool = False, num_layers: int = 2
) -> list[TracedPass]:
    config = ModelConfig(model_name_or_path=str(tiny_model("bert", folder, num_layers=num_layers)))
    model = build_meta_model(config, max_seq_length=LENGTH, gradient_checkpointing=checkpointing)
    return trace_passes(model, sizes, length=LENGTH, device=CPU, precision="no")


def test_memory_is_linear_in_tokens(tmp_path: Path) -> None:
    low, middle, high = peaks(traced(tmp_path, (10, 20, 40), num_layers=1))
    assert high - middle == pytest.approx(2 * (middle - low), rel=1e-3)


def test_checkpointing_saves_activations(tmp_path: Path) -> None:
    (plain,) = peaks(traced(tmp_path / "plain", (10,)))
    (checkpointed,) = peaks(traced(tmp_path / "checkpointed", (10,), checkpointing=True))
    assert checkpointed < 0.8 * plain
