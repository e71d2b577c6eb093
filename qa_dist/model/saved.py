"""Weights on disk: written whole or not at all, and read back before success is reported."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qa_dist.common.errors import CheckpointError
from qa_dist.common.files import staged_files
from qa_dist.common.libraries import reason
from qa_dist.config.options import ModelConfig, RunConfig
from qa_dist.model.adapters import is_idle_bias
from qa_dist.model.building import CPU, load_base
from qa_dist.model.loading import library_errors, without_library_messages
from qa_dist.model.pretrained import ADAPTER_WEIGHTS, check_adapter
from qa_dist.model.residual_stream import set_residual_dtype
from qa_dist.model.span_model import (
    SpanModel,
    Weights,
)


def save_trained(model: SpanModel, trained: Weights, tokenizer: Any, directory: Path) -> list[Path]:
    """Write the adapter (or, after full fine-tuning, the model) and the tokenizer into `directory`.

    The adapter is in peft's format, head included. Everything is written beside the directory first and compared with
    the tensors in memory; then the files are moved in, the weights last.

    Args:
        model: The model; its tensors may be shared out among the ranks.
        trained: The trainable tensors, whole, as `Engine.weights` gives them.
        tokenizer: The tokenizer.
        directory: Where the files go.

    Returns:
        The files, in the order in which they were put in place.

    Raises:
        CheckpointError: A tensor is empty or not finite, or what was read back is not what was written.
    """
    with staged_files(directory, order=_weights_last) as aside:
        weights = _write(model, trained, aside)
        _save_tokenizer(tokenizer, aside)
        require_written(weights, aside)
        names = [path.name for path in sorted(aside.iterdir(), key=_weights_last)]
    return [directory / name for name in names]


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer.

    Raises:
        OSError: The file system refuses it, which `tokenizers` says by an exception of no type of its own.
    """
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:
        if type(error) is Exception and "(os error" in str(error):
            raise OSError(str(error)) from error
        raise


def _weights_last(path: Path) -> tuple[bool, str]:
    return path.suffix == ".safetensors", path.name


def _write(model: SpanModel, trained: Weights, directory: Path) -> Weights:
    """The tensors, whole and on the CPU, that peft or transformers has written into `directory`, by their names there.

    Raises:
        CheckpointError: There are none, or one is empty or not finite.
    """
    inner: Any = model.model
    extra: dict[str, Any]
    if hasattr(inner, "peft_config"):
        from peft import get_peft_model_state_dict

        weights: Weights = get_peft_model_state_dict(inner, state_dict=trained, save_embedding_layers=False)
        extra = {"state_dict": trained, "save_embedding_layers": False}
    else:
        buffers = {name for name, _ in inner.named_buffers()}
        kept = {name: tensor for name, tensor in inner.state_dict().items() if name in buffers}
        weights = {**trained, **kept}
        extra = {"state_dict": weights}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if not weights:
        raise CheckpointError("there is nothing to save: no tensor is trained; check --tuning")
    for name, tensor in weights.items():
        if not tensor.numel():
            raise CheckpointError(f"{name} is empty and was not saved; the strategy keeps it on other ranks")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} holds values that are not finite and was not saved")
    with _without_card(inner), without_library_messages():
        inner.save_pretrained(str(directory), **extra)
    return weights


@contextmanager
def _without_card(inner: Any) -> Iterator[None]:
    """Context in which peft writes no card: its card is an empty form, whose template takes longer than weights."""
    inner.create_or_update_model_card = lambda directory: None
    try:
        yield
    finally:
        del inner.create_or_update_model_card


def require_written(written: Weights, directory: Path) -> None:
    """Read the weights in a folder back, and make sure that they are those that were written.

    Raises:
        CheckpointError: One is missing or different; the message names it.
    """
    from safetensors.torch import load_file

    read_back: Weights = {}
    for path in directory.glob("*.safetensors"):
        read_back.update(load_file(path))
    # Tied tensors are written once, under one of their names.
    missing = [
        name for name, tensor in written.items() if name not in read_back and not _is_among(tensor, read_back.values())
    ]
    differing = [
        name for name, tensor in read_back.items() if name in written and not torch.equal(written[name], tensor)
    ]
    if missing or differing:
        raise CheckpointError(
            f"the weights read back from {directory} are not those written: "
            f"{len(missing)} missing, {len(differing)} different, as {(missing + differing)[0]}; check the disk"
        )


def _is_among(tensor: torch.Tensor, tensors: Iterable[torch.Tensor]) -> bool:
    return any(torch.equal(tensor, other) for other in tensors if other.shape == tensor.shape)


def require_kept_base(config: ModelConfig, directory: str) -> None:
    """Make sure that what the adapter in a folder was trained on, if it is one, can be loaded again.

    Args:
        config: How it was trained.
        directory: The folder.

    Raises:
        CheckpointError: Its base model had random weights.
    """
    if config.model_config is not None and config.tuning == "lora":
        raise CheckpointError(
            f"the adapter in {directory} belongs to random weights (--model_config), which are not kept; train on a "
            "checkpoint to use the result"
        )


