"""A trained model as a plain transformers model: its adapter folded into the weights of its base model."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from qa_dist.common.errors import CheckpointError
from qa_dist.config.options import EvaluationConfig, ModelConfig, RunConfig
from qa_dist.config.recipe_files import read_run_options, write_options
from qa_dist.model.calibration import read_calibration
from qa_dist.model.folder import was_evaluated_without_answers
from qa_dist.model.loading import without_library_messages
from qa_dist.model.saved import load_trained
from qa_dist.model.span_model import Padding, SpanModel

TOLERANCE = 1e-4
"""Largest difference between the logits of adapter and merged model, as a share of the largest logit.

Adding B A to a weight rounds once in float32, at 6e-8 of the weight; twenty-four layers do not come near this.
"""


def load_plain(
    config: RunConfig, directory: str, *, tokenizer_pads_left: bool, padding: Padding = "max_length"
) -> SpanModel:
    """The trained model with transformers' own attention, its own dropout and its base's weights as published.

    Raises:
        UserError: The model or its base cannot be loaded.
    """
    model_config = dataclasses.replace(config.model, padding=padding, model_dropout=None, quantization="no")
    return load_trained(
        model_config,
        directory,
        max_seq_length=config.data.max_seq_length,
        tokenizer_pads_left=tokenizer_pads_left,
    )


def quantization_notes(config: RunConfig) -> list[str]:
    """What the user should know about an adapter that was trained over a quantised base; nothing of any other."""
    if config.model.quantization == "no":
        return []
    return [
        f"the adapter was trained over a base in {config.model.quantization} and goes into the whole one, with which "
        "its logits are others: evaluate the result, and calibrate it again"
    ]


def fold(model: SpanModel) -> Any:
    """The transformers model inside, with adapters, if it has any, added to its weights; `model` is spent."""
    inner: Any = model.model
    return inner.merge_and_unload(safe_merge=True) if hasattr(inner, "peft_config") else inner


def merge(config: RunConfig, adapter: str, tokenizer: Any, directory: Path) -> float:
    """Write the merged model and its tokenizer; returns the largest difference of a logit, as a share of the largest.

    Raises:
        UserError: The adapter or its base model cannot be loaded.
        CheckpointError: The merged model, read back, gives other logits than the adapter.
    """
    pads_left = tokenizer.padding_side == "left"
    with_adapter = load_plain(config, adapter, tokenizer_pads_left=pads_left)
    expected = _logits(with_adapter, len(tokenizer))
    with without_library_messages():
        fold(with_adapter).save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
    whole = dataclasses.replace(
        config, model=dataclasses.replace(ModelConfig(), tuning="full", model_name_or_path=str(directory))
    )
    read_back = _logits(load_plain(whole, str(directory), tokenizer_pads_left=pads_left), len(tokenizer))
    calibration = read_calibration(adapter)
    if calibration is not None and config.model.quantization == "no":
        # The logits are the same, and so is what suits them.
        calibration.write(directory)
    write_kept_options(adapter, directory)
    difference = float((read_back - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the merged model's logits differ from the adapter's by {difference:.1e} of the largest, more than "
            f"{TOLERANCE:.0e}; nothing was written - use the adapter as it is, with qa_dist.evaluate --adapter"
        )
    return difference


def write_kept_options(adapter: str, directory: Path) -> None:
    """Write `kept_options` beside a model that was made of an adapter, if that was made by a run."""
    kept = kept_options(adapter)
    if kept is not None:
        write_options(kept, directory / "config.yaml")


def kept_options(adapter: str) -> dict[str, Any] | None:
    """What readers of a merged model take from the options of its adapter's run; None where no run made it.

    These are lengths, decoding, the rules of scores, and whether "no answer" is a choice.
    """
    path = os.path.join(adapter, "config.yaml")
    if not os.path.isfile(path):
        return None
    of_run = read_run_options(path)
    names = ["max_seq_length", "doc_stride", "max_question_length"]
    names += [field.name for field in dataclasses.fields(EvaluationConfig) if field.name != "gather"]
    kept = {name: of_run[name] for name in names if of_run.get(name) is not None}
    allows = of_run.get("version_2_with_negative")
    if allows is None and was_evaluated_without_answers(adapter):
        allows = True
    # Where it is none, other data that the model is evaluated on decide, as they do for its adapter.
    return {**kept, "tuning": "full", "version_2_with_negative": allows}


def _logits(model: SpanModel, vocabulary: int) -> torch.Tensor:
    """Start and end logits of a few features of random tokens, float32 [2, T]; the same tokens at every call."""
    lengths = (7, 16, 12, 16)
    generator = torch.Generator().manual_seed(0)
    input_ids_T = torch.randint(vocabulary, (sum(lengths),), generator=generator)
    with torch.inference_mode():
        return torch.stack(model(input_ids_T, torch.zeros_like(input_ids_T), lengths))
