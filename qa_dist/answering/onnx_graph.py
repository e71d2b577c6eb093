"""A model as an ONNX graph: made by torch's exporter, and its weights rounded to 8 bits by onnxruntime."""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qa_dist.answering.exported import INPUTS, OUTPUTS
from qa_dist.answering.onnx_rewriting import (
    Batch,
    Links,
    Observed,
    fuse_attention,
    is_of_head,
    level_channels,
    observed,
    round_embeddings,
    scale_rows,
)
from qa_dist.answering.weight_rounding import SEEN_ROWS, best_columns, best_factors, compensation, rounded
from qa_dist.common.arrays import Float32, Int8
from qa_dist.common.errors import ConfigError
from qa_dist.common.libraries import reason

TOLERANCE = 1e-4
"""Largest difference between the logits of a model and of its graph, as a share of the largest logit."""

_AXES = {0: "batch_size", 1: "sequence_length"}
"""Names that optimum gives the axes of inputs and outputs, all of which are free."""

_LARGEST_FILE = 1_900_000_000
"""Bytes of weights up to which one file holds the whole model; protobuf takes no more than 2 GiB."""


_MOMENTS_BYTES = 1 << 30
"""Bytes of what is kept of channels at a time; a model of which that is more is run several times."""


class _Logits(nn.Module):
    """A question-answering model that takes tensors and gives tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **extra)
        return output.start_logits.float(), output.end_logits.float()


def write_graph(model: Any, inputs: Sequence[str], pad_token_id: int, path: Path) -> None:
    """Write a question-answering model of transformers, in evaluation mode, as ONNX.

    Args:
        model: The model, without adapters; its attention is transformers' plainest one afterwards.
        inputs: Those of `INPUTS` that it reads.
        pad_token_id: The token that its batches are padded with.
        path: The file. Where the weights are too many for one, there is a second one beside it.

    Raises:
        ConfigError: The exporter cannot do it.
    """
    # Any tokens will do, but more than one feature and one of them padded: sizes of 1 would be taken for fixed ones.
    mask_BL = torch.ones(2, 9, dtype=torch.long)
    mask_BL[1, 6:] = 0
    ids_BL = torch.arange(18).view(2, 9).remainder(5).where(mask_BL.bool(), torch.tensor(pad_token_id))
    example = dict(zip(INPUTS, (ids_BL, mask_BL, torch.zeros_like(ids_BL)), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    try:
        with _without_messages():
            # Products and a softmax. torch's own attention becomes these too, with a look for NaN in each layer.
            model.set_attn_implementation("eager")
            program = torch.onnx.export(
                _Logits(model).eval(),
                kwargs={name: example[name] for name in inputs},
                dynamo=True,
                dynamic_shapes=dict.fromkeys(inputs, _AXES),
                input_names=list(inputs),
                output_names=list(OUTPUTS),
                verbose=False,
            )
            assert program is not None
            program.save(path, external_data=num_bytes > _LARGEST_FILE)
    except Exception as error:  # the exporter raises a dozen unrelated types for what it cannot do
        raise ConfigError(
            [f"torch {torch.__version__} cannot write this {type(model).__name__} as ONNX ({reason(error)})"]
        ) from error


def write_fused(path: Path, num_heads: int | None, batches: Sequence[Batch]) -> None:
    """Make the attention of a graph in a file one operation of onnxruntime's own.

    Args:
        path: The graph in float32.
        num_heads: Heads of each layer; None: of other numbers, or unknown.
        batches: Inputs to compare logits on.

    Raises:
        ConfigError: Its attention cannot be written so.
    """
    with _without_messages(), tempfile.TemporaryDirectory(dir=path.parent) as name:
        fused = _fused(path, num_heads, Path(name), batches)
        if fused is None:
            raise ConfigError(
                [
                    "the attention of this encoder is more than products, a scale, one mask and a softmax, so that no "
                    "operation of onnxruntime computes it; leave out --fuse_attention"
                ]
            )
        _remove(path)
        _save(fused, path)


def _fused(source: Path, num_heads: int | None, folder: Path, batches: Sequence[Batch]) -> Any | None:
    """A graph with its attention as one operation; None where it cannot be written so, or gives other logits.

    Whether the mask of an encoder is that of the padding alone, its graph does not say; its logits do.
    """
    import onnx

    fused: Any = onnx.load(str(source))
    if not num_heads or not fuse_attention(fused, num_heads):
        return None
    plain, other = (_observed(graph, (), folder, batches).logits for graph in (onnx.load(str(source)), fused))
    return fused if _is_close(other, plain) else None


def write_quantized(source: Path, target: Path, num_heads: int | None, batches: Sequence[Batch]) -> None:
    """Write a graph with the weights of its matrix products and embeddings as integers of 8 bits.

    The head stays as it is: it has two columns, and every error in it is one of the logits. Products have a scale for
    each column of weights, embeddings one for each row. What products multiply is rounded while they run, to 8 bits
    with a scale for each product (onnxruntime's dynamic quantisation), after each row was divided by its largest value;
    large channels of it are brought down where that makes the products more exact. Attention is onnxruntime's own
    operation, where the encoder's can be written so.

    Args:
        source: The graph in float32.
        target: The file to write.
        num_heads: Heads of each layer; None: of other numbers, or unknown.
        batches: Inputs to look at what products multiply with, and to compare logits on.
    """
    import onnx

    with _without_messages(), tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        fused = _fused(source, num_heads, folder, batches)
        model: Any = onnx.load(str(source)) if fused is None else fused
        weights = _rounded_weights(model, folder, batches)
        scale_rows(model)
        round_embeddings(model)
        _quantize(model, weights, target, folder)


def _rounded_weights(model: Any, folder: Path, batches: Sequence[Batch]) -> dict[str, tuple[Int8, Float32]]:
    """The weights of a graph's products as integers, and the scales of their columns, by their names.

    Args:
        model: The graph; large channels of what products multiply are brought down in place.
        folder: Where it can be written for a while.
        batches: As `write_quantized` takes them.
    """
    from onnx import numpy_helper

    links = Links(model.graph)
    products = links.products()
    found: dict[str, tuple[Int8, Float32]] = {}
    for names in _groups({name: links.constants[made[0].input[1]].dims[0] for name, made in products.items()}):
        channels = _observed(model, names, folder, batches).channels
        factors = {}
        for name in names:
            weights = [numpy_helper.to_array(links.constants[product.input[1]]) for product in products[name]]
            factors[name] = best_factors(weights, channels[name])
        renamed = level_channels(model, factors)
        links = Links(model.graph)
        leveled = links.products()
        for name in names:
            moments = channels[name].moments / np.outer(factors[name], factors[name])
            factor, squares = compensation(moments), np.diag(moments).astype(np.float32)
            for product in leveled[renamed.get(name, name)]:
                weight = numpy_helper.to_array(links.constants[product.input[1]])
                scales = best_columns(weight, squares).scales
                # What one input of a weight takes back would harm another one.
                is_shared = links.num_users(product.input[1]) > 1
                values = rounded(weight, scales, np.eye(len(weight), dtype=np.float32) if is_shared else factor)
                found[product.input[1]] = values, scales
    return found


def _quantize(model: Any, weights: Mapping[str, tuple[Int8, Float32]], target: Path, folder: Path) -> None:
    """Write a graph with such integers for the weights of its products, with the scales of their columns."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / "as_it_is.onnx"
    _save(model, path)
    quantize_dynamic(
        path,
        target,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=_head_nodes(model.graph),
        # What comes behind an operation of onnxruntime's own has no type to onnx, which does not know it.
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    _remove(path)
    written: Any = onnx.load(str(target))
    made = {tensor.name: tensor for tensor in written.graph.initializer}
    for name, (values, scales) in weights.items():
        # The names are onnxruntime's, which rounds each weight by itself, to 7 bits.
        for tensor, content in ((made[f"{name}_quantized"], values), (made[f"{name}_scale"], scales)):
            tensor.CopyFrom(onnx.numpy_helper.from_array(content, tensor.name))
    onnx.save(written, str(target))


def _groups(num_channels: Mapping[str, int]) -> list[list[str]]:
    """Names in groups of whose channels `_MOMENTS_BYTES` at most are kept, or one of which that is more."""
    groups: list[list[str]] = []
    size = 0
    for name, number in num_channels.items():
        # The products of any two channels, and some rows.
        bytes_of = 8 * number**2 + 4 * SEEN_ROWS * number
        if not groups or size + bytes_of > _MOMENTS_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_of
    return groups


def _observed(model: Any, names: Sequence[str], folder: Path, batches: Sequence[Batch]) -> Observed:
    """What a graph gives; it is written to a folder and taken away again."""
    import onnx

    # Outputs for a while: weights are too many to copy the model for it.
    outputs = model.graph.output
    outputs.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    path = folder / "watched.onnx"
    _save(model, path)
    del outputs[len(OUTPUTS) :]
    found = observed(path, names, batches)
    _remove(path)
    return found


def _is_close(logits: Float32, expected: Float32) -> bool:
    """Whether logits are the same but for the order of sums."""
    return bool(np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max())


def _save(model: Any, path: Path) -> None:
    """Write a graph, with its weights in a second file where they are too many for one; it keeps them."""
    import onnx

    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _LARGEST_FILE
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}.data" if large else None)
    if large:
        # The library moves the weights out of the model that it is given.
        onnx.load_external_data_for_model(model, str(path.parent))


def _remove(path: Path) -> None:
    """Take away a graph, and its weights where they are in a second file."""
    for file in (path, path.with_name(f"{path.name}.data")):
        file.unlink(missing_ok=True)


def _head_nodes(graph: Any) -> list[str]:
    """Names of the products with a weight of two columns: the start and the end logit."""
    two_columns = {tensor.name for tensor in graph.initializer if is_of_head(tensor)}
    return [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and two_columns & set(node.input)]


@contextlib.contextmanager
def _without_messages() -> Iterator[None]:
    """Context without what the libraries warn and log of themselves; what goes wrong, they raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
