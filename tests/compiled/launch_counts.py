"""What forward pass, loss and backward pass of models ask of a CUDA device; run by `tests.support.fake_cuda.run`."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig

from qa_dist.config.options import ModelConfig
from qa_dist.features.rows import Row
from qa_dist.memory.tracing import fake_weights
from qa_dist.model.building import build_meta_model
from qa_dist.model.casts import remove_redundant_casts
from qa_dist.model.families import model_types_unpadded
from qa_dist.model.lora_layers import GroupedAdapters, group_layers
from qa_dist.model.precision import DTYPES, Precision, autocast
from qa_dist.model.span_model import SpanModel, span_loss
from tests.support.fake_cuda import CUDA, Counts, count, fake_cuda
from tests.tiny import MODEL_TYPES, tiny_model

MAX_LENGTH = 384

NO_DROPOUT: dict[str, Any] = {"model_dropout": 0.0, "lora_dropout": 0.0}

SCENARIOS: dict[str, dict[str, Any]] = {
    "query and value, no dropout": NO_DROPOUT,
    "query and value": {},
    "all-linear, no dropout": {"lora_target_modules": ("all-linear",), "lora_r": 16, **NO_DROPOUT},
}

WAYS: dict[str, dict[str, Any]] = {
    "lora": {"lora_target_modules": ("all-linear",)},
    "dora": {"lora_target_modules": ("all-linear",), "use_dora": True},
    "full": {"tuning": "full"},
    "8bit": {"lora_target_modules": ("all-linear",), "quantization": "8bit"},
    "4bit": {"lora_target_modules": ("all-linear",), "quantization": "4bit"},
}

# X-MOD, which looks up on the device which tokens are of which language, cannot be counted on tensors without numbers;
# the others that are left out are RoBERTa under other names.
UNPADDED_TYPES = tuple(name for name in model_types_unpadded() if name in MODEL_TYPES)

TRAINED = tuple(
    (model_type, way)
    for model_type in UNPADDED_TYPES
    for way in WAYS
    # The others replace linear layers, whatever these belong to.
    if way in ("lora", "full") or model_type in ("bert", "modernbert")
)
"""Architectures and ways of training whose products are looked at."""

ATTENTION = "aten::_flash_attention_forward"

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def row_lengths(num_features: int) -> tuple[int, ...]:
    """Tokens of features with SQuAD's mean length."""
    rng = np.random.default_rng(0)
    return tuple(int(length) for length in np.clip(rng.gamma(6, 166 / 6, num_features), 40, MAX_LENGTH))


def trainable(config: ModelConfig, precision: Precision = "bf16", max_length: int = MAX_LENGTH) -> SpanModel:
    """The model as it trains on CUDA, all shapes and no numbers; outside `fake_cuda`."""
    model = build_meta_model(config, max_seq_length=max_length, device=CUDA)
    remove_redundant_casts(model, config, precision, CUDA, shards_one_type=False)
    return model.train()


def count_pass(
    model: SpanModel,
    lengths: tuple[int, ...],
    precision: Precision = "bf16",
    watched: tuple[str, ...] = (),
    *,
    grouped: bool = True,
) -> Counts:
    """Counts of a forward pass, loss and backward pass; the inputs are on the device. Inside `fake_cuda`."""
    fake_weights(model, CUDA)
    groups = group_layers(model, DTYPES.get(precision, torch.float32)) if grouped else []
    if groups:
        GroupedAdapters(model, groups)
    for bias in model.shift_invariant_biases().values():
        bias.register_hook(torch.zeros_like)
    input_ids_T = torch.zeros(sum(lengths), dtype=torch.long, device=CUDA)
    labels_B2 = torch.zeros(len(lengths), 2, dtype=torch.long, device=CUDA)
    row = Row.of(lengths, CUDA)

    def work() -> None:
        with autocast("cuda", precision):
            start_T, end_T = model(input_ids_T, input_ids_T, lengths, row)
        span_loss(start_T, end_T, lengths, labels_B2, row).sum().backward()

    return count(work, watched)


def count_loss(lengths: tuple[int, ...]) -> Counts:
    """Counts of the loss and its backward pass."""
    start_T, end_T = (torch.empty(sum(lengths), device=CUDA, requires_grad=True) for _ in range(2))
    labels_B2 = torch.zeros(len(lengths), 2, dtype=torch.long, device=CUDA)
    row = Row.of(lengths, CUDA)
    return count(lambda: span_loss(start_T, end_T, lengths, labels_B2, row).sum().backward())


def of_all_layers(few: list[Counts]) -> dict[str, Any]:
    """Launches and waits of twelve layers, from those of one and of two."""
    one, two = few

    def of_twelve(first: Mapping[str, int], both: Mapping[str, int]) -> dict[str, int]:
        names = dict.fromkeys([*both, *first])
        return {name: first.get(name, 0) + 11 * (both.get(name, 0) - first.get(name, 0)) for name in names}

    return {
        "launches": one.launches + 11 * (two.launches - one.launches),
        "by_name": of_twelve(one.by_name, two.by_name),
        "sync_names": of_twelve(one.sync_names, two.sync_names),
    }


def budgets() -> dict[str, Any]:
    """Counts of bert-base with 32 features in bfloat16, and of the loss with other numbers of features.

    Layers are alike: of the twelve, one and two are counted, and what the second one adds counts eleven times.
    """
    found: dict[str, Any] = {}
    models: dict[str, list[SpanModel]] = {name: [] for name in SCENARIOS}
    with tempfile.TemporaryDirectory() as folder:
        for num_layers in (1, 2):
            BertConfig(num_hidden_layers=num_layers).save_pretrained(folder)
            for name, options in SCENARIOS.items():
                models[name].append(trainable(ModelConfig(model_config=folder, **options)))
    with fake_cuda():
        for name, few in models.items():
            # Each model once: groups stay.
            if name == next(iter(SCENARIOS)):
                found[f"{name}, peft"] = of_all_layers(
                    [count_pass(each, row_lengths(32), grouped=False) for each in few]
                )
            found[name] = of_all_layers([count_pass(each, row_lengths(32)) for each in few])
        found["loss"] = {size: asdict(count_loss(row_lengths(size))) for size in (2, 32, 128)}
    return found


def products() -> dict[str, dict[str, list[str]]]:
    """Types of the inputs of attention and of products: by architecture and way of training."""
    models = {}
    with tempfile.TemporaryDirectory() as folder:
        for model_type in UNPADDED_TYPES:
            # ModernBERT's layers are of two kinds.
            num_layers = 2 if model_type == "modernbert" else 1
            base = str(tiny_model(model_type, Path(folder) / model_type, num_layers=num_layers))
            for way, options in ((way, WAYS[way]) for name, way in TRAINED if name == model_type):
                if options.get("quantization") and not find_spec("bitsandbytes"):
                    continue
                config = ModelConfig(model_name_or_path=base, **options)
                models[f"{model_type}, {way}"] = trainable(config, max_length=64)
    with fake_cuda():
        watched = (ATTENTION, *PRODUCTS)
        return {name: dict(count_pass(model, (9, 40, 3, 25), watched=watched).dtypes) for name, model in models.items()}


def everything() -> dict[str, Any]:
    """Both, in one process."""
    return {"budgets": budgets(), "products": products()}
