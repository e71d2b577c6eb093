"""An adapter over random weights (`--model_config`) names no base model, and nothing looks for one."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qa_dist import ask, calibrate, evaluate, export, merge, train
from tests.refusals import refusal
from tests.tiny import tiny_model, tiny_squad, tiny_tokenizer
from tests.unit.trained import options_of, reset_accelerate, words

SENTENCE = "belongs to random weights (--model_config), which are not kept; train on a checkpoint to use the result"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """adapter/, trained over weights of the size of model/, and train.json."""
    folder = tmp_path_factory.mktemp("random")
    tiny_model("bert", folder / "model")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    tiny_squad(folder / "train.json", 12, seed=1, longest=30)
    options: dict[str, Any] = {**options_of(folder), "output_dir": str(folder / "adapter"), "num_train_epochs": "1"}
    del options["model_name_or_path"]
    options |= {"model_config": str(folder / "model"), "tokenizer_name": str(folder / "tokenizer"), "lora_alpha": "8"}
    reset_accelerate()
    assert train.main(words(options)) == 0
    return folder


def test_no_base_model_is_named_and_a_whole_alpha_is_written_as_one(folder: Path) -> None:
    for place in ("adapter", "adapter/best"):
        text = (folder / place / "adapter_config.json").read_text(encoding="utf-8")
        assert json.loads(text)["base_model_name_or_path"] == ""
        assert '"lora_alpha": 8,' in text


@pytest.mark.parametrize(
    ("main", "options"),
    [
        (evaluate.main, ["--adapter", "{}"]),
        (merge.main, ["--adapter", "{}", "--merged_dir", "{}-merged"]),
        (calibrate.main, ["--model", "{}"]),
        (export.main, ["--model", "{}", "--output_dir", "{}-exported"]),
        (ask.main, ["--model", "{}", "--context_file", "{}/metrics.json"]),
    ],
    ids=["evaluate", "merge", "calibrate", "export", "ask"],
)
def test_what_needs_the_base_model_says_that_there_is_none(
    folder: Path, capsys: pytest.CaptureFixture[str], main: Callable[[Sequence[str]], int], options: list[str]
) -> None:
    reset_accelerate()
    assert SENTENCE in refusal(main, [word.format(folder / "adapter") for word in options], capsys)


def test_a_run_does_not_go_on_from_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reset_accelerate()
    options = {**options_of(folder), "output_dir": str(tmp_path / "out"), "init_adapter": str(folder / "adapter")}
    message = refusal(train.main, words(options), capsys)
    assert f"was trained on random weights (--model_config {folder / 'model'}), which are not kept" in message
