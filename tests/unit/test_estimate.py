"""`qa-dist estimate`: what it prints, what it refuses, and that its sizes are those of a model that is built."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from qa_dist import estimate
from qa_dist.config.optimizers import OPTIMIZERS
from qa_dist.config.options import ModelConfig
from qa_dist.memory import tracing
from qa_dist.memory.estimate import num_bytes, sizes_of
from qa_dist.model.building import build_meta_model, build_model
from qa_dist.model.span_model import SpanModel, head_parameters
from tests.refusals import sentence
from tests.tiny import MODEL_TYPES, tiny_model


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("80GB", 80 * 10**9),
        ("1.5 MiB", 3 * 2**19),
        ("123", 123),
        ("7kB", 7000),
        *((text, None) for text in ("", "GiB", "24G", "24gib", "-1GB", "1e9", "0", "0GiB", "12 GiB per rank")),
    ],
)
def test_sizes_of_memory(text: str, size: int | None) -> None:
    assert num_bytes(text) == size


def stored(model: SpanModel) -> dict[str, int]:
    return {name: tensor.numel() * tensor.element_size() for name, tensor in model.model.named_parameters()}


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sizes_are_those_of_the_model_that_trains(
    tmp_path: Path, model_type: str, tuning: Literal["lora", "full"]
) -> None:
    config = ModelConfig(model_name_or_path=str(tiny_model(model_type, tmp_path)), tuning=tuning)
    real, _ = build_model(config, seed=0, max_seq_length=64)
    meta_model = build_meta_model(config, max_seq_length=64)
    assert all(tensor.device.type == "meta" for tensor in meta_model.parameters())
    assert stored(meta_model) == stored(real)
    sizes = sizes_of(meta_model)
    assert sizes == sizes_of(real)
    assert sizes.total_bytes == sum(stored(real).values())
    weights = dict(real.trainable())
    assert sizes.trained_bytes == sum(weight.nbytes for weight in weights.values())
    heads = set(head_parameters(real))
    new = [weight for name, weight in weights.items() if "lora_" in name or name in heads]
    assert sizes.new == sum(weight.numel() for weight in new)
    assert (sizes.new == sum(sizes.trained)) == (tuning == "lora")
    blocks = [sum(weight.nbytes for weight in block.parameters()) for block in real.blocks()]
    assert sizes.largest_block == max(blocks)
    assert sizes.outside == sizes.total_bytes - sum(blocks)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_quantised_weights_come_with_their_scales(tmp_path: Path, kind: Literal["8bit", "4bit"]) -> None:
    pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")
    config = ModelConfig(model_name_or_path=str(tiny_model("bert", tmp_path)), quantization=kind)
    real, _ = build_model(config, seed=0, max_seq_length=64)
    meta_model = build_meta_model(config, max_seq_length=64)
    assert stored(meta_model) == stored(real)
    assert sizes_of(meta_model) == sizes_of(real)
    assert sizes_of(real).total_bytes > sum(stored(real).values())
    plain, _ = build_model(dataclasses.replace(config, quantization="no"), seed=0, max_seq_length=64)
    floats = {name for name, tensor in real.model.named_parameters() if tensor.is_floating_point()}
    quantised = [tensor.numel() for name, tensor in plain.model.named_parameters() if name not in floats]
    assert sizes_of(meta_model).quantised == sum(quantised) > 0
    assert sizes_of(plain).quantised == 0


def test_the_optimisers_state_is_what_is_said(tmp_path: Path) -> None:
    model, _ = build_model(ModelConfig(model_name_or_path=str(tiny_model("bert", tmp_path))), seed=0, max_seq_length=64)
    weights = [weight for _, weight in model.trainable()]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    held = sum(state[kind].nbytes for state in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq"))
    assert held == sum(OPTIMIZERS["adamw"].moment_bytes(elements) for elements in sizes_of(model).trained)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model("bert", tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qa_dist.memory.estimate.process_bytes", lambda modules: 300 * 2**20)


@pytest.fixture(scope="module")
def passes() -> dict[Any, Any]:
    """What was traced, by all that it depends on here."""
    return {}


@pytest.fixture(autouse=True)
def _trace_once(monkeypatch: pytest.MonkeyPatch, passes: dict[Any, Any]) -> None:
    """Trace a pass of the one model once: it takes seconds."""
    real = tracing.trace_passes

    def trace_passes(model: SpanModel, sizes: Any, **options: Any) -> Any:
        # The text of a model says what is dropped.
        key = (sizes_of(model), repr(model), tuple(sizes), *options.items())
        if key not in passes:
            passes[key] = real(model, sizes, **options)
        return passes[key]

    monkeypatch.setattr(tracing, "trace_passes", trace_passes)


def estimated(capsys: pytest.CaptureFixture[str], model: str, *words: str) -> dict[str, Any]:
    common = ["--model_name_or_path", model, "--max_seq_length", "64", "--doc_stride", "16", "--json"]
    assert estimate.main([*common, *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_strategy_that_goes_with_the_options(capsys: pytest.CaptureFixture[str], model: str) -> None:
    found = estimated(capsys, model, "--num_processes", "2", "--device", "cpu", "--device_memory", "1GiB")
    by_name = {each["strategy"]: each for each in found["estimates"]}
    assert list(by_name) == ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    assert found["refused"] == {}
    for each in by_name.values():
        assert each["max_tokens_per_device"] == 1024
        assert each["device_bytes"] == sum(each["device_parts"].values())
        assert each["device_parts"]["process"] == 300 * 2**20
        assert each["largest_max_tokens_per_device"] > 10_000
    whole, cut = by_name["ddp"]["device_parts"], by_name["zero3"]["device_parts"]
    assert cut["base weights"] == -(-whole["base weights"] // 2)


def test_features_that_are_computed_twice_take_a_pass_of_twice_the_tokens(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    words = ["--strategy", "ddp", "--device", "cpu", "--device_memory", "1GiB", "--max_tokens_per_device"]
    (twice,) = estimated(capsys, model, *words, "512", "--rdrop_alpha", "1")["estimates"]
    (once,) = estimated(capsys, model, *words, "1024")["estimates"]
    assert twice["device_bytes"] == once["device_bytes"]
    assert twice["largest_max_tokens_per_device"] == once["largest_max_tokens_per_device"] // 2


def test_the_largest_budget_is_estimated_to_fill_the_device(capsys: pytest.CaptureFixture[str], model: str) -> None:
    words = ["--strategy", "ddp", "--device", "cpu", "--device_memory", "1GiB", "--checkpointing_steps", "no"]
    (first,) = estimated(capsys, model, *words)["estimates"]
    tokens = str(first["largest_max_tokens_per_device"])
    (full,) = estimated(capsys, model, *words, "--max_tokens_per_device", tokens)["estimates"]
    assert full["device_bytes"] == pytest.approx(0.9 * 2**30, rel=1e-4)


def test_without_cuda_a_gpu_is_estimated_and_the_reader_told(capsys: pytest.CaptureFixture[str], model: str) -> None:
    found = estimated(capsys, model, "--device", "cuda", "--device_memory", "8GiB", "--quantization", "no")
    assert all("process" not in each["device_parts"] for each in found["estimates"])
    assert all(each["max_tokens_per_device"] == each["largest_max_tokens_per_device"] for each in found["estimates"])
    if not torch.cuda.is_available():
        assert any("torch finds no CUDA here" in note for note in found["notes"])


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_dropout_in_attention_on_a_gpu_is_estimated(
    capsys: pytest.CaptureFixture[str], model: str, precision: str
) -> None:
    words = ("--device", "cuda", "--device_memory", "8GiB", "--strategy", "ddp", "--quantization", "no")
    words += ("--mixed_precision", precision)
    (plain,) = estimated(capsys, model, *words, "--model_dropout", "0")["estimates"]
    (dropping,) = estimated(capsys, model, *words, "--model_dropout", "0.1")["estimates"]
    per_token = [
        each["device_parts"]["activations"] / each["largest_max_tokens_per_device"] for each in (plain, dropping)
    ]
    bert = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    # What the two dropouts of a layer leave is kept beside what went in. Attention's masks are not: they are drawn
    # again in the backward pass.
    kept = 2 * bert["num_hidden_layers"] * bert["hidden_size"] * (2 if precision == "bf16" else 4)
    assert per_token[1] - per_token[0] == pytest.approx(kept, abs=1)


def test_what_does_not_go_together_is_left_out_with_its_reason(capsys: pytest.CaptureFixture[str], model: str) -> None:
    found = estimated(capsys, model, "--device", "cpu", "--mixed_precision", "fp16")
    assert [each["strategy"] for each in found["estimates"]] == ["ddp"]
    assert list(found["refused"]) == ["zero1", "zero2", "zero3", "fsdp2"]
    assert found["refused"]["zero3"].startswith("--mixed_precision fp16 does not work with zero3")


def test_the_table(capsys: pytest.CaptureFixture[str], model: str) -> None:
    words = ["--model_name_or_path", model, "--max_seq_length", "64", "--doc_stride", "16"]
    assert estimate.main([*words, "--device", "cuda", "--device_memory", "8GiB", "--cpu_offload"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["MiB", "of", "each", "rank", "zero1", "zero2", "zero3"]
    rows = [line.partition("  ")[0] for line in lines]
    for part in ("base weights", "gradients", "sharing", "together", "in the host's memory", "optimiser"):
        assert part in rows
    assert rows.index("together") < rows.index("in the host's memory") < rows.index("optimiser")
    assert any("--cpu_offload does not work with ddp" in line for line in lines)
    assert any("layers that --torch_compile compiles hold as much" in line for line in lines)


def test_strategies_whose_library_is_missing_are_left_out_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "deepspeed" else find(name))
    words = ["--device_memory", "1GiB", "--device"]
    found = estimated(capsys, model, *words, "cpu")
    assert [each["strategy"] for each in found["estimates"]] == ["ddp", "fsdp2"]
    assert list(found["refused"]) == ["zero1", "zero2", "zero3"]
    assert "install it with: pip install 'qa-dist[deepspeed]'" in found["refused"]["zero2"]
    # Nothing of it is loaded to say what a GPU holds.
    assert estimated(capsys, model, *words, "cuda")["refused"] == {}
    assert estimate.main(["--model_name_or_path", model, "--strategy", "zero2", *words, "cpu"]) == 2
    assert "--strategy zero2 with --device cpu needs deepspeed; install it with:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device_memory", "24G"], "--device_memory 24G is no size; write it as 24GiB"),
        (["--device_memory", "24"], "24 is 24 bytes, less than any device has; name the unit, as in 24GiB"),
        (["--device_memory", "67108863"], "is 67,108,863 bytes, less than any device has"),
        (["--strategy", "zero2", "--mixed_precision", "fp16"], "--mixed_precision fp16 does not work with zero2"),
        (["--cpu_offload", "--strategy", "ddp"], "--cpu_offload does not work with ddp"),
        (["--torch_compile", "model"], "--torch_compile model keeps other tensors"),
        (["--tuning", "full", "--quantization", "8bit"], "freezes what --tuning full trains"),
        (["--num_processes", "0"], "--num_processes 0 is out of range"),
        (["--rdrop_alpha", "2", "--model_dropout", "0", "--lora_dropout", "0"], "and this model drops nothing"),
        (["--init_adapter", "no/such"], "no/such"),
        (["--max_tokens_per_device", "40"], "--max_tokens_per_device 40 is less than one feature"),
    ],
)
def test_mistakes_are_sentences(capsys: pytest.CaptureFixture[str], model: str, words: list[str], said: str) -> None:
    common = ["--model_name_or_path", model, "--max_seq_length", "64", "--doc_stride", "16"]
    assert estimate.main([*common, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_model_whose_memory_cannot_be_traced_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model("longformer", tmp_path)
    words = ["--model_name_or_path", str(folder), "--max_seq_length", "64", "--doc_stride", "16", "--strategy", "ddp"]
    assert estimate.main(words) == 2
    assert "the memory of a longformer model cannot be estimated" in sentence(capsys.readouterr().err)


def test_a_refused_model_starts_no_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr("qa_dist.memory.estimate.process_bytes", started.append)
    folder = tiny_model("xmod", tmp_path)
    assert estimate.main(["--model_name_or_path", str(folder), "--device", "cpu", "--mixed_precision", "bf16"]) == 2
    assert "does not work for a model of type xmod" in sentence(capsys.readouterr().err)
    assert started == []
