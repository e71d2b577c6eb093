"""Compiled layers: one graph for all of them and for all rows, the same results, and eager layers where it fails."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from qa_dist.config.options import ModelConfig, RunConfig, TrainingConfig
from qa_dist.model import compiling
from qa_dist.model.building import build_model
from qa_dist.model.compiling import difference, missing_tool, obstacle, try_layers
from qa_dist.model.dropout import seed_dropout
from qa_dist.model.lora_layers import GroupedAdapters, group_layers
from qa_dist.model.saved import save_trained
from qa_dist.model.span_model import SpanModel, span_loss
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unit.model import test_residual_stream as residual_stream
from tests.unit.model.test_building import build as build_plain
from tests.unit.model.test_building import row

CPU = torch.device("cpu")
LONGEST = 64
ONE_ADAPTER: dict[str, Any] = {"lora_target_modules": ("value",)}
"""What is compiled takes as long again for another adapter in a layer; several are in one of the tests."""


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(folder: Path, *, dropout: float = 0.0, **options: Any) -> SpanModel:
    """A model as `--torch_compile layers` builds it, before its layers are compiled."""
    if options.get("tuning") != "full":
        options["lora_dropout"] = dropout
    config = ModelConfig(model_name_or_path=str(folder), model_dropout=dropout, **options)
    model, _ = build_model(config, seed=1, max_seq_length=LONGEST, torch_compile="layers")
    with torch.no_grad():
        for name, weight in model.trainable():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    return model


def batches(number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]]:
    """Rows of all kinds of lengths, sizes of the model and single features among them."""
    rng = np.random.default_rng(3)
    drawn = [tuple(rng.integers(3, LONGEST + 1, rng.integers(1, 9)).tolist()) for _ in range(number)]
    for lengths in [(LONGEST,), (32,), (16, 16), (3,), *drawn][:number]:
        tokens = torch.from_numpy(rng.integers(5, 50, sum(lengths)))
        yield tokens, torch.zeros_like(tokens), lengths


def train(model: SpanModel, batch: tuple[torch.Tensor, torch.Tensor, tuple[int, ...]], step: int) -> dict[str, Any]:
    """Logits and gradients of a pass in training."""
    labels = torch.tensor([[length // 3, length // 2] for length in batch[2]])
    model.zero_grad(set_to_none=True)
    seed_dropout(5, step, 0, CPU)
    start_T, end_T = model.train()(*batch)
    span_loss(start_T, end_T, batch[2], labels).mean().backward()
    gradients = {name: weight.grad for name, weight in model.trainable()}
    return {"start": start_T.detach(), "end": end_T.detach(), **gradients}


def evaluate(model: SpanModel, batch: tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]) -> dict[str, Any]:
    with torch.no_grad():
        start_T, end_T = model.eval()(*batch)
    return {"start": start_T, "end": end_T}


def num_graphs() -> int:
    assert not counters["graph_break"], dict(counters["graph_break"])
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_the_compiler_gives_what_the_layers_gave_for_any_row_with_the_same_dropout(tmp_path: Path) -> None:
    folder = tiny_model("bert", tmp_path)
    plain, compiled = (build(folder, dropout=0.1, **ONE_ADAPTER) for _ in range(2))
    # Masks as torch draws them one by one. The compiler's own are others, also drawn from the default generator.
    # Kernels that use no processor's own instructions are compiled sooner, and need no trial of these.
    with torch._inductor.config.patch({"fallback_random": True, "cpp.vec_isa_ok": False}):
        torch._inductor.metrics.reset()
        compiled.compile_layers()
        for step, batch in enumerate(batches(50)):
            for found, wanted in (
                (train(compiled, batch, step), train(plain, batch, step)),
                (evaluate(compiled, batch), evaluate(plain, batch)),
            ):
                assert found.keys() == wanted.keys()
                largest = max(float(tensor.abs().max()) for tensor in wanted.values())
                for name, tensor in wanted.items():
                    torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-6 * largest, msg=name)
    assert num_graphs() == 2
    # Of the two passes of a layer in training, and of one in evaluation; masks are drawn outside of them here.
    assert 0 < torch._inductor.metrics.generated_kernel_count <= 60


@pytest.mark.parametrize(
    ("model_type", "options", "kinds"),
    [
        ("bert", {"is_grouped": True, "lora_target_modules": ("all-linear",)}, 1),
        ("roberta", {"tuning": "full"}, 1),
        # The first layer has no norm, and after each layer with a window comes one without.
        ("modernbert", {}, 3),
    ],
)
def test_one_graph_for_training_and_one_for_evaluation_made_at_the_start(
    model_type: str, options: dict[str, Any], kinds: int, tmp_path: Path
) -> None:
    is_grouped = options.get("is_grouped", False)
    model = build(
        tiny_model(model_type, tmp_path, num_layers=max(2, kinds)),
        **{name: value for name, value in options.items() if name != "is_grouped"},
    )
    if is_grouped:
        # As they train on CUDA.
        GroupedAdapters(model, group_layers(model, torch.float32))
    assert try_layers(model, "no", CPU, backend="eager") is None
    assert num_graphs() == 2 * kinds
    for step, batch in enumerate(batches(12)):
        train(model, batch, step)
        evaluate(model, batch)
    assert num_graphs() == 2 * kinds


def test_with_dropout_what_is_compared_is_a_graph_of_its_own_and_nothing_is_left_changed(tmp_path: Path) -> None:
    model = build(tiny_model("bert", tmp_path), dropout=0.1, **ONE_ADAPTER)
    with torch.no_grad():
        for name, weight in model.trainable():
            if "lora_B" in name:
                weight.zero_()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    assert try_layers(model, "no", CPU, backend="eager") is None
    assert num_graphs() == 3
    assert torch.equal(torch.get_rng_state(), random)
    assert all(part.training for part in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not model.is_thread_safe
    # What is written is what is written without.
    weights = {name: weight.detach() for name, weight in model.trainable()}
    for name in ("compiled", "plain"):
        (tmp_path / name).mkdir()
        save_trained(model, weights, tiny_tokenizer(), tmp_path / name)
        model.leave_layers()
    written = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("compiled", "plain")]
    assert written[0] == written[1]


def broken(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A compiler that changes the first output of what it is given."""

    def compile_graph(graph: Any, _: Any) -> Callable[..., Any]:
        def compute(*inputs: Any) -> tuple[Any, ...]:
            first, *others = graph(*inputs)
            return change(first), *others

        return compute

    return compile_graph


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda hidden: hidden * 1.01, "the logits would differ by"),
        (lambda hidden: hidden + (hidden.detach() - hidden) * 0.5, "the gradient of"),
        (lambda hidden: hidden * float("nan"), "the logits would differ by nan"),
    ],
    ids=["other values", "other gradients", "no numbers"],
)
def test_layers_that_compute_something_else_are_left_as_they_were(
    change: Callable[[torch.Tensor], torch.Tensor], what: str, tmp_path: Path
) -> None:
    model = build(tiny_model("bert", tmp_path), **ONE_ADAPTER)
    batch = next(batches(1))
    before = train(model, batch, 0)
    problem = try_layers(model, "no", CPU, backend=broken(change))  # type: ignore[arg-type]
    assert problem is not None
    assert problem.startswith(what)
    assert "rounding explains" in problem
    assert model.is_thread_safe
    assert all(torch.equal(tensor, before[name]) for name, tensor in train(model, batch, 0).items())


