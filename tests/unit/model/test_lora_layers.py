"""Grouped LoRA layers against peft's: the same numbers, names and state, in whatever way a model is used."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from qa_dist.config.options import ModelConfig
from qa_dist.model.building import build_model
from qa_dist.model.casts import remove_redundant_casts
from qa_dist.model.equality import ROUNDING, largest_difference
from qa_dist.model.families import model_types_unpadded
from qa_dist.model.lora_check import difference_from_peft
from qa_dist.model.lora_layers import GroupedAdapters, GroupedLinear, GroupedLora, LoraGroup, group_layers
from qa_dist.model.lora_products import GroupProducts, plain_products
from qa_dist.model.precision import DTYPES, Precision, autocast
from qa_dist.model.span_model import SpanModel, span_loss
from tests.tiny import MODEL_TYPES, tiny_model

CPU = torch.device("cpu")
LENGTHS = (9, 40, 3, 25)
ALL = {"lora_target_modules": ("all-linear",)}
UNPADDED = [name for name in model_types_unpadded() if name in MODEL_TYPES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: str(tiny_model(name, tmp_path_factory.mktemp(name))) for name in UNPADDED}


def build(folder: str, *, precision: Precision = "no", checkpointing: bool = False, **options: Any) -> SpanModel:
    """A model with adapters that are not zero."""
    config = ModelConfig(model_name_or_path=folder, **{"lora_dropout": 0.0, **options})
    model, _ = build_model(config, seed=1, max_seq_length=64, gradient_checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.trainable():
            if "lora_B" in name:
                weight.normal_(std=0.05, generator=generator)
    remove_redundant_casts(model, config, precision, CPU, shards_one_type=False)
    return model


def grouped(model: SpanModel, precision: Precision = "no") -> GroupedAdapters:
    return GroupedAdapters(model, group_layers(model, DTYPES.get(precision, torch.float32)))


def results(model: SpanModel, precision: Precision = "no", lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    """Logits, and the gradients of what is trained."""
    input_ids_T = torch.arange(sum(lengths)) % 40 + 5
    with autocast("cpu", precision):
        start_T, end_T = model.train()(input_ids_T, torch.zeros_like(input_ids_T), lengths)
    loss = span_loss(start_T, end_T, lengths, torch.tensor([[length // 3, length // 2] for length in lengths])).sum()
    return [start_T.detach(), end_T.detach(), *torch.autograd.grad(loss, [weight for _, weight in model.trainable()])]


def logits(model: SpanModel) -> torch.Tensor:
    """Start and end logits, without gradients."""
    input_ids_T = torch.arange(sum(LENGTHS)) % 40 + 5
    with torch.no_grad():
        return torch.stack(model.eval()(input_ids_T, torch.zeros_like(input_ids_T), LENGTHS))


@pytest.fixture
def refusing_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer of a group may compute alone, as peft does."""

    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("a layer was computed alone")

    output = LoraGroup.output
    monkeypatch.setattr(
        LoraGroup, "output", lambda *inputs: result if (result := output(*inputs)) is not None else refuse()
    )


@pytest.mark.parametrize("model_type", UNPADDED)
@pytest.mark.parametrize("lora_bias", ["none", "all"])
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_logits_and_gradients_are_those_of_peft(
    folders: dict[str, str], model_type: str, targets: str, lora_bias: str, refusing_peft: None
) -> None:
    options = {"use_rslora": targets == "all-linear", "lora_bias": lora_bias}
    model = build(folders[model_type], lora_target_modules=(targets,), **options)
    expected = results(model)
    adapters = grouped(model)
    names = [name for name, layer in model.named_modules() if type(layer) in (GroupedLora, GroupedLinear)]
    assert len(names) == sum(len(group.layers) for group in adapters.groups) > 0
    assert not [name for name, layer in model.named_modules() if type(layer) is PeftLinear], "all fit"
    shared = max(len(group.layers) for group in adapters.groups)
    # ModernBERT has one layer for queries, keys and values.
    assert shared == (1 if model_type == "modernbert" else 3)
    # The gradient of a key's bias is zero but for rounding, and so is the last norm's.
    pairs = list(zip(results(model), expected, strict=True))
    told = [pair for pair in pairs if not 0 < float(pair[1].abs().max()) < 1e-5]
    assert len(pairs) - len(told) <= (3 if lora_bias == "all" else 0)
    assert largest_difference(told) < 3e-5


