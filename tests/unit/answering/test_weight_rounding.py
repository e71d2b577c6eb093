"""Weights as integers: none that overflows, and products that stay as near as they can."""

from typing import Any

import numpy as np
import pytest

from qa_dist.answering.weight_rounding import (
    LARGEST,
    LARGEST_PAIR,
    Channels,
    best_columns,
    best_factors,
    compensation,
    mean_square_step,
    rounded,
)


def weight_of(num_rows: int, num_columns: int = 6, *, seed: int = 1) -> Any:
    """Weights of which some are much larger than others, also side by side."""
    return np.random.default_rng(seed).standard_t(3, size=(num_rows, num_columns)).astype(np.float32)


def rows_of(num_channels: int, *, seed: int = 2) -> Any:
    """Rows whose channels go together: mixtures of few."""
    numbers = np.random.default_rng(seed)
    mixed = numbers.normal(size=(500, 4)) @ numbers.normal(size=(4, num_channels))
    return (mixed + 0.3 * numbers.normal(size=mixed.shape)).astype(np.float32)


def channels_of(rows: Any) -> Channels:
    channels = Channels(rows.shape[1])
    for part in np.array_split(rows, 3):
        channels.add(part)
    return channels


def largest_pairs(values: Any) -> tuple[int, int]:
    """The largest sums of one sign of rows 2i and 2i + 1."""
    even = np.zeros((len(values) + len(values) % 2, values.shape[1]), int)
    even[: len(values)] = values
    pairs = even.reshape(-1, 2, values.shape[1])
    return int(np.maximum(pairs, 0).sum(axis=1).max()), int(np.maximum(-pairs, 0).sum(axis=1).max())


def test_channels_are_those_of_all_rows_together() -> None:
    rows = rows_of(5)
    channels = channels_of(rows)
    np.testing.assert_array_equal(channels.largest, np.abs(rows).max(axis=0))
    np.testing.assert_array_equal(channels.rows, rows)
    np.testing.assert_allclose(channels.moments, rows.T.astype(float) @ rows / len(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 2, 31, 300])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_two_neighbours_overflow(num_rows: int, seed: int) -> None:
    weight, moments = weight_of(num_rows, 40, seed=seed), channels_of(rows_of(num_rows)).moments
    scales = best_columns(weight, np.diag(moments).astype(np.float32)).scales
    values = rounded(weight, scales, compensation(moments))
    assert values.dtype == np.int8
    assert values.shape == weight.shape
    assert np.abs(values.astype(int)).max() <= LARGEST
    assert max(largest_pairs(values)) <= LARGEST_PAIR
    # Finer than 7 bits would be.
    assert num_rows == 1 or (scales <= np.abs(weight).max(axis=0) / 63 + 1e-6).all()


