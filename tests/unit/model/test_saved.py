"""What is not worth saving, or is not on disk as it is in memory, is refused; the folder stays as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qa_dist.common.errors import CheckpointError
from qa_dist.config.options import ModelConfig
from qa_dist.model.building import build_model
from qa_dist.model.saved import load_trained, save_trained
from qa_dist.model.span_model import SpanModel, Weights
from tests.tiny import tiny_model, tiny_tokenizer

NAME = "encoder.layer.1.attention.self.value.lora_B"


def build(folder: Path, **options: Any) -> SpanModel:
    config = ModelConfig(model_name_or_path=str(tiny_model("bert", folder)), **options)
    return build_model(config, seed=1, max_seq_length=64)[0]


@pytest.fixture
def model(tmp_path: Path) -> SpanModel:
    return build(tmp_path / "base")


def refused(model: SpanModel, trained: Weights, folder: Path) -> str:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"earlier")
    with pytest.raises(CheckpointError) as caught:
        save_trained(model, trained, tiny_tokenizer(), folder)
    assert [path.name for path in folder.iterdir()] == ["adapter_model.safetensors"]
    assert (folder / "adapter_model.safetensors").read_bytes() == b"earlier"
    return str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tensor: tensor[:0], "is empty and was not saved"),
        (lambda tensor: torch.full_like(tensor, float("nan")), "holds values that are not finite"),
        (lambda tensor: torch.full_like(tensor, float("inf")), "holds values that are not finite"),
    ],
)
def test_tensors_that_are_worth_nothing_are_named(
    model: SpanModel, tmp_path: Path, spoil: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    trained = {name: spoil(tensor.detach()) if NAME in name else tensor.detach() for name, tensor in model.trainable()}
    message = refused(model, trained, tmp_path / "out")
    assert said in message
    assert NAME in message


def test_a_full_disk_that_tokenizers_reports_is_an_error_of_the_file_system(model: SpanModel, tmp_path: Path) -> None:
    weights = {name: tensor.detach() for name, tensor in model.trainable()}

    class Full:
        def save_pretrained(self, folder: Path) -> None:
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device"):
        save_trained(model, weights, Full(), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_nothing_to_save_is_said(tmp_path: Path) -> None:
    model = build(tmp_path / "base", tuning="full")
    assert refused(model, {}, tmp_path / "out").startswith("there is nothing to save")


def test_peft_s_empty_card_is_not_even_made(model: SpanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: Any) -> None:
        raise AssertionError("its template takes longer than the weights")

    monkeypatch.setattr(type(model.model), "create_or_update_model_card", make)
    (tmp_path / "out").mkdir()
    weights = {name: tensor.detach() for name, tensor in model.trainable()}
    for _ in range(2):
        save_trained(model, weights, tiny_tokenizer(), tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(AssertionError, match="its template"):
        model.model.save_pretrained(str(tmp_path / "peft"))  # type: ignore[operator]


def test_an_adapter_is_read_on_the_cpu_whatever_devices_there_are(
    model: SpanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks would all bring it to GPU 0, which may have no room."""

    def infer() -> None:
        raise AssertionError("peft chooses a device by itself")

    (tmp_path / "out").mkdir()
    weights = {name: tensor.detach() for name, tensor in model.trainable()}
    save_trained(model, weights, tiny_tokenizer(), tmp_path / "out")
    monkeypatch.setattr("peft.peft_model.infer_device", infer)
    config = ModelConfig(model_name_or_path=str(tmp_path / "base"))
    found = load_trained(config, str(tmp_path / "out"), max_seq_length=64, tokenizer_pads_left=False)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in found.named_parameters()}


def lose(weights: Weights, name: str) -> None:
    del weights[name]


def alter(weights: Weights, name: str) -> None:
    weights[name][0, 0] += 1


@pytest.mark.parametrize(("harm", "said"), [(lose, "1 missing, 0 different"), (alter, "0 missing, 1 different")])
def test_what_is_read_back_is_compared(
    model: SpanModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Weights, str], None],
    said: str,
) -> None:
    peft_model: Any = model.model
    write = peft_model.save_pretrained

    def write_badly(directory: str, **options: Any) -> None:
        write(directory, **options)
        weights = load_file(Path(directory) / "adapter_model.safetensors")
        (name,) = (name for name in weights if NAME in name)
        harm(weights, name)
        save_file(weights, Path(directory) / "adapter_model.safetensors")

    monkeypatch.setattr(peft_model, "save_pretrained", write_badly)
    # No tensor equals another, which would pass for a tied one.
    generator = torch.Generator().manual_seed(1)
    trained = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in model.trainable()}
    message = refused(model, trained, tmp_path / "out")
    assert said in message
    assert NAME in message
