"""A run that goes on from an adapter begins with its numbers, or says what does not fit."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qa_dist import train
from qa_dist.common.errors import CheckpointError, ConfigError
from qa_dist.config.options import ModelConfig
from qa_dist.model.building import build_model
from qa_dist.model.initial import require_fitting_adapter, require_its_tokenizer, start_from_adapter
from qa_dist.model.pretrained import load_tokenizer
from qa_dist.model.saved import save_trained
from tests.refusals import refusal
from tests.tiny import tiny_model, tiny_squad, tiny_tokenizer
from tests.unit.trained import options_of, reset_accelerate, words


def saved(folder: Path, **options: Any) -> ModelConfig:
    """An adapter in folder/adapter that is far from a new one, and what it was built from."""
    config = ModelConfig(model_name_or_path=str(tiny_model("bert", folder / "model")), **options)
    model, _ = build_model(config, seed=1, max_seq_length=64)
    generator = torch.Generator().manual_seed(2)
    weights = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in model.trainable()}
    (folder / "adapter").mkdir()
    save_trained(model, weights, tiny_tokenizer(), folder / "adapter")
    return config


def started(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    given = {"model_name_or_path": str(folder / "model"), **options}
    config = ModelConfig(init_adapter=str(folder / "adapter"), **given)
    model, _ = build_model(config, seed=9, max_seq_length=64)
    start_from_adapter(model, config)
    return {name: tensor.detach() for name, tensor in model.trainable()}


def test_it_begins_with_the_adapter_s_numbers(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = started(tmp_path)
    assert len(found) == len(weights) == 10
    for name, tensor in found.items():
        short = name.replace(".default", "").replace(".modules_to_save", "")
        assert torch.equal(tensor, weights[short]), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_r": 4}, "has r 8 and this run 4; give --lora_r 8"),
        ({"lora_alpha": 2.0}, "has lora_alpha 16"),
        ({"use_rslora": True}, "give --use_rslora false"),
        ({"lora_bias": "all"}, "has bias none and this run all; give --lora_bias none"),
        ({"lora_target_modules": ("query",)}, "give --lora_target_modules query,value"),
    ],
    ids=str,
)
def test_another_shape_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ConfigError, match=said):
        started(tmp_path, **options)


def test_another_base_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    other = str(tiny_model("bert", tmp_path / "other", seed=5))
    with pytest.raises(ConfigError, match=r"was trained on .* and not on --model_name_or_path"):
        started(tmp_path, model_name_or_path=other)


def foreign(folder: Path, **options: Any) -> None:
    """An adapter in folder/adapter as peft's own functions make one, on the model in folder/model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForQuestionAnswering

    base = AutoModelForQuestionAnswering.from_pretrained(tiny_model("bert", folder / "model"))
    kind = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "task_type": "QUESTION_ANS", **options}
    get_peft_model(base, LoraConfig(**kind)).save_pretrained(folder / "adapter")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha_pattern": {"query": 32}}, "has alpha_pattern {'query': 32}"),
        ({"rank_pattern": {"query": 2}}, "has rank_pattern"),
        ({"layers_to_transform": [1]}, "has layers_to_transform [1]"),
        ({"bias": "lora_only"}, "has bias lora_only"),
        ({"trainable_token_indices": [5, 6]}, "has trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "takes part of the base model's weights away"),
        ({"target_modules": r".*\.(query|value)"}, "a pattern as target_modules"),
        ({"modules_to_save": ["word_embeddings"]}, "word_embeddings.weight, which a run here would not train on"),
    ],
    ids=str,
)
def test_what_loading_the_tensors_alone_would_lose_is_refused(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    foreign(tmp_path, **options)
    with pytest.raises(ConfigError) as caught:
        started(tmp_path)
    assert said in str(caught.value)
    assert "qa-dist merge" in str(caught.value)


def test_an_adapter_of_peft_s_own_functions_is_gone_on_from(tmp_path: Path) -> None:
    foreign(tmp_path)
    assert len(started(tmp_path)) == 10


def test_an_adapter_whose_file_is_cut_off_is_refused_before_features_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(saved(tmp_path), init_adapter=str(tmp_path / "adapter"))
    require_fitting_adapter(config)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"safetensors cannot be read \(.*\); copy the folder again"):
        require_fitting_adapter(config)
    tiny_squad(tmp_path / "train.json", 12, seed=1, longest=30)
    options = {**options_of(tmp_path), "output_dir": str(tmp_path / "out"), "init_adapter": str(tmp_path / "adapter")}
    reset_accelerate()
    message = refusal(train.main, words({**options, "store_dir": str(tmp_path / "store")}), capsys)
    assert "copy the folder again" in message
    assert not list((tmp_path / "store").glob("**/manifest.json"))


def test_a_run_that_goes_on_has_the_adapter_s_tokenizer(tmp_path: Path) -> None:
    config = saved(tmp_path)
    going_on = dataclasses.replace(config, init_adapter=str(tmp_path / "adapter"))
    require_its_tokenizer(going_on, load_tokenizer(going_on))
    other = tiny_tokenizer(words=("ostrel", "kerrow"))
    other.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"a tokenizer of its own, .*; give --tokenizer_name .*adapter"):
        require_its_tokenizer(going_on, load_tokenizer(going_on))
    named = dataclasses.replace(going_on, tokenizer_name=str(tmp_path / "adapter"))
    require_its_tokenizer(named, load_tokenizer(named))
    require_its_tokenizer(config, load_tokenizer(config))


def test_a_run_goes_on_and_a_checkpoint_of_another_beginning_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path)
    tiny_squad(tmp_path / "train.json", 12, seed=1, longest=30)
    options = {**options_of(tmp_path), "output_dir": str(tmp_path / "out"), "num_train_epochs": "1"}
    again = {"init_adapter": str(tmp_path / "adapter")}
    reset_accelerate()
    assert train.main(words({**options, **again})) == 0
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    moved = {name: float((before[name] - after[name]).abs().max()) for name in before}
    assert 0 < max(moved.values()) < 0.1
    capsys.readouterr()
    reset_accelerate()
    message = refusal(train.main, words({**options, "resume_from_checkpoint": "auto"}), capsys)
    assert "initial adapter is absent here" in message


def test_an_adapter_named_as_a_model_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path)
    tiny_squad(tmp_path / "train.json", 12, seed=1, longest=30)
    reset_accelerate()
    options = {**options_of(tmp_path), "model_name_or_path": str(tmp_path / "adapter")}
    assert "--init_adapter" in refusal(train.main, words({**options, "output_dir": str(tmp_path / "out")}), capsys)


def test_a_whole_model_is_no_adapter_to_go_on_from(tmp_path: Path) -> None:
    config = saved(tmp_path)
    with pytest.raises(ConfigError, match=r"model holds a whole model; go on from it with --model_name_or_path$"):
        require_fitting_adapter(dataclasses.replace(config, init_adapter=str(tmp_path / "model")))
