"""Biases trained beside adapters: the start is the base model, and what is saved gives the same."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from qa_dist.config.options import ModelConfig
from qa_dist.model.building import build_meta_model, build_model
from qa_dist.model.pretrained import load_tokenizer
from qa_dist.model.rehearsal import rehearse
from qa_dist.model.saved import load_trained, save_trained
from qa_dist.model.span_model import SpanModel
from tests.tiny import tiny_model

LENGTH = 20


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tiny_model("bert", tmp_path_factory.mktemp("bert"))
    return ModelConfig(
        model_name_or_path=str(folder),
        lora_target_modules=("all-linear",),
        lora_r=4,
        model_dropout=0.0,
        lora_dropout=0.0,
    )


def built(config: ModelConfig) -> SpanModel:
    return build_model(config, seed=1, max_seq_length=64)[0].eval()


def logits(model: SpanModel) -> torch.Tensor:
    ids = torch.arange(5, 5 + LENGTH)
    with torch.no_grad():
        return torch.stack(list(model(ids, torch.zeros_like(ids), [LENGTH], None)))


def test_the_start_is_the_base_model_and_what_is_saved_is_an_adapter_on_it(plain: ModelConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(plain, lora_bias="all")
    model = built(config)
    # B is zero in a plain adapter, so that it computes what the base model and the head do.
    assert torch.allclose(logits(model), logits(built(plain)), atol=1e-6)
    tokenizer = load_tokenizer(config)
    rehearse(model, tokenizer, config, tmp_path)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for _, weight in model.trainable():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    assert not torch.allclose(logits(model), logits(built(plain)), atol=1e-2)
    save_trained(model, {name: weight.detach() for name, weight in model.trainable()}, tokenizer, tmp_path / "saved")
    for fold in (False, True):
        again = load_trained(config, str(tmp_path / "saved"), max_seq_length=64, tokenizer_pads_left=False, fold=fold)
        assert torch.allclose(logits(again), logits(model), atol=3e-6)
    said = json.loads((tmp_path / "saved" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (said["r"], said["lora_alpha"], said["bias"]) == (4, 16, "all")


def test_biases_are_trained_and_nothing_else_besides(plain: ModelConfig) -> None:
    few, more = built(plain).trainable(), built(dataclasses.replace(plain, lora_bias="all")).trainable()
    new = {name for name, _ in more} - {name for name, _ in few}
    assert all(name.endswith(".bias") for name in new)
    biases = {
        name for name, _ in built(plain).named_parameters() if name.endswith(".bias") and "qa_outputs" not in name
    }
    assert {f"model.{name}" for name in new} == {name for name in biases if "pooler" not in name}


def test_a_model_without_numbers_is_built_too(plain: ModelConfig) -> None:
    config = dataclasses.replace(plain, lora_bias="all")
    shapes = [(name, tuple(weight.shape)) for name, weight in build_meta_model(config, max_seq_length=64).trainable()]
    assert shapes == [(name, tuple(weight.shape)) for name, weight in built(config).trainable()]
