"""What a pass asks of a CUDA device, counted without one: budgets that a change may lower and not raise."""

from typing import Any

import pytest
import transformers
from packaging.version import Version

from tests.compiled.launch_counts import ATTENTION, PRODUCTS, TRAINED
from tests.support.fake_cuda import needs_compiler, run

pytestmark = needs_compiler

BUDGETS = {
    "query and value, no dropout": 460,
    "query and value": 555,
    "all-linear, no dropout": 680,
    "query and value, no dropout, peft": 870,
}
"""Launches of forward pass, loss and backward pass: bert-base, 32 features, 5,300 tokens, bfloat16."""


@pytest.fixture(scope="module")
def counted() -> Any:
    return run("tests.compiled.launch_counts:everything")


@pytest.mark.parametrize("scenario", BUDGETS)
def test_launches_of_a_pass_stay_within_their_budget(counted: Any, scenario: str) -> None:
    counts = counted["budgets"][scenario]
    assert 400 < counts["launches"] <= BUDGETS[scenario], counts["by_name"]


@pytest.mark.parametrize("scenario", BUDGETS)
def test_a_pass_does_not_wait_for_the_device(counted: Any, scenario: str) -> None:
    assert counted["budgets"][scenario]["sync_names"] == {}


def test_launches_of_the_loss_do_not_grow_with_the_number_of_features(counted: Any) -> None:
    losses = counted["budgets"]["loss"]
    assert [losses[size]["launches"] for size in ("2", "32", "128")] == [losses["2"]["launches"]] * 3
    assert 0 < losses["2"]["launches"] <= 16


@pytest.mark.parametrize(("model_type", "way"), TRAINED)
def test_everything_is_multiplied_in_half_precision(counted: Any, model_type: str, way: str) -> None:
    if way in ("8bit", "4bit"):
        pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")
    types = counted["products"][f"{model_type}, {way}"]
    assert types[ATTENTION] == ["bfloat16 bfloat16 bfloat16"]
    assert types["aten::mm"], "nothing was multiplied"
    # Before 5.18, transformers makes ModernBERT's table of angles with a product of its own, in float32.
    is_old = Version(transformers.__version__) < Version("5.18")
    names = [name for name in PRODUCTS if not (is_old and model_type == "modernbert" and name == "aten::bmm")]
    found = {dtype for name in names for combination in types[name] for dtype in combination.split()}
    assert found == {"bfloat16"}