def test_a_compiler_that_fails_is_said_in_a_clause(tmp_path: Path) -> None:
    def fail(*_: Any) -> Any:
        raise OSError("no space left on device")

    model = build(tiny_model("bert", tmp_path), **ONE_ADAPTER)
    problem = try_layers(model, "no", CPU, backend=fail)  # type: ignore[arg-type]
    assert problem is not None
    assert problem.startswith("torch.compile fails (")
    assert "no space left on device" in problem
    assert evaluate(model, next(batches(1)))["start"].isfinite().all()


def test_rounding_is_measured_and_a_gradient_of_nothing_else_is_no_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, gradient = (torch.randn(100, generator=generator) for _ in range(2))

    def results(error: float, noise: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(noise)
        rounding = [error * torch.randn(100, generator=generator) for _ in range(3)]
        return {"the logits": logits + rounding[0], "a": gradient + rounding[1], "a key's bias": rounding[2]}

    wanted = results(0.01, 1)
    assert difference(results(0.01, 2), wanted, results(0.01, 3), "bf16") is None
    assert difference(results(0.5, 2), wanted, results(0.01, 3), "bf16") is not None
    # However coarse rounding is, a gradient of another size is another gradient.
    other = {**results(0.01, 2), "a": gradient * 0}
    assert difference(other, wanted, results(0.9, 3), "bf16") is not None
    found = results(0.01, 2)
    del found["a"]
    assert difference(found, wanted, wanted, "bf16") == "gradients are missing or too many (a)"


@pytest.mark.parametrize(
    ("options", "strategy", "clause"),
    [
        ({}, "ddp", None),
        ({}, "zero2", None),
        ({}, "fsdp2", "fsdp2 gathers weights between the operations"),
        ({"gradient_checkpointing": True}, "ddp", "--gradient_checkpointing computes them twice"),
        ({"quantization": "4bit"}, "ddp", "layers in 4 bits are those of bitsandbytes"),
    ],
)
def test_what_speaks_against_compiling(
    options: dict[str, Any], strategy: str, clause: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "missing_tool", lambda device_type: None)
    model = build(tiny_model("bert", tmp_path))
    quantization = options.pop("quantization", "no")
    config = RunConfig(model=ModelConfig(quantization=quantization), training=TrainingConfig(**options))
    assert obstacle(model, config, CPU, strategy) == clause
    padded = build(tmp_path, padding="sorted")
    assert obstacle(padded, config, CPU, strategy) == "batches of this model are padded"


def test_tools_that_a_machine_lacks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert missing_tool("cuda") == "there is no C compiler (gcc)"
    compiler = tmp_path / "mycc"
    compiler.write_text("#!/bin/sh\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert missing_tool("cuda") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_tool("cuda") == "the package triton is not installed"


# -------------------------------------------------------------------------------------------------- a whole encoder


@pytest.mark.parametrize("padding", ["unpadded", "sorted"])
def test_a_compiled_encoder_gives_the_same_and_does_not_compile_again(padding: str, tmp_path: Path) -> None:
    # One layer with one adapter: another one takes as long again, and so does tracing the backward pass.
    backend = "aot_eager" if padding == "unpadded" else "eager"
    model_dir = tiny_model("bert", tmp_path, num_layers=1)
    options = {"padding": padding, "lora_target_modules": ("value",)}
    plain, compiled = build_plain(model_dir, **options), build_plain(model_dir, **options)
    compiled.compile_encoder(backend)
    batches = [(4, 30, 9), (17, 64), (5, 6, 7, 8, 9, 31), (128, 3), (77,), (20, 21, 22, 23)]
    graphs = []
    for lengths in batches:
        ours, theirs = plain.train()(*row(lengths)), compiled.train()(*row(lengths))
        for mine, compiled_one in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, compiled_one, rtol=0, atol=1e-5)
        (theirs[0].sum() + theirs[1].sum()).backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] >= 1
    # A single feature makes a batch of one, which a padded model may specialise on.
    assert graphs[-1] <= graphs[0] + (padding == "sorted")


def test_layers_with_a_narrow_residual_stream_are_compiled_without_a_break(tmp_path: Path) -> None:
    model = residual_stream.built(tiny_model("bert", tmp_path), "bf16")
    wanted = residual_stream.pass_of(model)
    model.zero_grad()
    model.compile_layers("eager")
    for found, of_layers in zip(residual_stream.pass_of(model), wanted, strict=True):
        torch.testing.assert_close(found, of_layers, rtol=0.02, atol=1e-3)
    # The first layer's input takes no gradient.
    assert num_graphs() == 2
