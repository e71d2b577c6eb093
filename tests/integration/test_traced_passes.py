"""A pass that is traced without numbers takes what a real one takes, for every kind of encoder and of options."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from qa_dist.config.options import ModelConfig
from qa_dist.memory.by_strategy import TracedPass
from qa_dist.memory.tracing import MADE, StorageTracer, run_pass, trace_passes
from qa_dist.model.building import build_meta_model, build_model
from qa_dist.model.casts import remove_redundant_casts
from qa_dist.model.lora_layers import GroupedAdapters, GroupedLora, group_layers
from qa_dist.model.precision import DTYPES
from qa_dist.model.span_model import SpanModel
from tests.tiny import MODEL_TYPES, tiny_model
from tests.unit.memory.test_tracing import peaks

pytestmark = pytest.mark.integration

LENGTH = 64
SIZES = (3, 6)
CPU = torch.device("cpu")
Precision = Literal["no", "bf16", "fp16"]
TWO_LAYERS = (("bert", "lora"), ("modernbert", "lora"))
"""Where what a layer leaves for the backward pass is counted beside another's; ModernBERT's layers are of two kinds."""


def lengths(size: int) -> tuple[int, ...]:
    """Of a batch with one token to pad: without any, transformers makes no mask, which shapes alone cannot tell."""
    return (*(LENGTH,) * (size - 1), LENGTH - 1)


def real_passes(model: SpanModel, precision: Precision) -> list[TracedPass]:
    """What `trace_passes` says, of a model that computes."""
    model.train()
    found = []
    with StorageTracer() as tracer:
        for tensor in (*model.parameters(), *model.buffers()):
            tracer.count(tensor)
        run_pass(model, lengths(SIZES[0]), CPU, precision, tracer)
        tracer.rename("workspace", "gradients")
        for size in SIZES:
            tracer.reset_peak()
            run_pass(model, lengths(size), CPU, precision, tracer)
            found.append(TracedPass(size * LENGTH, {part: tracer.peak.get(part, 0) for part in MADE}))
    return found


def both(
    config: ModelConfig, *, precision: Precision = "no", checkpointing: bool = False
) -> tuple[list[TracedPass], list[TracedPass]]:
    options: dict[str, Any] = {"max_seq_length": LENGTH, "gradient_checkpointing": checkpointing}
    traced = trace_passes(build_meta_model(config, **options), SIZES, length=LENGTH, device=CPU, precision=precision)
    return traced, real_passes(build_model(config, seed=1, **options)[0], precision)


@pytest.mark.parametrize(
    ("model_type", "tuning"), [("bert", "full"), *((model_type, "lora") for model_type in MODEL_TYPES)]
)
def test_a_pass_without_numbers_takes_what_a_real_one_does(
    tmp_path: Path, model_type: str, tuning: Literal["lora", "full"]
) -> None:
    base = tiny_model(model_type, tmp_path, num_layers=2 if (model_type, tuning) in TWO_LAYERS else 1)
    config = ModelConfig(model_name_or_path=str(base), tuning=tuning, model_dropout=0.1)
    traced, real = both(config)
    assert peaks(traced) == pytest.approx(peaks(real), rel=0.01)
    assert min(peaks(traced)) > 100_000


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"padding": "max_length"}, {}),
        ({"padding": "sorted"}, {}),
        ({}, {"checkpointing": True}),
        ({}, {"precision": "bf16"}),
        ({"lora_target_modules": ("all-linear",), "use_dora": True}, {"precision": "fp16"}),
    ],
    ids=str,
)
def test_so_it_does_with_other_options(tmp_path: Path, options: dict[str, Any], more: dict[str, Any]) -> None:
    # What a layer does is not another layer's; where layers are computed twice, what is kept of each counts.
    base = tiny_model("bert", tmp_path, num_layers=2 if more.get("checkpointing") else 1)
    traced, real = both(ModelConfig(model_name_or_path=str(base), **options), **more)
    assert peaks(traced) == pytest.approx(peaks(real), rel=0.01)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_so_it_does_over_quantised_weights(tmp_path: Path, kind: Literal["8bit", "4bit"]) -> None:
    pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")
    base = tiny_model("bert", tmp_path, num_layers=1)
    traced, real = both(ModelConfig(model_name_or_path=str(base), quantization=kind))
    assert peaks(traced) == pytest.approx(peaks(real), rel=0.01)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_so_it_does_with_lora_layers_in_groups(tmp_path: Path, precision: Precision) -> None:
    options = {"lora_target_modules": ("all-linear",), "lora_implementation": "grouped"}
    base = tiny_model("bert", tmp_path, num_layers=1)
    config = ModelConfig(model_name_or_path=str(base), **options)  # type: ignore[arg-type]
    made = build_meta_model(config, max_seq_length=LENGTH), build_model(config, seed=1, max_seq_length=LENGTH)[0]
    for model in made:
        remove_redundant_casts(model, config, precision, CPU, shards_one_type=False)
    traced = trace_passes(made[0], SIZES, length=LENGTH, device=CPU, precision=precision, groups_adapters=True)
    GroupedAdapters(made[1], group_layers(made[1], DTYPES.get(precision, torch.float32)))
    assert peaks(traced) == pytest.approx(peaks(real_passes(made[1], precision)), rel=0.01)
    assert any(isinstance(part, GroupedLora) for part in made[0].modules())
