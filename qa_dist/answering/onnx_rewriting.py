"""An ONNX graph made ready for 8 bits: attention as one operation, and what products multiply at one level.

Dynamic quantisation gives all that a product multiplies one scale. A few channels of an encoder are ten times as large
as the others, so that these are left with a few of the 256 steps. Such channels are divided by a factor, and their rows
of the weight multiplied by it, which changes no product (SmoothQuant, Xiao et al. 2022, section 4; here for the few
large channels only, so that weights stay as they are elsewhere).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qa_dist.answering.exported import OUTPUTS
from qa_dist.answering.onnx_backend import open_session
from qa_dist.evaluation.candidates import Float32

LEVEL = 3.0
"""Channels are brought down to so many times the median of their largest values.

With the six-layer MiniLM, 240 questions of SQuAD dev and factors of 2, 3 and 4, logits differed from those in float32
by 0.148, 0.142 and 0.154 (root mean square), and without by 0.234.
"""

Batch = Mapping[str, npt.NDArray[np.int64]]


class Links:
    """Who makes and who uses the values of a graph.

    Attributes:
        constants: the graph's constants, by name.
    """

    def __init__(self, graph: Any) -> None:
        self.constants: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
        self._nodes = list(graph.node)
        self._makers: dict[str, Any] = {output: node for node in self._nodes for output in node.output}
        self._users: dict[str, list[Any]] = {}
        for node in self._nodes:
            for name in node.input:
                self._users.setdefault(name, []).append(node)

    def maker(self, name: str, op_type: str) -> Any | None:
        """The node of a type that makes a value; None: another one does, or none."""
        node = self._makers.get(name)
        return node if node is not None and node.op_type == op_type else None

    def user(self, node: Any, op_type: str) -> Any | None:
        """The one node of a type that uses what a node makes; None: there is another one, or there are more."""
        users = self._users.get(node.output[0], [])
        return users[0] if len(users) == 1 and users[0].op_type == op_type else None

    def products(self) -> dict[str, list[Any]]:
        """The products with a constant weight, by what they multiply; without the head: its weight has two columns."""
        found: dict[str, list[Any]] = {}
        for node in self._nodes:
            weight = self.constants.get(node.input[1]) if node.op_type == "MatMul" else None
            if weight is not None and len(weight.dims) == 2 and not is_of_head(weight):
                found.setdefault(node.input[0], []).append(node)
        return found


def is_of_head(weight: Any) -> bool:
    """Whether a constant is the head's weight, which has two columns, or two rows where it is turned."""
    return len(weight.dims) == 2 and 2 in weight.dims


class _Attention(NamedTuple):
    """The attention of a layer, as the exporter writes it.

    Attributes:
        inputs: names of query, key and value, each [B, L, H * D] of H heads.
        scale: what products of query and key are multiplied by.
        mask: name of what is added to them.
        last: the node whose result is the attention's.
    """

    inputs: tuple[str, str, str]
    scale: float
    mask: str
    last: Any