@pytest.mark.parametrize(("precision", "share"), [("no", 1e-6), ("bf16", 2.0**-6), ("fp16", 2.0**-9)])
@pytest.mark.parametrize("lora_bias", ["none", "all"])
@pytest.mark.parametrize("targets", [("query", "value"), ("key",), ("all-linear",)], ids=lambda names: names[0])
def test_every_layer_gives_what_peft_gives_within_rounding(
    folders: dict[str, str], precision: Precision, share: float, targets: tuple[str, ...], lora_bias: str
) -> None:
    model = build(folders["bert"], precision=precision, lora_target_modules=targets, lora_bias=lora_bias)
    adapters = grouped(model, precision)
    before = [each.detach().clone() for _, each in model.trainable()]
    state = torch.get_rng_state()
    for number, part in enumerate(model.modules()):
        part.training = number % 2 == 0
    modes = [part.training for part in model.modules()]
    assert 0 < difference_from_peft(adapters, autocast("cpu", precision)) < share <= max(ROUNDING[precision], 1e-6)
    assert all(torch.equal(each, weight) for each, (_, weight) in zip(before, model.trainable(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_no_further_from_the_truth_than_peft_is(
    folders: dict[str, str], precision: Precision
) -> None:
    model = build(folders["bert"], precision=precision, **ALL)
    (group, *_) = grouped(model, precision).groups
    x = torch.randn(1, 200, 32, generator=torch.Generator().manual_seed(4))
    weights = [torch.randn(1, 200, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def found(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        gradients = [weight.to(output.dtype) for weight, output in zip(weights, outputs, strict=True)]
        parts = torch.autograd.grad(outputs, group.parameters(), gradients)
        return [each.detach() for each in (*outputs, *parts)]

    with autocast("cpu", precision):
        model(torch.arange(5), torch.zeros(5, dtype=torch.long), (5,))
        ours = found([layer(x) for layer in group.layers])
        theirs = found([PeftLinear.forward(layer, x) for layer in group.layers])
    for layer in group.layers:
        layer.double()
    exact = found([PeftLinear.forward(layer, x.double()) for layer in group.layers])

    def error(tensors: list[torch.Tensor]) -> float:
        return sum(
            float((each.double() - true).norm() / true.norm()) for each, true in zip(tensors, exact, strict=True)
        )

    assert 0 < error(ours) < error(theirs)


def random_inputs(num_adapters: int = 2, num_layers: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 6), (num_layers * 5, 6), (num_layers * 5,), (num_adapters * 3, 6), (num_adapters, 5, 3)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("num_adapters", [1, 2, 3])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_product_of_a_group_is_that_of_its_layers(num_adapters: int, has_bias: bool) -> None:
    x, weight, bias, a, b = random_inputs(num_adapters)
    weight.requires_grad_(False)
    given = bias.detach() if has_bias else None

    def product(*tensors: torch.Tensor) -> torch.Tensor:
        return GroupProducts.apply(tensors[0], weight, given, *tensors[1:], 0.7, 0.0)

    assert torch.autograd.gradcheck(product, (x, a, b))
    pieces = []
    for number in range(3):
        piece = nn.functional.linear(x, weight[5 * number : 5 * number + 5])
        piece = piece if given is None else piece + given[5 * number : 5 * number + 5]
        if number < num_adapters:
            piece = piece + 0.7 * (x @ a[3 * number : 3 * number + 3].t()) @ b[number].t()
        pieces.append(piece)
    torch.testing.assert_close(product(x, a, b), torch.cat(pieces, 1))
    torch.testing.assert_close(plain_products(x, weight, given, a, b, 0.7, 0.0), torch.cat(pieces, 1))


@pytest.mark.parametrize("compute", [GroupProducts.apply, plain_products])
@pytest.mark.parametrize("num_adapters", [1, 2])
def test_each_adapter_has_a_mask_of_its_own(compute: Any, num_adapters: int) -> None:
    x, weight, bias, a, b = random_inputs(num_adapters)
    weight.requires_grad_(False)
    torch.manual_seed(5)
    found = compute(x, weight, bias.detach(), a, b, 0.7, 0.4)
    torch.manual_seed(5)
    masks = torch.native_dropout(torch.ones(num_adapters, 7, 6), 0.4, True)[1]
    assert 0.3 < float(masks.float().mean()) < 0.9
    parts = [
        x * masks[number] / 0.6 @ a[3 * number : 3 * number + 3].t() @ b[number].t() for number in range(num_adapters)
    ]
    added = torch.cat([*parts, *[torch.zeros(7, 5)] * (3 - num_adapters)], 1)
    expected = nn.functional.linear(x, weight, bias.detach()) + 0.7 * added
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, dtype=found.dtype)
    for ours, theirs in zip(
        *(torch.autograd.grad(each, (x, a, b), weights) for each in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    if num_adapters == 2:
        assert not torch.equal(masks[0], masks[1])


def test_memory_that_was_not_written_to_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *inputs: nothing(*inputs).fill_(torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *inputs: new_empty(*inputs).fill_(torch.nan))
    x, weight, bias, a, b = random_inputs()
    output = GroupProducts.apply(x, weight.detach(), bias.detach(), a, b, 0.7, 0.0)
    assert all(each.isfinite().all() for each in torch.autograd.grad(output.sum(), (x, a, b)))


def test_gradient_checkpointing_changes_nothing(folders: dict[str, str], refusing_peft: None) -> None:
    plain, saving = (build(folders["bert"], checkpointing=each, lora_dropout=0.2, **ALL) for each in (False, True))
    found = []
    for model in (plain, saving):
        grouped(model)
        torch.manual_seed(3)
        found.append(results(model))
    assert largest_difference(zip(*found, strict=True)) == 0


def test_gradients_add_up_over_micro_batches(folders: dict[str, str]) -> None:
    model = build(folders["bert"], **ALL)
    grouped(model)
    once = results(model)[2:]
    for _ in range(2):
        input_ids_T = torch.arange(sum(LENGTHS)) % 40 + 5
        outputs = model(input_ids_T, torch.zeros_like(input_ids_T), LENGTHS)
        span_loss(*outputs, LENGTHS, torch.tensor([[length // 3, length // 2] for length in LENGTHS])).sum().backward()
    for gradient, (name, weight) in zip(once, model.trainable(), strict=True):
        torch.testing.assert_close(weight.grad, 2 * gradient, msg=name)


def test_peft_saves_switches_off_and_merges(folders: dict[str, str], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForQuestionAnswering

    model = build(folders["bert"])
    peft_model: Any = model.model
    state, expected = model.state_dict(), logits(model)
    with peft_model.disable_adapter():
        off = logits(model)
    assert largest_difference([(off, expected)]) > 1e-3
    grouped(model)
    assert [(name, each.shape) for name, each in model.state_dict().items()] == [(n, t.shape) for n, t in state.items()]
    with peft_model.disable_adapter():
        torch.testing.assert_close(logits(model), off)
    peft_model.save_pretrained(str(tmp_path / "adapter"))
    base = AutoModelForQuestionAnswering.from_pretrained(folders["bert"])
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).state_dict()
    assert again.keys() == peft_model.state_dict().keys()
    # The head is trained too, and a base read anew has another: what is not saved shows.
    trained = {name: weight.detach() for name, weight in model.trainable()}
    for part in ("lora_A", "lora_B", "modules_to_save"):
        assert any(part in name for name in trained), part
    assert [name for name, weight in trained.items() if not torch.equal(again[name], weight)] == []
    peft_model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    peft_model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    merged = peft_model.merge_and_unload(safe_merge=True)
    assert not [part for part in merged.modules() if isinstance(part, PeftLinear)]
    plain = SpanModel(merged, padding="unpadded", max_seq_length=64)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)


def test_what_is_not_one_plain_adapter_stays_with_peft(folders: dict[str, str]) -> None:
    assert group_layers(build(folders["bert"], use_dora=True), torch.float32) == []
    assert group_layers(build(folders["bert"], tuning="full"), torch.float32) == []
    # Weights that autocast has to cast are not multiplied here.
    assert group_layers(build(folders["bert"]), torch.bfloat16) == []
    model = build(folders["bert"])
    inner: Any = model.model
    inner.add_adapter("second", inner.peft_config["default"])
    assert group_layers(model, torch.float32) == []
    thawed = build(folders["bert"])
    for name, weight in thawed.named_parameters():
        weight.requires_grad_("key" in name or weight.requires_grad)
    assert {len(layers) for layers in group_layers(thawed, torch.float32)} == {1}, "each by itself"


def test_adapters_of_different_ranks_are_not_one_product(folders: dict[str, str]) -> None:
    from peft import LoraConfig, get_peft_model

    plain: Any = build(folders["bert"], tuning="full").model
    lora = LoraConfig(target_modules=["query", "value"], rank_pattern={"value": 4}, init_lora_weights=False)
    model = SpanModel(get_peft_model(plain, lora), padding="unpadded", max_seq_length=64)
    expected = results(model)
    assert [len(group.layers) for group in grouped(model).groups] == [1] * 4
    assert largest_difference(zip(results(model), expected, strict=True)) < 3e-5


def test_layers_with_inputs_of_their_own_compute_alone(folders: dict[str, str]) -> None:
    model = build(folders["bert"])
    (group, *_) = grouped(model).groups
    model(torch.arange(5), torch.zeros(5, dtype=torch.long), (5,))
    query, key, value = group.layers
    first, second = (torch.randn(1, 4, 32) for _ in range(2))
    query(first)
    for layer in (key, value):
        plain: Any = PeftLinear if isinstance(layer, PeftLinear) else nn.Linear
        torch.testing.assert_close(layer(second), plain.forward(layer, second), rtol=0, atol=0)


@pytest.fixture
def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    apply = GroupProducts.apply
    with monkeypatch.context() as patch:
        patch.setattr(GroupProducts, "apply", lambda *inputs: apply(*inputs[:5], 1.5 * inputs[5], *inputs[6:]))
        yield


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_wrong_product_is_seen_and_left(folders: dict[str, str], precision: Precision, wrong_scale: None) -> None:
    model = build(folders["bert"], precision=precision, **ALL)
    expected = results(model, precision)
    adapters = grouped(model, precision)
    assert difference_from_peft(adapters, autocast("cpu", precision)) > 2 * ROUNDING[precision]
    adapters.remove()
    assert {type(layer) for group in adapters.groups for layer in group.layers} == {PeftLinear}
    assert largest_difference(zip(results(model, precision), expected, strict=True)) == 0


def test_layers_in_groups_are_computed_by_one_thread_at_a_time(folders: dict[str, str]) -> None:
    """They hand on what the first of them has computed."""
    model = build(folders["bert"], precision="no", **ALL)
    assert model.is_thread_safe
    adapters = grouped(model, "no")
    assert not model.is_thread_safe
    adapters.remove()
    assert model.is_thread_safe


def test_numbers_that_are_not_finite_and_other_shapes_differ() -> None:
    one = torch.ones(2)
    assert largest_difference([(one, one)]) == 0
    assert largest_difference([(one, one), (one * 1.5, one * 2)]) == 0.25
    for other in (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf]), torch.ones(3)):
        assert largest_difference([(one, one), (other, one)]) == torch.inf