def load_trained(
    config: ModelConfig,
    directory: str,
    *,
    max_seq_length: int,
    tokenizer_pads_left: bool,
    device: torch.device = CPU,
    fold: bool = False,
) -> SpanModel:
    """The model that a run saved into `directory`: its adapter on the base model, or the whole model.

    Args:
        config: How it was trained.
        directory: The folder; of a whole model also any other name that one has.
        max_seq_length: Tokens of its longest feature.
        tokenizer_pads_left: On which side its tokenizer pads.
        device: Where it will compute.
        fold: Whether an adapter becomes part of the base model's weights, which saves its products in every pass.
            Over quantised weights, which would be rounded anew, it stays beside them all the same.

    Raises:
        UserError: The directory holds no such model, or the base model cannot be loaded.
    """
    require_kept_base(config, directory)
    config = dataclasses.replace(config, model_config=None)
    with library_errors(lambda error: _not_loaded(directory, error)):
        if config.tuning == "full":
            base = load_base(config, directory, max_seq_length, device)
            model, random = base.model, base.newly_initialized
        else:
            from peft import PeftModel

            check_adapter(directory)
            base = load_base(config, config.model_name_or_path, max_seq_length, device)
            with without_library_messages():
                _fit_embedding(base.model, Path(directory) / ADAPTER_WEIGHTS)
                # Left alone, every process would bring the adapter to GPU 0 first.
                model = PeftModel.from_pretrained(base.model, directory, torch_device="cpu")
            random = unfilled(model, base.newly_initialized, Path(directory) / ADAPTER_WEIGHTS)
            if fold and config.quantization == "no":
                model = model.merge_and_unload(safe_merge=True)
    if random:
        named = f"{', '.join(random[:3])}{' and others' if len(random) > 3 else ''}"
        raise CheckpointError(f"{directory} lacks {named}, which would be random; give a folder that training wrote")
    return SpanModel(
        model,
        padding=base.padding,
        max_seq_length=max_seq_length,
        tokenizer_pads_left=tokenizer_pads_left,
        notes=base.notes,
    ).eval()


def load_as_trained(
    config: RunConfig, directory: str, tokenizer: Any, device: torch.device, *, fold: bool = False
) -> SpanModel:
    """The model that a run saved into `directory`, on a device, with norms and residuals in the run's type.

    Args:
        config: The run's.
        directory: As for `load_trained`.
        tokenizer: Its tokenizer.
        device: Where it computes.
        fold: Whether an adapter becomes part of the base model's weights.

    Raises:
        UserError: As for `load_trained`.
    """
    model = load_trained(
        config.model,
        directory,
        max_seq_length=config.data.max_seq_length,
        tokenizer_pads_left=tokenizer.padding_side == "left",
        device=device,
        fold=fold,
    ).to(device)
    # It shows in products of bfloat16 alone.
    set_residual_dtype(model, config.training.residual_dtype)
    return model


def _fit_embedding(model: Any, weights: Path) -> None:
    """Give the base model as many embeddings as the adapter's file has: its tokenizer may know added tokens."""
    from safetensors import safe_open

    embedding = model.get_input_embeddings()
    name = next((name for name, part in model.named_modules() if part is embedding), None)
    with safe_open(weights, framework="pt") as file:
        for stored in file.keys():  # noqa: SIM118 - it is no mapping
            if stored == f"base_model.model.{name}.weight":
                rows = file.get_slice(stored).get_shape()[0]
                if rows != embedding.weight.shape[0]:
                    model.resize_token_embeddings(rows, mean_resizing=False)


def _not_loaded(directory: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the model in {directory} cannot be loaded ({reason(error)}); give a folder that training wrote"
    )


def unfilled(model: Any, newly_initialized: Sequence[str], weights: Path) -> list[str]:
    """Tensors of a peft model that its adapter's file should hold and does not: adapters and heads.

    Args:
        model: The model with the adapter.
        newly_initialized: Names of parameters that the base model's checkpoint left random.
        weights: The adapter's file.

    Raises:
        CheckpointError: The file holds tensors that the model has no place for.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        stored = set(file.keys())
    expected = {
        name for name in get_peft_model_state_dict(model, save_embedding_layers=False) if not is_idle_bias(name)
    }
    strange = sorted(stored - expected - set(model.state_dict()))
    if strange:
        raise CheckpointError(
            f"{weights} holds {strange[0]}, for which the model has no place; give the adapter the base model that it "
            "was trained on"
        )
    filled = {name.removeprefix("base_model.model.") for name in stored}
    return sorted(expected - stored) + sorted(name for name in newly_initialized if name not in filled)
