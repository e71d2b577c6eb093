"""An ONNX graph made faster, and ready for 8 bits: attention as one operation, what products multiply at one level.

Dynamic quantisation gives all that a product multiplies one scale. A few channels of an encoder are ten times as large
as the others, so that these are left with a few of the 256 steps. Such channels are divided by a factor, and their rows
of the weight multiplied by it, which changes no product (SmoothQuant, Xiao et al. 2022, section 4; here for the few
large channels only, so that weights stay as they are elsewhere).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qa_dist.answering.exported import OUTPUTS
from qa_dist.answering.onnx_sessions import Sessions
from qa_dist.answering.weight_rounding import LARGEST, Channels
from qa_dist.common.arrays import Float32

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
            for name in used_by(node):
                self._users.setdefault(name, []).append(node)

    def maker(self, name: str, op_type: str) -> Any | None:
        """The node of a type that makes a value; None: another one does, or none."""
        node = self._makers.get(name)
        return node if node is not None and node.op_type == op_type else None

    def user(self, node: Any, op_type: str) -> Any | None:
        """The one node of a type that uses what a node makes; None: there is another one, or there are more."""
        users = self._users.get(node.output[0], [])
        return users[0] if len(users) == 1 and users[0].op_type == op_type else None

    def without_addend(self, name: str) -> tuple[str, Float32] | None:
        """What a constant vector is added to, which makes a value, and that vector; None: it is made otherwise."""
        from onnx import numpy_helper

        added = self.maker(name, "Add")
        for other, constant in (added.input, reversed(added.input)) if added else ():
            tensor = self.constants.get(constant)
            if tensor is not None and len(tensor.dims) == 1:
                return other, numpy_helper.to_array(tensor)
        return None

    def num_users(self, name: str) -> int:
        """How many nodes use a value."""
        return len(self._users.get(name, ()))

    def products(self) -> dict[str, list[Any]]:
        """The products with a constant weight, by what they multiply; without the head: its weight has two columns."""
        found: dict[str, list[Any]] = {}
        for node in self._nodes:
            weight = self.constants.get(node.input[1]) if node.op_type == "MatMul" else None
            if weight is not None and len(weight.dims) == 2 and not is_of_head(weight):
                found.setdefault(node.input[0], []).append(node)
        return found


def used_by(node: Any) -> list[str]:
    """Names of what a node uses, in its branches too, where it is an If."""
    inner = [name for attribute in node.attribute for part in attribute.g.node for name in used_by(part)]
    return [name for name in [*node.input, *inner] if name]


def is_of_head(weight: Any) -> bool:
    """Whether a constant is the head's weight, which has two columns, or two rows where it is turned."""
    return len(weight.dims) == 2 and 2 in weight.dims


class _Attention(NamedTuple):
    """The attention of a layer, as the exporter writes it.

    Attributes:
        inputs: names of query, key and value, each [B, L, H * D] of H heads.
        biases: what is to be added to them, float32 [3 * H * D]; None: nothing.
        scale: what products of query and key are multiplied by.
        mask: name of what is added to them.
        last: the node whose result is the attention's.
    """

    inputs: tuple[str, str, str]
    biases: Float32 | None
    scale: float
    mask: str
    last: Any


