"""The residual stream in bfloat16: its type in every family, what it rounds, and where it is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from qa_dist.common.errors import ConfigError
from qa_dist.config.options import ModelConfig, RunConfig, TrainingConfig
from qa_dist.model.building import build_model
from qa_dist.model.casts import remove_redundant_casts
from qa_dist.model.precision import Precision, autocast
from qa_dist.model.residual_stream import HalfStreamNorm, set_residual_dtype
from qa_dist.model.span_model import SpanModel, span_loss
from tests.tiny import tiny_model

LENGTHS = (9, 40, 3, 25)
CPU = torch.device("cpu")
TYPES = ("bert", "distilbert", "electra", "modernbert", "roberta-prelayernorm", "xlm-roberta-xl")
"""Architectures that differ in where their norms are."""
LORA = {"lora_dropout": 0.0, "lora_target_modules": ("all-linear",)}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("bert"))


def built(folder: Path, dtype: str, **options: object) -> SpanModel:
    config = ModelConfig(model_name_or_path=str(folder), **{**LORA, **options})  # type: ignore[arg-type]
    model = build_model(config, seed=1, max_seq_length=64)[0]
    set_residual_dtype(model, dtype)
    with torch.no_grad():
        for name, parameter in model.trainable():
            if "lora_B" in name:
                # Zero at the start, which would hide what reaches it.
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return model


def pass_of(model: SpanModel, precision: Precision = "bf16") -> list[torch.Tensor]:
    """Logits and all gradients of a pass."""
    ids_T = torch.randint(5, 50, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    with autocast("cpu", precision):
        start_T, end_T = model(ids_T, torch.zeros_like(ids_T), LENGTHS)
    labels = torch.tensor([[length // 4, length // 2] for length in LENGTHS])
    span_loss(start_T, end_T, LENGTHS, labels).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for _, parameter in model.trainable()]
    return [torch.stack((start_T, end_T)).detach(), *(each for each in gradients if each is not None)]


def stream_types(model: SpanModel) -> tuple[set[torch.dtype], set[torch.dtype], torch.dtype]:
    """Types of what the layers give, of its gradients, and of what the first layer reads, in a pass."""
    forward, backward, read = set(), set(), []

    def note(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, torch.Tensor)
        forward.add(result.dtype)
        result.register_hook(lambda gradient: backward.add(gradient.dtype))  # type: ignore[no-untyped-call]
        read.append(inputs[0].dtype)

    for block in model.blocks():
        block.register_forward_hook(note)
    pass_of(model.train())
    return forward, backward, read[0]


@pytest.mark.parametrize("model_type", TYPES)
def test_what_layers_hand_on_has_the_type_in_every_family(model_type: str, tmp_path: Path) -> None:
    folder = tiny_model(model_type, tmp_path)
    # ELECTRA's embeddings end with a matrix product, and a CPU's norms give the type that they get.
    usual = torch.bfloat16 if model_type == "electra" else torch.float32
    assert stream_types(built(folder, "float32")) == ({usual}, {usual}, usual)
    assert stream_types(built(folder, "bf16")) == ({torch.bfloat16}, {torch.bfloat16}, torch.bfloat16)


@pytest.mark.parametrize("options", [{}, {"lora_bias": "all"}, {"tuning": "full", "lora_dropout": 0.1}])
def test_results_are_those_of_a_float32_stream_but_for_rounding(bert: Path, options: dict[str, object]) -> None:
    if options.get("tuning") == "full":
        options = {**options, "lora_target_modules": ("attention",)}
    exact = pass_of(built(bert, "float32", **options), "no")
    wide = pass_of(built(bert, "float32", **options))
    narrow = pass_of(built(bert, "bf16", **options))
    assert len(narrow) == len(wide) == len(exact)

    def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((found - wanted).norm() / wanted.norm())

    assert not torch.equal(narrow[0], wide[0])
    assert distance(narrow[0], exact[0]) < 0.02
    # Of all gradients together: some are next to nothing but rounding.
    found, wanted = (torch.cat([each.flatten() for each in results[1:]]) for results in (narrow, exact))
    assert distance(found, wanted) < 0.05


def test_a_norm_rounds_what_it_reads_and_gives_and_nothing_between() -> None:
    generator = torch.Generator().manual_seed(1)
    norm = nn.LayerNorm(768)
    with torch.no_grad():
        norm.weight.normal_(1, 0.2, generator=generator)
        norm.bias.normal_(0, 0.2, generator=generator)
    norm.__class__ = HalfStreamNorm
    # Far from zero, so that a mean or variance in bfloat16 would be far off.
    x = torch.randn(50, 768, generator=generator) + 30
    with autocast("cpu", "bf16"):
        found = norm(x)
    assert found.dtype == torch.bfloat16

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().bfloat16().double()

    wanted = nn.functional.layer_norm(rounded(x), (768,), rounded(norm.weight), rounded(norm.bias), norm.eps)
    assert ((found.double() - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-5).all()


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_in_other_precisions_no_bit_changes(bert: Path, precision: Precision) -> None:
    wanted, found = pass_of(built(bert, "float32"), precision), pass_of(built(bert, "bf16"), precision)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("lora_bias", ["none", "all"])
def test_frozen_norms_may_be_held_rounded_and_no_bit_changes(bert: Path, lora_bias: str) -> None:
    config = ModelConfig(model_name_or_path=str(bert), **LORA)  # type: ignore[arg-type]
    plain, spared = built(bert, "bf16", lora_bias=lora_bias), built(bert, "bf16", lora_bias=lora_bias)
    remove_redundant_casts(spared, config, "bf16", CPU, shards_one_type=False)
    norms = [part for part in spared.modules() if isinstance(part, HalfStreamNorm)]
    assert {norm.weight.dtype for norm in norms} == {torch.bfloat16}
    assert all(weight.dtype == torch.float32 for _, weight in spared.trainable())
    assert all(map(torch.equal, pass_of(spared), pass_of(plain)))


def test_names_and_weights_stay(bert: Path) -> None:
    wide, narrow = built(bert, "float32").state_dict(), built(bert, "bf16").state_dict()
    assert list(narrow) == list(wide)
    assert all(torch.equal(narrow[name], wide[name]) for name in wide)


def test_a_model_with_padded_batches_is_refused(tmp_path: Path) -> None:
    folder = tiny_model("albert", tmp_path)
    with pytest.raises(ConfigError, match="this albert model's are not; use --residual_dtype float32"):
        built(folder, "bf16", lora_target_modules=("attention",))


@pytest.mark.parametrize(
    ("model", "precision", "said"),
    [
        ({}, "bf16", None),
        ({}, "no", "--mixed_precision is no; use --mixed_precision bf16, or"),
        ({}, "fp16", "--mixed_precision is fp16; use --mixed_precision bf16, or"),
        ({"quantization": "4bit"}, "bf16", "--quantization 4bit leaves them in float32"),
        ({"padding": "sorted"}, "bf16", "--padding is sorted"),
    ],
)
def test_what_it_does_not_go_with(model: dict[str, str], precision: Precision, said: str | None) -> None:
    training = TrainingConfig(residual_dtype="bf16", mixed_precision=precision)
    config = RunConfig(model=ModelConfig(**model), training=training)  # type: ignore[arg-type]
    problems = [*training.problems(), *config.problems()]
    assert problems == [] if said is None else len(problems) == 1 and said in problems[0]