def fuse_attention(model: Any, num_heads: int) -> int:
    """Make each layer's attention one operation of onnxruntime, MultiHeadAttention; returns the number of layers.

    It is done for encoders whose scores have nothing added but one mask, the same in each layer; others stay as they
    are. That this mask says no more than `attention_mask` is not looked at: compare the logits.

    Args:
        model: The graph with its opset, as `onnx.load` gives it; changed in place.
        num_heads: Heads of each layer.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    links = Links(graph)
    found = [_attention(node, links) for node in graph.node if node.op_type == "Softmax"]
    layers = [attention for attention in found if attention is not None]
    if not layers or len(layers) < len(found) or len({layer.mask for layer in layers}) > 1:
        return 0
    last = {layer.last.output[0]: layer for layer in layers}
    nodes = [helper.make_node("Cast", ["attention_mask"], ["attention_mask_int32"], to=TensorProto.INT32)]
    for node in graph.node:
        layer = last.get(node.output[0])
        nodes.append(
            node
            if layer is None
            else helper.make_node(
                "MultiHeadAttention",
                [*layer.inputs, "", "attention_mask_int32"],
                list(node.output),
                domain="com.microsoft",
                name=f"attention_{len(nodes)}",
                num_heads=num_heads,
                scale=layer.scale,
                mask_filter_value=float(np.finfo(np.float32).min),
            )
        )
    _replace(graph, nodes)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return len(layers)


def _attention(softmax: Any, links: Links) -> _Attention | None:
    """The attention around a softmax; None: it is written in another way."""
    from onnx import numpy_helper

    masked = links.maker(softmax.input[0], "Add")
    scaled = links.maker(masked.input[0], "Mul") if masked else None
    scores = links.maker(scaled.input[0], "MatMul") if scaled else None
    mixed = links.user(softmax, "MatMul")
    back = links.user(mixed, "Transpose") if mixed else None
    last = links.user(back, "Reshape") if back else None
    if masked is None or scaled is None or scores is None or mixed is None or last is None:
        return None
    scale = links.constants.get(scaled.input[1])
    if scale is None or mixed.input[0] != softmax.output[0]:
        return None
    inputs = []
    for heads in (scores.input[0], scores.input[1], mixed.input[1]):
        transposed = links.maker(heads, "Transpose")
        reshaped = links.maker(transposed.input[0], "Reshape") if transposed else None
        if reshaped is None:
            return None
        inputs.append(reshaped.input[0])
    query, key, value = inputs
    return _Attention((query, key, value), float(numpy_helper.to_array(scale)), masked.input[1], last)


def _replace(graph: Any, nodes: Sequence[Any]) -> None:
    """Give a graph other nodes, in an order that can be computed; those, and constants, that nothing uses go."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    for field, content in ((graph.node, kept[::-1]), (graph.initializer, constants)):
        del field[:]
        field.extend(content)


class Observed(NamedTuple):
    """What a graph gave on some questions.

    Attributes:
        logits: start and end logits of all real tokens, float32 [2, T].
        largest: the largest absolute value of each channel, float32 [channels], by the name of what has the channels.
    """

    logits: Float32
    largest: dict[str, Float32]


def observed(path: Path, names: Sequence[str], batches: Sequence[Batch]) -> Observed:
    """Run a graph that gives logits and, behind them, what its products multiply.

    Args:
        path: The graph, with `names` among its outputs.
        names: What to look at, each float32 [..., channels].
        batches: The graph's inputs, `attention_mask` among them: what stands at padding is not looked at.
    """
    session = open_session(path)
    logits: list[Float32] = []
    largest: dict[str, Float32] = {}
    for batch in batches:
        is_real_BL = batch["attention_mask"].astype(bool)
        results = session.run([*OUTPUTS, *names], dict(batch))
        logits.append(np.stack([result[is_real_BL] for result in results[: len(OUTPUTS)]]))
        for name, result in zip(names, results[len(OUTPUTS) :], strict=True):
            # Not all that is multiplied belongs to a token: there are products of tables of positions.
            of_tokens = result.ndim == 3 and result.shape[:2] == is_real_BL.shape
            rows = result[is_real_BL] if of_tokens else result.reshape(-1, result.shape[-1])
            channels = np.abs(rows).max(axis=0)
            largest[name] = np.maximum(largest.get(name, channels), channels)
    return Observed(np.concatenate(logits, axis=1), largest)


def level_channels(model: Any, largest: Mapping[str, Float32]) -> Counter[str]:
    """Divide the few large channels of what products multiply, and multiply their rows of the weights.

    Args:
        model: The graph; changed in place. Its products stay what they were, to the precision of float32.
        largest: The largest absolute value of each channel, by the name of what has the channels.

    Returns:
        How many channels were brought down, by the name of what has them.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    links = Links(graph)
    levels: dict[str, Any] = {}
    changed: Counter[str] = Counter()
    for name, products in links.products().items():
        level = LEVEL * float(np.median(largest[name]))
        factors = np.maximum(largest[name] / level, 1).astype(np.float32) if level > 0 else np.ones(1, np.float32)
        if factors.max() == 1:
            continue
        changed[name] = int((factors > 1).sum())
        leveled, divisors = f"{name}_leveled", f"{name}_factors"
        constants = {divisors: 1 / factors}
        levels[products[0].output[0]] = helper.make_node("Mul", [name, divisors], [leveled], name=f"{name}_level")
        for product in products:
            weight = numpy_helper.to_array(links.constants[product.input[1]])
            product.input[0], product.input[1] = leveled, f"{product.input[1]}_for_{leveled}"
            constants[product.input[1]] = weight * factors[:, None]
        graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in constants.items())
    _replace(graph, [made for node in graph.node for made in (levels.get(node.output[0]), node) if made is not None])
    return changed