def fuse_attention(model: Any, num_heads: int) -> int:
    """Make each layer's attention, with its biases, one operation of onnxruntime; returns the number of layers.

    It is done for encoders whose scores have nothing added but one mask, the same in each layer; others stay as they
    are. That this mask says no more than `attention_mask` is not looked at: compare the logits.

    Args:
        model: The graph with its opset, as `onnx.load` gives it; changed in place.
        num_heads: Heads of each layer.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    links = Links(graph)
    found = [_attention(node, links) for node in graph.node if node.op_type == "Softmax"]
    layers = [attention for attention in found if attention is not None]
    if not layers or len(layers) < len(found) or len({layer.mask for layer in layers}) > 1:
        return 0
    last = {layer.last.output[0]: layer for layer in layers}
    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["attention_mask_int32"], to=TensorProto.INT32),
        helper.make_node("ReduceMin", ["attention_mask_int32"], ["least_attention_mask"], keepdims=0),
        helper.make_node("Cast", ["least_attention_mask"], ["is_without_padding"], to=TensorProto.BOOL),
    ]
    for node in graph.node:
        layer = last.get(node.output[0])
        if layer is not None and layer.biases is not None:
            graph.initializer.append(numpy_helper.from_array(layer.biases, _biases_of(node.output[0])))
        nodes.append(node if layer is None else _one_operation(layer, node.output[0], num_heads))
    _replace(graph, nodes)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return len(layers)


def _biases_of(result: str) -> str:
    """Name of the biases of the attention that has this result."""
    return f"{result}_biases"


def _one_operation(layer: _Attention, result: str, num_heads: int) -> Any:
    """The attention of a layer as onnxruntime's operation, without a mask where there is no padding.

    Without a mask it goes through the scores in blocks that stay in the caches: 12 heads of 32 channels took 1.1 ms
    for 180 tokens in the place of 1.3, and 3.1 ms for three times 170 in the place of 4.1 (onnxruntime 1.32, AVX2).
    """
    from onnx import TensorProto, helper

    branches = {}
    biases = "" if layer.biases is None else _biases_of(result)
    for branch, mask in (("then_branch", []), ("else_branch", ["attention_mask_int32"])):
        made = f"{result}_{branch}"
        node = helper.make_node(
            "MultiHeadAttention",
            [*layer.inputs, biases, *mask],
            [made],
            domain="com.microsoft",
            name=f"{made}_attention",
            num_heads=num_heads,
            scale=layer.scale,
            mask_filter_value=float(np.finfo(np.float32).min),
        )
        value = helper.make_tensor_value_info(made, TensorProto.FLOAT, None)
        branches[branch] = helper.make_graph([node], branch, [], [value])
    return helper.make_node("If", ["is_without_padding"], [result], name=f"{result}_attention", **branches)


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
    biases = None
    split = [pair for name in inputs if (pair := links.without_addend(name)) is not None]
    if len(split) == len(inputs):
        inputs = [name for name, _ in split]
        biases = np.concatenate([vector for _, vector in split])
    query, key, value = inputs
    return _Attention((query, key, value), biases, float(numpy_helper.to_array(scale)), masked.input[1], last)


def _replace(graph: Any, nodes: Sequence[Any]) -> None:
    """Give a graph other nodes, in an order that can be computed; those, and constants, that nothing uses go."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(used_by(node))
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    for field, content in ((graph.node, kept[::-1]), (graph.initializer, constants)):
        del field[:]
        field.extend(content)


def _insert(graph: Any, before: Mapping[str, Sequence[Any]], behind: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Put nodes right before and behind those whose first results have these names."""
    nodes = [
        made
        for node in graph.node
        for made in (*before.get(node.output[0], ()), node, *(behind or {}).get(node.output[0], ()))
    ]
    _replace(graph, nodes)


class Observed(NamedTuple):
    """What a graph gave on some questions.

    Attributes:
        logits: start and end logits of all real tokens, float32 [2, T].
        channels: of what was looked at, by its name.
    """

    logits: Float32
    channels: dict[str, Channels]


def observed(path: Path, names: Sequence[str], batches: Sequence[Batch]) -> Observed:
    """Run a graph that gives logits and, behind them, what its products multiply.

    Args:
        path: The graph, with `names` among its outputs.
        names: What to look at, each float32 [..., channels].
        batches: The graph's inputs, `attention_mask` among them: what stands at padding is not looked at.
    """
    session = Sessions(path).one()
    logits: list[Float32] = []
    found: dict[str, Channels] = {}
    for batch in batches:
        is_real_BL = batch["attention_mask"].astype(bool)
        results = session.run([*OUTPUTS, *names], dict(batch))
        logits.append(np.stack([result[is_real_BL] for result in results[: len(OUTPUTS)]]))
        for name, result in zip(names, results[len(OUTPUTS) :], strict=True):
            # Not all that is multiplied belongs to a token: there are products of tables of positions.
            of_tokens = result.ndim == 3 and result.shape[:2] == is_real_BL.shape
            rows = result[is_real_BL] if of_tokens else result.reshape(-1, result.shape[-1])
            found.setdefault(name, Channels(rows.shape[1])).add(rows)
    return Observed(np.concatenate(logits, axis=1), found)


def level_channels(model: Any, factors: Mapping[str, Float32]) -> dict[str, str]:
    """Divide channels of what products multiply by factors, and multiply their rows of the weights by them.

    Args:
        model: The graph; changed in place. Its products stay what they were, to the precision of float32.
        factors: Of each channel, float32 [channels], by the name of what has the channels.

    Returns:
        What is multiplied now in the place of what was named.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    links = Links(graph)
    levels: dict[str, list[Any]] = {}
    renamed: dict[str, str] = {}
    for name, products in links.products().items():
        if name not in factors or np.all(factors[name] == 1):
            continue
        leveled, divisors = f"{name}_leveled", f"{name}_factors"
        renamed[name] = leveled
        constants = {divisors: 1 / factors[name]}
        levels[products[0].output[0]] = [helper.make_node("Mul", [name, divisors], [leveled], name=f"{name}_level")]
        for product in products:
            weight = numpy_helper.to_array(links.constants[product.input[1]])
            product.input[0], product.input[1] = leveled, f"{product.input[1]}_for_{leveled}"
            constants[product.input[1]] = weight * factors[name][:, None]
        graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in constants.items())
    _insert(graph, levels)
    return renamed


