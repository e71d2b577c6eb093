"""Eight and four bits: what is quantised, what is not, and that it trains and comes back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qa_dist.common.errors import ConfigError
from qa_dist.config.options import ModelConfig
from qa_dist.config.parsing import parse
from qa_dist.model.building import build_model
from qa_dist.model.quantization import follow_autocast, quantization_options, require_quantized
from qa_dist.model.saved import load_trained, save_trained
from qa_dist.model.span_model import SpanModel, count_parameters, head_names, span_loss
from tests.tiny import MODEL_TYPES, tiny_model, tiny_tokenizer

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")

LENGTHS = (9, 40, 3, 25)
LENGTH = 64
KINDS = ("8bit", "4bit")


def built(folder: Path, kind: str, model_type: str = "bert", *, checkpointing: bool = False) -> SpanModel:
    base = folder if (folder / "config.json").exists() else tiny_model(model_type, folder)
    config = ModelConfig(
        model_name_or_path=str(base),
        quantization=kind,  # type: ignore[arg-type]
        lora_dropout=0.0,
        lora_target_modules=("all-linear",),
    )
    return build_model(config, seed=1, max_seq_length=LENGTH, gradient_checkpointing=checkpointing)[0]


def row() -> torch.Tensor:
    return torch.randint(5, 50, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))


def logits(model: SpanModel) -> torch.Tensor:
    ids_T = row()
    return torch.stack(model(ids_T, torch.zeros_like(ids_T), LENGTHS))


def loss(model: SpanModel) -> torch.Tensor:
    start_T, end_T = logits(model)
    labels = torch.tensor([[length // 4, length // 2] for length in LENGTHS])
    return span_loss(start_T, end_T, LENGTHS, labels).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_is_quantised_but_for_head_norms_and_embeddings(
    tmp_path: Path, model_type: str, kind: str
) -> None:
    model = built(tmp_path, kind, model_type)
    plain = model.model.get_base_model()  # type: ignore[operator]
    wanted = bitsandbytes.nn.Linear8bitLt if kind == "8bit" else bitsandbytes.nn.Linear4bit
    quantised = [name for name, module in plain.named_modules() if isinstance(module, wanted)]
    assert quantised
    heads = head_names(plain)
    assert not any(name.partition(".")[0] in heads for name in quantised)
    for name, parameter in plain.named_parameters():
        if parameter.dtype in (torch.int8, torch.uint8):
            assert name.endswith("base_layer.weight"), name
        else:
            assert parameter.dtype == torch.float32, name
    assert all(parameter.dtype == torch.float32 for _, parameter in model.trainable())
    # As many parameters as without: four bits are stored two to a byte.
    assert count_parameters(model) == count_parameters(built(tmp_path, "no", model_type))


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_comes_back(tmp_path: Path, kind: str) -> None:
    model = built(tmp_path / "base", kind)
    optimizer = torch.optim.AdamW([parameter for _, parameter in model.trainable()], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        losses.append(float(value.detach()))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    (tmp_path / "out").mkdir()
    weights = {name: parameter.detach() for name, parameter in model.trainable()}
    save_trained(model, weights, tiny_tokenizer(), tmp_path / "out")
    config = ModelConfig(model_name_or_path=str(tmp_path / "base"), quantization=kind)  # type: ignore[arg-type]
    again = load_trained(config, str(tmp_path / "out"), max_seq_length=LENGTH, tokenizer_pads_left=False)
    with torch.no_grad():
        torch.testing.assert_close(logits(again), logits(model.eval()), rtol=0, atol=1e-6)


def test_an_evaluation_leaves_the_weights_as_they_were_stored(tmp_path: Path) -> None:
    """Also on processors on which the library would pack them anew (AVX512-BF16)."""
    model = built(tmp_path, "4bit").eval()
    layers = [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
    # As the library finds it out for itself where the processor has these instructions.
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    before = [(layer.weight.detach().clone(), layer.weight.quant_state.absmax.clone()) for layer in layers]
    with torch.no_grad():
        logits(model)
    for layer, (weight, scales) in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.weight.quant_state.absmax, scales)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_follow_autocast_where_they_are_told_to(tmp_path: Path, kind: str) -> None:
    model = built(tmp_path, kind)
    follow_autocast(model)
    plain = model.model.get_base_model()  # type: ignore[operator]
    quantised = bitsandbytes.nn.Linear8bitLt if kind == "8bit" else bitsandbytes.nn.Linear4bit
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for module in plain.modules():
        if isinstance(module, quantised):
            module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        halved = loss(model)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    halved.backward()
    seen.clear()
    whole = loss(model)
    assert set(seen) == {(torch.float32, torch.float32)}
    torch.testing.assert_close(halved, whole, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_feature_does_not_see_its_neighbours(tmp_path: Path, kind: str) -> None:
    model = built(tmp_path, kind).eval()
    with torch.no_grad():
        whole = logits(model)
        first = LENGTHS[0]
        ids_T = row()[first : first + LENGTHS[1]]
        alone = torch.stack(model(ids_T, torch.zeros_like(ids_T), LENGTHS[1:2]))
    # Rounding to integers may fall either way where a value lies between two; an outlier threshold would do far more.
    torch.testing.assert_close(
        whole[:, first : first + LENGTHS[1]], alone, rtol=0, atol=0.02 * float(whole.abs().max())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_stays_close_to_the_plain_model(tmp_path: Path, kind: str) -> None:
    with torch.no_grad():
        plain, quantised = (logits(built(tmp_path, each).eval()) for each in ("no", kind))
    difference = float((quantised - plain).norm() / plain.norm())
    assert 0 < difference < (0.05 if kind == "8bit" else 0.4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_has_the_same_gradients(tmp_path: Path, kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = built(tmp_path, kind, checkpointing=checkpointing)
        model.train()
        loss(model).backward()
        gradients.append({name: parameter.grad for name, parameter in model.trainable()})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_loaded_onto_the_ranks_own_device(kind: Any) -> None:
    device = torch.device("cuda", 3)
    options = quantization_options(kind, ("qa_outputs",), device)
    assert options["device_map"] == {"": device}
    assert options["quantization_config"].llm_int8_skip_modules == ["qa_outputs"]
    assert quantization_options("no", (), device) == {}


def test_what_is_not_quantised_is_noticed() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "qa_outputs": nn.Linear(4, 2)})
    with pytest.raises(ConfigError, match="left encoder not quantised"):
        require_quantized(model, "8bit", ("qa_outputs",))
    model = nn.ModuleDict({"qa_outputs": bitsandbytes.nn.Linear8bitLt(4, 2)})
    with pytest.raises(ConfigError, match="left qa_outputs quantised"):
        require_quantized(model, "8bit", ("qa_outputs",))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tuning", "full"], "freezes what --tuning full trains"),
        (["--model_config", "bert-base"], "--model_config has none"),
        (["--quantization", "2bit"], "is not one of no, 8bit, 4bit"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse(["--output_dir", "out", "--quantization", "8bit", *words], prog="test", description="")


def test_without_bitsandbytes_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install it with: pip install 'qa-dist\[quant\]'"):
        built(tmp_path, "8bit")
