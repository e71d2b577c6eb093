"""Graphs before they are rounded to 8 bits: other operations, the same logits."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qa_dist.answering.exported import OUTPUTS
from qa_dist.answering.onnx_graph import write_quantized
from qa_dist.answering.onnx_rewriting import LEVEL, Links, fuse_attention, level_channels, observed

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

HIDDEN, HEADS, TOKENS = 16, 2, 11


def encoder(*, sees: int = TOKENS, adds_twice: bool = False, large: int = 7, row: float = 1.0) -> Any:
    """A layer of attention as torch's exporter writes it, on embeddings of which one channel is large.

    Args:
        sees: How far a token attends; a mask says so that no input can tell.
        adds_twice: Whether positions add to the scores, beside the mask.
        large: The channel that is 40 times as large as the others.
        row: What its rows of the weights are multiplied by.
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
            node("Reshape", [f"{name}_whole", "heads"], [f"{name}_heads"]),
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


def batches() -> list[dict[str, Any]]:
    numbers = np.random.default_rng(6)
    mask = np.ones((3, TOKENS), np.int64)
    mask[1, 4:] = 0
    return [{"input_ids": numbers.integers(30, size=mask.shape), "attention_mask": mask}]


def logits_of(model: Any, folder: Path) -> Any:
    onnx.save(model, folder / "some.onnx")
    return observed(folder / "some.onnx", (), batches()).logits


def operations(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_attention_as_one_operation_gives_the_same_logits_with_padding_too(tmp_path: Path) -> None:
    model = encoder()
    expected = logits_of(model, tmp_path)

    assert fuse_attention(model, HEADS) == 1

    made = operations(model)
    assert (made["MultiHeadAttention"], made["Softmax"], made["Transpose"], made["MatMul"]) == (1, 0, 0, 5)
    assert "far" not in {tensor.name for tensor in model.graph.initializer}, "what nothing uses is left out"
    np.testing.assert_allclose(logits_of(model, tmp_path), expected, rtol=1e-4, atol=1e-4)


def test_attention_with_more_than_a_mask_stays_as_it_is() -> None:
    model = encoder(adds_twice=True)
    before = model.SerializeToString()
    assert fuse_attention(model, HEADS) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize(("sees", "fused"), [(TOKENS, 1), (3, 0)])
def test_a_mask_that_says_more_than_the_padding_is_found_out_by_the_logits(
    sees: int, fused: int, tmp_path: Path
) -> None:
    onnx.save(encoder(sees=sees), tmp_path / "model.onnx")
    write_quantized(tmp_path / "model.onnx", tmp_path / "quantized.onnx", HEADS, batches())
    made = operations(onnx.load(tmp_path / "quantized.onnx"))
    assert (made["MultiHeadAttention"], made["Softmax"]) == (fused, 1 - fused)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "quantized.onnx"}


def test_large_channels_are_brought_down_and_products_stay(tmp_path: Path) -> None:
    model = encoder(large=7)
    expected = logits_of(model, tmp_path)
    watched = encoder(large=7)
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "attention")
    )
    onnx.save(watched, tmp_path / "watched.onnx")
    largest = observed(tmp_path / "watched.onnx", ("x", "attention"), batches()).largest
    real = batches()[0]["attention_mask"].astype(bool)
    table, channels = (onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer[:2])
    x = table[batches()[0]["input_ids"][real]] * channels
    np.testing.assert_array_equal(largest["x"], np.abs(x).max(axis=0))

    assert level_channels(model, {**largest, "y": largest["x"]})["x"] == 1

    factors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}["x_factors"]
    limit = LEVEL * np.median(largest["x"])
    assert (largest["x"] * factors).max() == pytest.approx(limit)
    assert list(np.flatnonzero(factors < 1)) == [7]
    assert set(Links(model.graph).products()) >= {"x_leveled"}
    np.testing.assert_allclose(logits_of(model, tmp_path), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("row", "leveled"), [(1 / 40, True), (10.0, False)])
def test_large_channels_are_brought_down_where_that_gives_better_logits(
    row: float, leveled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(encoder(row=row), tmp_path / "model.onnx")
    expected = observed(tmp_path / "model.onnx", (), batches()).logits

    def error(level: float) -> float:
        monkeypatch.setattr("qa_dist.answering.onnx_rewriting.LEVEL", level)
        write_quantized(tmp_path / "model.onnx", tmp_path / "quantized.onnx", HEADS, batches())
        found = observed(tmp_path / "quantized.onnx", (), batches()).logits
        return float(np.sqrt(np.square(found - expected).mean()))

    without = error(1e9)
    assert error(LEVEL) <= (0.7 * without if leveled else without)
    names = {tensor.name for tensor in onnx.load(tmp_path / "quantized.onnx").graph.initializer}
    assert ("x_factors" in names) == leveled


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


@pytest.mark.parametrize("median", [0.0, 1.0])
def test_channels_that_are_all_alike_or_nearly_all_zero_are_left(median: float) -> None:
    model = encoder()
    largest = np.full(HIDDEN, median, np.float32)
    largest[0] = 2.0
    before = model.SerializeToString()
    assert not level_channels(model, {"x": largest, "attention": largest})
    assert model.SerializeToString() == before