def scale_rows(model: Any) -> None:
    """Divide each row of what products multiply by its largest absolute value, and the products' rows back again.

    All rows of it share one scale when it is rounded, and those of one token may be many times those of another.

    Args:
        model: The graph; changed in place. Its products stay what they were, to the precision of float32.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    axis, least = "rows_axis", "rows_least"
    constants = {axis: np.array([-1], np.int64), least: np.array(np.finfo(np.float32).tiny, np.float32)}
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    before: dict[str, list[Any]] = {}
    behind: dict[str, list[Any]] = {}
    for name, products in Links(graph).products().items():
        sizes, peaks, largest, divided = (f"{name}_{what}" for what in ("sizes", "peaks", "largest", "divided"))
        for product in products:
            result = product.output[0]
            product.input[0], product.output[0] = divided, f"{result}_divided"
            behind[product.output[0]] = [
                helper.make_node("Mul", [product.output[0], largest], [result], name=f"{result}_rows")
            ]
        before[products[0].output[0]] = [
            helper.make_node("Abs", [name], [sizes], name=sizes),
            helper.make_node("ReduceMax", [sizes, axis], [peaks], name=peaks, keepdims=1),
            # A row of zeros stays one.
            helper.make_node("Max", [peaks, least], [largest], name=largest),
            helper.make_node("Div", [name, largest], [divided], name=divided),
        ]
    _insert(graph, before, behind)


def round_embeddings(model: Any) -> int:
    """Make the tables of embeddings integers of 8 bits with a scale for each row; returns how many.

    Rows of unlike size do not share a scale, as they would in onnxruntime's own quantisation of such a table.

    Args:
        model: The graph; changed in place.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    tables = {tensor.name: tensor for tensor in graph.initializer if _is_table(tensor)}
    nodes: list[Any] = []
    done = set()
    for node in graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or any(attribute.name == "axis" and attribute.i for attribute in node.attribute):
            nodes.append(node)
            continue
        name, made = table.name, node.output[0]
        if name not in done:
            rows = numpy_helper.to_array(table)
            scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(LARGEST)
            scales[scales == 0] = 1
            arrays = {f"{name}_rounded": np.rint(rows / scales).astype(np.int8), f"{name}_scales": scales}
            graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in arrays.items())
            done.add(name)
        values, scale = f"{made}_values", f"{made}_scale"
        nodes += [
            helper.make_node("Gather", [f"{name}_rounded", node.input[1]], [values], name=values),
            helper.make_node("Gather", [f"{name}_scales", node.input[1]], [scale], name=scale),
            helper.make_node("Cast", [values], [f"{values}_float"], name=f"{values}_float", to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{values}_float", scale], [made], name=f"{made}_scaled"),
        ]
    _replace(graph, nodes)
    return len(done)


def _is_table(tensor: Any) -> bool:
    """Whether a constant is rows of numbers."""
    from onnx import TensorProto

    return len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT
