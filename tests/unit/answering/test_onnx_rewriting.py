"""Graphs before they are rounded to 8 bits: other operations, the same logits."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qa_dist.answering.exported import OUTPUTS
from qa_dist.answering.onnx_graph import write_fused, write_quantized
from qa_dist.answering.onnx_rewriting import (
    Links,
    fuse_attention,
    level_channels,
    observed,
    round_embeddings,
    scale_rows,
)
from qa_dist.common.errors import ConfigError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

HIDDEN, HEADS, TOKENS = 16, 2, 11


def encoder(*, sees: int = TOKENS, adds_twice: bool = False, large: int = 7, row: float = 1.0, biases: str = "") -> Any:
    """A layer of attention as torch's exporter writes it, on embeddings of which one channel is large.

    Args:
        sees: How far a token attends; a mask says so that no input can tell.
        adds_twice: Whether positions add to the scores, beside the mask.
        large: The channel that is 40 times as large as the others.
        row: What its rows of the weights are multiplied by.
        biases: Of these of query, key and value, a vector is added to the product.
    """
    numbers = np.random.default_rng(5)
    channels = np.ones(HIDDEN, np.float32)
    channels[large] = 40
    far = np.abs(np.arange(TOKENS)[:, None] - np.arange(TOKENS)) >= sees
    constants: dict[str, Any] = {
        "embeddings": numbers.normal(size=(30, HIDDEN)).astype(np.float32),
        "channels": channels,
        "far": np.where(far, np.float32(-1e30), np.float32(0))[None, None],
        "heads": np.array([0, TOKENS, HEADS, HIDDEN // HEADS]),
        "whole": np.array([0, TOKENS, HIDDEN]),
        "scale": np.float32((HIDDEN // HEADS) ** -0.5),
        "one": np.float32(1),
        "lowest": np.float32(-1e30),
        "axes": np.array([1, 2]),
        "start": np.array(0),
        "end": np.array(1),
        **{name: (numbers.normal(size=(HIDDEN, HIDDEN)) / 8).astype(np.float32) for name in ("q", "k", "v", "out")},
        "head": numbers.normal(size=(HIDDEN, 2)).astype(np.float32),
    }
    for name in ("q", "k", "v"):
        constants[name][large] *= row
    constants |= {f"{name}_bias": numbers.normal(size=HIDDEN).astype(np.float32) for name in biases}
    node = onnx.helper.make_node
    nodes = [
        node("Gather", ["embeddings", "input_ids"], ["alike"]),
        node("Mul", ["alike", "channels"], ["x"]),
        node("Cast", ["attention_mask"], ["real"], to=onnx.TensorProto.FLOAT),
        node("Sub", ["one", "real"], ["padded"]),
        node("Mul", ["padded", "lowest"], ["hidden"]),
        node("Unsqueeze", ["hidden", "axes"], ["padding"]),
        node("Add", ["padding", "far"], ["mask"]),
    ]
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            node("MatMul", ["x", name], [f"{name}_whole"]),
            *([node("Add", _in_any_order(f"{name}_whole", f"{name}_bias"), [f"{name}_sum"])] if name in biases else []),
            node("Reshape", [f"{name}_sum" if name in biases else f"{name}_whole", "heads"], [f"{name}_heads"]),
            node("Transpose", [f"{name}_heads"], [f"{name}_first"], perm=order),
        ]
    nodes += [
        node("MatMul", ["q_first", "k_first"], ["products"]),
        node("Mul", ["products", "scale"], ["scores"]),
        *([node("Add", ["scores", "far"], ["scores_twice"])] if adds_twice else []),
        node("Add", ["scores_twice" if adds_twice else "scores", "mask"], ["masked"]),
        node("Softmax", ["masked"], ["shares"], axis=-1),
        node("MatMul", ["shares", "v_first"], ["mixed"]),
        node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]),
        node("Reshape", ["back", "whole"], ["attention"]),
        node("MatMul", ["attention", "out"], ["y"]),
        node("MatMul", ["y", "head"], ["logits"], name="head"),
        node("Gather", ["logits", "start"], [OUTPUTS[0]], axis=2),
        node("Gather", ["logits", "end"], [OUTPUTS[1]], axis=2),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "encoder",
        [value(name, onnx.TensorProto.INT64, ["B", TOKENS]) for name in ("input_ids", "attention_mask")],
        [value(name, onnx.TensorProto.FLOAT, ["B", TOKENS]) for name in OUTPUTS],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)


def _in_any_order(whole: str, bias: str) -> list[str]:
    """Summands as exporters write them: of the key the other way round."""
    return [bias, whole] if bias == "k_bias" else [whole, bias]


def batches(*, are_padded: bool = True) -> list[dict[str, Any]]:
    numbers = np.random.default_rng(6)
    mask = np.ones((3, TOKENS), np.int64)
    if are_padded:
        mask[1, 4:] = 0
    return [{"input_ids": numbers.integers(30, size=mask.shape), "attention_mask": mask}]


def logits_of(model: Any, folder: Path, *, are_padded: bool = True) -> Any:
    onnx.save(model, folder / "some.onnx")
    return observed(folder / "some.onnx", (), batches(are_padded=are_padded)).logits


def operations(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("biases", ["", "qkv", "qv"])
@pytest.mark.parametrize("are_padded", [True, False])
def test_attention_as_one_operation_gives_the_same_logits(are_padded: bool, biases: str, tmp_path: Path) -> None:
    model = encoder(biases=biases)
    expected = logits_of(model, tmp_path, are_padded=are_padded)

    assert fuse_attention(model, HEADS) == 1

    made = operations(model)
    assert (made["If"], made["Softmax"], made["Transpose"], made["MatMul"]) == (1, 0, 0, 5)
    # That of the mask, and the biases, unless all three are the operation's.
    assert made["Add"] == (2 if biases == "qv" else 0)
    assert "far" not in {tensor.name for tensor in model.graph.initializer}, "what nothing uses is left out"
    np.testing.assert_allclose(logits_of(model, tmp_path, are_padded=are_padded), expected, rtol=1e-4, atol=1e-4)


def test_attention_with_more_than_a_mask_stays_as_it_is() -> None:
    model = encoder(adds_twice=True)
    before = model.SerializeToString()
    assert fuse_attention(model, HEADS) == 0
    assert model.SerializeToString() == before


def test_attention_is_one_operation_in_float32_where_that_is_asked_for(tmp_path: Path) -> None:
    model = encoder(biases="qkv")
    expected = logits_of(model, tmp_path)
    write_fused(tmp_path / "some.onnx", HEADS, batches())
    made = onnx.load(tmp_path / "some.onnx")
    assert (operations(made)["If"], operations(made)["Softmax"]) == (1, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"some.onnx"}
    np.testing.assert_allclose(logits_of(made, tmp_path), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("options", "heads"), [({"sees": 3}, HEADS), ({"adds_twice": True}, HEADS), ({}, None)])
def test_attention_that_no_operation_computes_is_refused(
    options: dict[str, Any], heads: int | None, tmp_path: Path
) -> None:
    onnx.save(encoder(**options), tmp_path / "model.onnx")
    before = (tmp_path / "model.onnx").read_bytes()
    with pytest.raises(ConfigError, match="leave out --fuse_attention"):
        write_fused(tmp_path / "model.onnx", heads, batches())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"model.onnx": before}


@pytest.mark.parametrize(("sees", "fused"), [(TOKENS, 1), (3, 0)])
def test_a_mask_that_says_more_than_the_padding_is_found_out_by_the_logits(
    sees: int, fused: int, tmp_path: Path
) -> None:
    onnx.save(encoder(sees=sees), tmp_path / "model.onnx")
    write_quantized(tmp_path / "model.onnx", tmp_path / "quantized.onnx", HEADS, batches())
    made = operations(onnx.load(tmp_path / "quantized.onnx"))
    assert (made["If"], made["Softmax"]) == (fused, 1 - fused)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "quantized.onnx"}


def test_channels_are_divided_and_products_stay(tmp_path: Path) -> None:
    model = encoder(large=7)
    expected = logits_of(model, tmp_path)
    watched = encoder(large=7)
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "attention")
    )
    onnx.save(watched, tmp_path / "watched.onnx")
    channels = observed(tmp_path / "watched.onnx", ("x", "attention"), batches()).channels
    real = batches()[0]["attention_mask"].astype(bool)
    table, large = (onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer[:2])
    x = table[batches()[0]["input_ids"][real]] * large
    np.testing.assert_array_equal(channels["x"].largest, np.abs(x).max(axis=0))
    np.testing.assert_array_equal(channels["x"].rows, x)
    np.testing.assert_allclose(channels["x"].moments, x.T @ x / len(x), rtol=1e-4)

    factors = np.where(np.arange(HIDDEN) == 7, np.float32(20), np.float32(1))
    assert level_channels(model, {"x": factors, "attention": np.ones(HIDDEN, np.float32)}) == {"x": "x_leveled"}

    products = Links(model.graph).products()
    assert len(products["x_leveled"]) == 3
    assert "x" not in products
    assert "attention" in products
    np.testing.assert_allclose(logits_of(model, tmp_path), expected, rtol=1e-4, atol=1e-4)


def test_rows_are_divided_and_products_stay(tmp_path: Path) -> None:
    model = encoder()
    table = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    table[3], table[4] = table[3] * 1000, 0
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(table, "embeddings"))
    expected = logits_of(model, tmp_path)
    names = set(Links(model.graph).products())
    scale_rows(model)
    assert set(Links(model.graph).products()) == {f"{name}_divided" for name in names}
    np.testing.assert_allclose(logits_of(model, tmp_path), expected, rtol=1e-4, atol=1e-4)


def test_large_channels_are_brought_down_for_better_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(encoder(row=1 / 40), tmp_path / "model.onnx")
    expected = observed(tmp_path / "model.onnx", (), batches()).logits

    def error() -> float:
        write_quantized(tmp_path / "model.onnx", tmp_path / "quantized.onnx", HEADS, batches())
        found = observed(tmp_path / "quantized.onnx", (), batches()).logits
        return float(np.sqrt(np.square(found - expected).mean()))

    leveled = error()
    assert "x_factors" in {tensor.name for tensor in onnx.load(tmp_path / "quantized.onnx").graph.initializer}
    monkeypatch.setattr("qa_dist.answering.weight_rounding.LEVELS", (np.inf,))
    assert leveled < 0.7 * error()


def test_large_rows_leave_the_others_their_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    table = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    large = int(batches()[0]["input_ids"][0, 0])
    table[large] *= 50
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(table, "embeddings"))
    onnx.save(model, tmp_path / "model.onnx")
    expected = observed(tmp_path / "model.onnx", (), batches()).logits

    def error() -> float:
        write_quantized(tmp_path / "model.onnx", tmp_path / "quantized.onnx", HEADS, batches())
        found = observed(tmp_path / "quantized.onnx", (), batches()).logits
        return float(np.median(np.abs(found - expected)))

    divided = error()
    monkeypatch.setattr("qa_dist.answering.onnx_graph.scale_rows", lambda model: None)
    assert divided < 0.7 * error()


def test_embeddings_are_rounded_row_by_row() -> None:
    model = encoder()
    table = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    table[3] *= 1000
    table[4] = 0
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(table, "embeddings"))
    assert round_embeddings(model) == 1
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert "embeddings" not in constants
    values, scales = constants["embeddings_rounded"], constants["embeddings_scales"]
    assert (values.dtype, values.shape, scales.shape) == (np.int8, table.shape, (len(table), 1))
    half_a_step = np.abs(table).max(axis=1, keepdims=True) / 127 / 2
    assert (np.abs(values * scales - table) <= 1.001 * half_a_step).all()
    assert operations(model)["Gather"] == 4, "two for the table, and those that take the logits apart"


def test_weights_are_the_same_when_few_are_looked_at_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(encoder(row=1 / 40), tmp_path / "model.onnx")
    write_quantized(tmp_path / "model.onnx", tmp_path / "quantized.onnx", HEADS, batches())
    monkeypatch.setattr("qa_dist.answering.onnx_graph._MOMENTS_BYTES", 0)
    write_quantized(tmp_path / "model.onnx", tmp_path / "other.onnx", HEADS, batches())
    one, other = (
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / name).graph.initializer}
        for name in ("quantized.onnx", "other.onnx")
    )
    assert one.keys() == other.keys()
    rounded = [name for name in one if name.endswith("_quantized")]
    assert len(rounded) == 4
    for name in rounded:
        # The same but where rounding was a matter of the last bit.
        assert (one[name] != other[name]).mean() < 0.02


def test_weights_that_one_file_does_not_hold_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(encoder(row=1 / 40), tmp_path / "model.onnx")
    write_quantized(tmp_path / "model.onnx", tmp_path / "quantized.onnx", HEADS, batches())
    onnx.save(encoder(row=1 / 40), tmp_path / "large.onnx", save_as_external_data=True, location="large.onnx.data")
    monkeypatch.setattr("qa_dist.answering.onnx_graph._LARGEST_FILE", 0)
    write_quantized(tmp_path / "large.onnx", tmp_path / "other.onnx", HEADS, batches())
    one, other = (observed(tmp_path / name, (), batches()).logits for name in ("quantized.onnx", "other.onnx"))
    np.testing.assert_array_equal(one, other)
    files = {"model.onnx", "quantized.onnx", "large.onnx", "large.onnx.data", "other.onnx"}
    assert {path.name for path in tmp_path.iterdir()} == files