def test_products_in_onnxruntime_are_exact_for_the_largest_that_is_multiplied() -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    weight = np.abs(weight_of(64, 32))
    weight[::2] *= np.where(np.arange(32) % 2, 1, -1)
    weight[1::2] *= np.where(np.arange(32) % 2, 1, -1)
    values = rounded(weight, best_columns(weight, np.ones(64, np.float32)).scales, np.eye(64, dtype=np.float32))
    assert max(largest_pairs(values)) == LARGEST_PAIR
    node = onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [info("x", onnx.TensorProto.UINT8, [8, 64])],
        [info("y", onnx.TensorProto.INT32, [8, 32])],
        [onnx.numpy_helper.from_array(values, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.full((8, 64), 255, np.uint8)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x.astype(int) @ values.astype(int))


def test_what_rounding_changes_is_taken_back_by_channels_that_go_with_it() -> None:
    weight, scales = np.array([[0.4], [0.4], [0.4]], np.float32), np.ones(1, np.float32)
    alone, together = np.eye(3), np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert rounded(weight, scales, compensation(alone)).tolist() == [[0], [0], [0]]
    assert rounded(weight, scales, compensation(together)).tolist() == [[0], [1], [0]]


@pytest.mark.parametrize("num_rows", [20, 200])
def test_products_are_nearer_than_with_each_weight_rounded_by_itself(num_rows: int) -> None:
    weight, rows = weight_of(num_rows), rows_of(num_rows)
    moments = channels_of(rows).moments
    scales = best_columns(weight, np.diag(moments).astype(np.float32)).scales

    def error(factor: Any) -> float:
        return float(np.square(rows @ (rounded(weight, scales, factor) * scales - weight)).mean())

    assert error(compensation(moments)) < 0.5 * error(np.eye(num_rows, dtype=np.float32))


@pytest.mark.parametrize("num_rows", [7, 8])
def test_the_error_of_columns_is_that_of_their_products(num_rows: int) -> None:
    weight = weight_of(num_rows)
    weight[:, 2] = 0
    squares = np.linspace(0.5, 2, num_rows).astype(np.float32)
    scales, errors = best_columns(weight, squares)
    values = rounded(weight, scales, np.eye(num_rows, dtype=np.float32))
    np.testing.assert_allclose(squares @ np.square(values * scales - weight), errors, rtol=1e-3, atol=1e-6)
    for share in (0.5, 0.8, 1.0):
        other = np.abs(weight).max(axis=0) / np.float32(LARGEST * share) + np.float32(1e-9)
        values = rounded(weight, other, np.eye(num_rows, dtype=np.float32))
        assert (errors <= 1.001 * (squares @ np.square(values * other - weight)) + 1e-6).all()
    assert not values[:, 2].any()


def test_channels_that_nothing_comes_through_are_rounded_by_themselves() -> None:
    weight = weight_of(6)
    scales = best_columns(weight, np.zeros(6, np.float32)).scales
    np.testing.assert_array_equal(
        rounded(weight, scales, compensation(np.zeros((6, 6)))), rounded(weight, scales, np.eye(6, dtype=np.float32))
    )


def noise(rows: Any, weight: Any, factors: Any) -> float:
    """Mean square of what rounding both sides of a product changes, computed from the product itself."""
    leveled, changed = rows / factors, weight * factors[:, None]
    largest = np.abs(leveled).max(axis=1, keepdims=True)
    step = np.ptp(leveled / largest) / 255
    squares = np.square(leveled).mean(axis=0)
    scales = best_columns(changed, squares).scales
    values = rounded(changed, scales, np.eye(len(weight), dtype=np.float32))
    inputs = np.rint(leveled / largest / step) * step * largest
    return float(np.square(inputs @ (values * scales) - rows @ weight).mean())


@pytest.mark.parametrize(("row", "is_leveled"), [(1.0, True), (0.01, True), (100.0, False)])
def test_large_channels_are_brought_down_where_that_makes_products_more_exact(row: float, is_leveled: bool) -> None:
    rows = np.random.default_rng(3).normal(size=(2000, 24)).astype(np.float32)
    rows[:, 5] *= 30
    weight = np.random.default_rng(4).normal(size=(24, 40)).astype(np.float32)
    weight[5] *= row
    factors = best_factors([weight], channels_of(rows))
    assert (factors >= 1).all()
    assert (factors[5] > 2) == is_leveled
    with_factors, without = noise(rows, weight, factors), noise(rows, weight, np.ones(24, np.float32))
    assert with_factors < 0.7 * without if is_leveled else with_factors <= 1.05 * without


def test_channels_most_of_which_are_zero_are_left() -> None:
    rows = np.zeros((10, 8), np.float32)
    rows[:, 0] = 2
    assert best_factors([weight_of(8)], channels_of(rows)).tolist() == [1.0] * 8


def test_the_step_of_rows_that_are_divided_by_their_largest() -> None:
    rows = rows_of(24)
    rows[::3] *= 100
    rows[7] = 0
    largest = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-30)
    divided = rows / largest
    step = (divided.max() - divided.min()) / 255
    noise = np.rint(divided / step) * step * largest - rows
    assert np.square(noise).mean() == pytest.approx(mean_square_step(rows) / 12, rel=0.15)
