"""Casts that are done once or left out change no bit of what a model computes under autocast."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qa_dist.config.options import ModelConfig
from qa_dist.model.building import build_model
from qa_dist.model.casts import leave_inputs_of_adapters, remove_redundant_casts, round_frozen
from qa_dist.model.precision import autocast
from qa_dist.model.span_model import SpanModel, head_names, span_loss, transformers_model
from tests.tiny import MODEL_TYPES, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = (9, 40, 3, 25)


def settings(folder: Path, model_type: str = "bert", **options: Any) -> ModelConfig:
    base = folder if (folder / "config.json").exists() else tiny_model(model_type, folder)
    adapted = {"lora_dropout": 0.0, "lora_target_modules": ("all-linear",), **options}
    return ModelConfig(model_name_or_path=str(base), **adapted)


def build(config: ModelConfig) -> SpanModel:
    model = build_model(config, seed=1, max_seq_length=64)[0]
    with torch.no_grad():
        for name, parameter in model.trainable():
            if "lora_B" in name:
                # Zero at the start, which would hide what reaches it.
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return model.train()


def pass_of(model: SpanModel) -> list[torch.Tensor]:
    """Logits, losses and all gradients of a pass under autocast to bfloat16."""
    torch.manual_seed(3)
    ids_T = torch.randint(5, 50, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    with autocast("cpu", "bf16"):
        start_T, end_T = model(ids_T, torch.zeros_like(ids_T), LENGTHS)
    losses_B = span_loss(start_T, end_T, LENGTHS, torch.tensor([[length // 4, length // 2] for length in LENGTHS]))
    losses_B.sum().backward()
    gradients = [parameter.grad for _, parameter in model.trainable()]
    return [start_T, end_T, losses_B, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_bit_of_a_pass_changes(model_type: str, tmp_path: Path) -> None:
    config = settings(tmp_path, model_type)
    plain, spared = build(config), build(config)
    remove_redundant_casts(spared, config, "bf16", CPU, shards_one_type=False)
    assert {weight.dtype for weight in spared.parameters()} == {torch.float32, torch.bfloat16}
    wanted, found = pass_of(plain), pass_of(spared)
    assert len(wanted) == len(found) == 3 + len(plain.trainable())
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_each_of_the_two_alone_changes_no_bit(tmp_path: Path) -> None:
    config = settings(tmp_path)
    wanted = pass_of(build(config))
    rounded, left = build(config), build(config)
    round_frozen(rounded, torch.bfloat16)
    leave_inputs_of_adapters(left)
    for model in (rounded, left):
        assert all(map(torch.equal, pass_of(model), wanted))


def test_what_is_trained_and_the_head_stay(tmp_path: Path) -> None:
    config = settings(tmp_path, lora_target_modules=("attention",))
    model = build(config)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    remove_redundant_casts(model, config, "bf16", CPU, shards_one_type=False)
    plain = transformers_model(model.model)
    rounded = {name for name, weight in plain.named_parameters() if weight.dtype == torch.bfloat16}
    linear = {name for name, layer in plain.named_modules() if isinstance(layer, nn.Linear)}
    assert rounded
    assert all(name.rpartition(".")[0] in linear for name in rounded)
    assert not any(name.partition(".")[0] in head_names(plain) or "lora_" in name for name in rounded)
    assert all(parameter.dtype == torch.float32 for _, parameter in model.trainable())
    assert "bert.encoder.layer.0.intermediate.dense.bias" in rounded
    assert "bert.encoder.layer.0.attention.self.query.base_layer.weight" in rounded
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name].to(weight.dtype)), name


@pytest.mark.parametrize(
    ("options", "precision"),
    [({"tuning": "full"}, "bf16"), ({"use_dora": True}, "bf16"), ({}, "no")],
    ids=["full", "dora", "float32"],
)
def test_what_would_not_be_equal_is_left_alone(options: dict[str, Any], precision: Any, tmp_path: Path) -> None:
    config = settings(tmp_path, **options)
    model = build(config)
    remove_redundant_casts(model, config, precision, CUDA, shards_one_type=False)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert casting(model) in (set(), {True})


def test_shards_of_one_type_stay_so(tmp_path: Path) -> None:
    config = settings(tmp_path)
    model = build(config)
    remove_redundant_casts(model, config, "bf16", CPU, shards_one_type=True)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert casting(model) == {False}


@pytest.mark.parametrize(("device", "casts"), [(CPU, True), (CUDA, False)])
def test_dropout_before_adapters_on_a_cpu_is_in_float32(device: torch.device, casts: bool, tmp_path: Path) -> None:
    config = settings(tmp_path, lora_dropout=0.1)
    model = build(config)
    remove_redundant_casts(model, config, "bf16", device, shards_one_type=False)
    assert casting(model) == {casts}


def casting(model: SpanModel) -> set[bool]:
    """Whether the adapters cast their input."""
    return {layer.cast_input_dtype_enabled for layer in model.modules() if hasattr(layer, "cast_input_dtype_enabled")}
