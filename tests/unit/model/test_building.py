"""Every family: unpadded equals padded, the head trains, what was saved comes back."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qa_dist.common.errors import ConfigError, TrainingError, UserError
from qa_dist.config.options import ModelConfig
from qa_dist.model.adapters import target_modules
from qa_dist.model.building import build_model, load_base
from qa_dist.model.families import FAMILIES, model_types_unpadded
from qa_dist.model.saved import load_trained, save_trained
from qa_dist.model.span_model import (
    SpanModel,
    count_parameters,
    head_names,
    head_parameters,
    span_loss,
    transformers_model,
)
from qa_dist.model.trainable import GradientCheck, least_weight
from tests.tiny import MODEL_TYPES, tiny_model, tiny_tokenizer

LENGTHS = (1, 7, 128, 31, 3, 64)
MAX_LENGTH = 128


@pytest.fixture(scope="module", params=MODEL_TYPES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def received(model: SpanModel) -> Callable[[Sequence[str]], list[bool]]:
    """Whether parameters have gradients, by name."""
    parameters = dict(model.trainable())

    def have_gradients(names: Sequence[str]) -> list[bool]:
        gradients = [parameters[name].grad for name in names]
        return [gradient is not None and bool(gradient.count_nonzero()) for gradient in gradients]

    return have_gradients


def whole(model: SpanModel) -> dict[str, torch.Tensor]:
    """The trainable tensors by name."""
    return {name: parameter.detach() for name, parameter in model.trainable()}


def build(model_dir: Path, **options: Any) -> SpanModel:
    settings = {"lora_dropout": 0.0, "model_dropout": 0.0, **options}
    checkpointing = settings.pop("gradient_checkpointing", False)
    config = ModelConfig(model_name_or_path=str(model_dir), **settings)
    model, _ = build_model(config, seed=1, max_seq_length=MAX_LENGTH, gradient_checkpointing=checkpointing)
    return model


def row(lengths: tuple[int, ...] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    input_ids_T = torch.randint(5, 50, (sum(lengths),), generator=generator)
    token_types = torch.cat([(torch.arange(length) > length // 3).long() for length in lengths])
    return input_ids_T, token_types, lengths


def labels(lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    return torch.tensor([[length // 4, length // 2] for length in lengths])


def loss_and_gradients(model: SpanModel) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    input_ids_T, token_types_T, lengths = row()
    start_T, end_T = model(input_ids_T, token_types_T, lengths)
    loss = span_loss(start_T, end_T, lengths, labels()).mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.trainable() if parameter.grad is not None}
    return start_T, end_T, gradients


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("model_type", model_types_unpadded())
def test_unpadded_equals_padded(model_type: str, tuning: str, tmp_path: Path) -> None:
    model_dir = tiny_model(model_type, tmp_path)
    targets = {"lora_target_modules": ("all-linear",)} if tuning == "lora" else {}
    start_T, end_T, gradients = loss_and_gradients(build(model_dir, padding="unpadded", tuning=tuning, **targets))
    scale = max(float(gradient.norm()) for gradient in gradients.values())
    for padding in ("sorted", "max_length"):
        padded = loss_and_gradients(build(model_dir, padding=padding, tuning=tuning, **targets))
        torch.testing.assert_close(start_T, padded[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(end_T, padded[1], rtol=0, atol=1e-5)
        assert gradients.keys() == padded[2].keys()
        for name, gradient in gradients.items():
            assert float((gradient - padded[2][name]).norm()) <= 1e-5 * scale, name


@pytest.mark.parametrize("model_type", model_types_unpadded())
def test_a_feature_does_not_see_its_neighbours(model_type: str, tmp_path: Path) -> None:
    model = build(tiny_model(model_type, tmp_path)).eval()
    input_ids_T, token_types_T, lengths = row()
    start_T, _ = model(input_ids_T, token_types_T, lengths)
    first = sum(lengths[:2])
    alone, _ = model(input_ids_T[first : first + 128], token_types_T[first : first + 128], (128,))
    torch.testing.assert_close(start_T[first : first + 128], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "mpnet"])
def test_padding_side_does_not_change_logits_where_positions_follow_the_mask(model_type: str, tmp_path: Path) -> None:
    # MPNet numbers positions behind the padding; BERT and ModernBERT number columns, which only rows of equal length
    # survive.
    config = ModelConfig(model_name_or_path=str(tiny_model(model_type, tmp_path)), padding="sorted", lora_dropout=0.0)
    lengths = LENGTHS if model_type == "mpnet" else (9, 9)
    logits = [
        build_model(config, seed=1, max_seq_length=MAX_LENGTH, tokenizer_pads_left=left)[0].eval()(*row(lengths))[0]
        for left in (False, True)
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)


def test_every_family_trains_its_head_and_comes_back(model_dir: Path, tmp_path: Path) -> None:
    model = build(model_dir)
    assert head_parameters(model), "the head must train"
    check = GradientCheck(model)
    optimizer = torch.optim.SGD([parameter for _, parameter in model.trainable()], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        _, _, gradients = loss_and_gradients(model)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
        check.observe(received(model))
        optimizer.step()
        check.updated(0.1)
    save_trained(model, whole(model), tiny_tokenizer(), tmp_path)
    config = ModelConfig(model_name_or_path=str(model_dir), model_dropout=0.0)
    again = load_trained(config, str(tmp_path), max_seq_length=MAX_LENGTH, tokenizer_pads_left=False)
    model.eval()
    for ours, theirs in zip(model(*row()), again(*row()), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_full_fine_tuning_comes_back(model_type: str, tmp_path: Path) -> None:
    model = build(tiny_model(model_type, tmp_path / "base"), tuning="full")
    assert len(model.trainable()) == sum(1 for _ in model.parameters())
    (tmp_path / "out").mkdir()
    save_trained(model, whole(model), tiny_tokenizer(), tmp_path / "out")
    config = ModelConfig(model_name_or_path="unused", tuning="full")
    again = load_trained(config, str(tmp_path / "out"), max_seq_length=MAX_LENGTH, tokenizer_pads_left=False)
    assert torch.equal(model.eval()(*row())[0], again(*row())[0])


def test_rounding_does_not_move_the_biases_of_the_logits(tmp_path: Path) -> None:
    model = build(tiny_model("bert", tmp_path))
    biases = model.shift_invariant_biases()
    assert [tuple(bias.shape) for bias in biases.values()] == [(2,)]
    _, _, gradients = loss_and_gradients(model)
    for name in biases:
        assert not gradients[name].any()


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.without_effect])
@pytest.mark.parametrize("options", [{"tuning": "full"}, {"lora_bias": "all", "lora_target_modules": ("all-linear",)}])
def test_biases_without_effect_have_none_and_stay(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = build(tiny_model(model_type, tmp_path), **options)
    biases = model.shift_invariant_biases()
    num_keys = sum("key" in name or "k_lin" in name for name in biases)
    num_norms = sum("LayerNorm" in name for name in biases)
    assert num_keys == len(model.blocks())
    assert num_norms == any("LayerNorm" in pattern for pattern in FAMILIES[model_type].without_effect)
    assert len(biases) == num_keys + num_norms + 1
    before, _, gradients = loss_and_gradients(model)
    assert not any(gradients[name].any() for name in biases)
    with torch.no_grad():
        for bias in biases.values():
            bias += torch.linspace(-1, 1, bias.numel())
    # Other logits, of which the softmax makes the same.
    difference = loss_and_gradients(model)[0] - before
    for feature in difference.split(row()[2]):
        torch.testing.assert_close(feature, feature[:1].expand_as(feature), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"use_dora": True}, {"lora_target_modules": ("all-linear",)}]
)
def test_variants_of_lora_train_every_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    model = build(tiny_model("bert", tmp_path), **options)
    check = GradientCheck(model)
    for _ in range(2):
        loss_and_gradients(model)
        check.observe(received(model))
        check.updated(0.1)
        with torch.no_grad():
            for _, parameter in model.trainable():
                parameter -= 0.1 * (parameter.grad if parameter.grad is not None else 0)
                parameter.grad = None
    kinds = {name.split("lora_")[1].split(".")[0] for name, _ in model.trainable() if "lora_" in name}
    assert kinds == ({"A", "B", "magnitude_vector"} if options.get("use_dora") else {"A", "B"})


def test_a_tensor_without_gradient_is_named(tmp_path: Path) -> None:
    model = build(tiny_model("bert", tmp_path))
    check = GradientCheck(model)
    loss_and_gradients(model)
    for name, parameter in model.trainable():
        if "layer.1.attention.self.value.lora_B" in name:
            parameter.grad = None
    # Steps that overflowed do not count: LoRA's B matrices have not moved yet.
    for _ in range(3):
        check.observe(received(model))
    check.updated(0.1)
    check.observe(received(model))
    with pytest.raises(TrainingError, match=r"layer\.\d\.attention"):
        check.updated(0.1)


def test_in_float16_gradients_may_come_when_warm_up_has_made_b_large_enough(tmp_path: Path) -> None:
    model = build(tiny_model("bert", tmp_path))
    assert least_weight("bf16", {"a": 0.1}) == least_weight("no", {}) == 0
    least = least_weight("fp16", {"a": 0.5})
    assert torch.tensor(least / 16).half() == 0 != torch.tensor(least / 2).half()
    check = GradientCheck(model, least_weight=least)
    # Observed are the weights of before an update: at the third, those after two of them.
    for _ in range(2):
        check.observe(lambda names: [False for _ in names])
        check.updated(least / 2)
    check.observe(lambda names: [False for _ in names])
    with pytest.raises(TrainingError, match="in 3 steps"):
        check.updated(least / 2)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    model_dir = tiny_model("bert", tmp_path)
    plain = loss_and_gradients(build(model_dir))[2]
    saving = loss_and_gradients(build(model_dir, gradient_checkpointing=True))[2]
    assert plain.keys() == saving.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, saving[name], rtol=1e-6, atol=1e-6)


def test_known_parameter_counts_of_bert_base_with_lora() -> None:
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForQuestionAnswering, BertConfig

    with torch.device("meta"):
        base = AutoModelForQuestionAnswering.from_config(BertConfig())
        assert head_names(base) == ("qa_outputs",)
        lora = LoraConfig(
            task_type=TaskType.QUESTION_ANS,
            r=8,
            target_modules=target_modules(base, ("attention",)),
            modules_to_save=list(head_names(base)),
        )
        model = get_peft_model(base, lora)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 296_450
    assert count_parameters(model) == 109_189_636


def test_report_compares_before_and_after(tmp_path: Path) -> None:
    config = ModelConfig(model_name_or_path=str(tiny_model("bert", tmp_path)), show_structure=True)
    model, report = build_model(config, seed=1, max_seq_length=64)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.before == count_parameters(transformers_model(model.model)) - (report.total - report.before)
    text = "\n".join(report.lines(structure=True))
    assert f"{report.trainable:,}" in text
    assert all(name in text for name, _ in model.trainable())
    assert "lora_A" not in "\n".join(report.lines(structure=False))


def test_dropout_is_set_everywhere_and_attention_dropout_is_said(tmp_path: Path) -> None:
    model_dir = tiny_model("bert", tmp_path)
    config = ModelConfig(model_name_or_path=str(model_dir), model_dropout=0.25)
    model, _ = build_model(config, seed=1, max_seq_length=64)
    encoder = transformers_model(model.model).config
    assert encoder.hidden_dropout_prob == 0.25
    assert encoder.attention_probs_dropout_prob == 0.0
    assert any("attention_probs_dropout_prob" in note for note in model.notes)
    # Who only evaluates or answers is not told.
    assert not load_base(config, str(model_dir), 64, torch.device("cpu")).notes
    sorted_config = ModelConfig(model_name_or_path=str(model_dir), model_dropout=0.25, padding="sorted")
    padded, _ = build_model(sorted_config, seed=1, max_seq_length=64)
    assert transformers_model(padded.model).config.attention_probs_dropout_prob == 0.25


def test_no_layers_are_left_out_at_random(tmp_path: Path) -> None:
    model_dir = tiny_model("flaubert", tmp_path)
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "layerdrop": 0.5}), encoding="utf-8")
    model, _ = build_model(ModelConfig(model_name_or_path=str(model_dir)), seed=1, max_seq_length=64)
    assert [part.layerdrop for part in model.modules() if hasattr(part, "layerdrop")] == [0.0]
    assert "no layers are left out at random here: layerdrop is 0 instead of 0.5" in model.notes


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("mpnet", {"padding": "unpadded"}, "does not work for a mpnet model"),
        ("bert", {"lora_target_modules": ("nothing",)}, "no such linear layer"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    model_type: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tiny_model(model_type, tmp_path), **options)


def test_a_window_longer_than_the_positions_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(model_name_or_path=str(tiny_model("roberta", tmp_path)))
    with pytest.raises(ConfigError, match="159 positions"):
        build_model(config, seed=1, max_seq_length=160)


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    # transformers 5.1 looks for an architecture in the name of a folder without a configuration: "empty" has "mpt".
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"cannot be loaded|holds no weights"):
        build(tmp_path / "nothing")


def test_architectures_without_known_projections_ask_for_names() -> None:
    from transformers import AutoModelForQuestionAnswering, FNetConfig

    model = AutoModelForQuestionAnswering.from_config(
        FNetConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    )
    with pytest.raises(ConfigError, match="use all-linear or some of"):
        target_modules(model, ("attention",))


def test_loss_is_the_mean_of_both_cross_entropies() -> None:
    generator = torch.Generator().manual_seed(0)
    start_T, end_T = torch.randn(2, sum(LENGTHS), generator=generator)
    found = span_loss(start_T, end_T, LENGTHS, labels())
    first = 0
    for feature, length in enumerate(LENGTHS):
        piece = slice(first, first + length)
        expected = sum(
            -torch.log_softmax(logits[piece], 0)[labels()[feature, end]] for end, logits in enumerate((start_T, end_T))
        )
        torch.testing.assert_close(found[feature], expected / 2)
        first += length
