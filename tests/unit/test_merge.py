"""A merged model is a plain transformers model with the adapter's logits, or it is not written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from qa_dist import export, merge
from qa_dist.config.options import ModelConfig
from qa_dist.config.recipe_files import write_options
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.model import merging
from qa_dist.model.folder import base_options, load_tokenizer_of
from qa_dist.model.saved import load_trained
from tests.refusals import refusal
from tests.tiny import MODEL_TYPES, tiny_model, tiny_tokenizer
from tests.unit.trained import random_adapter, some_calibration, trained_folder

LENGTH = 64


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        *((model_type, {"lora_target_modules": ("all-linear",)}) for model_type in MODEL_TYPES),
        ("bert", {"use_dora": True}),
        ("roberta", {"use_rslora": True, "lora_r": 4}),
    ],
    ids=str,
)
def test_a_plain_model_gives_the_adapters_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str, options: dict[str, Any]
) -> None:
    config = random_adapter(tmp_path, model_type, **options)
    words = ["--adapter", str(tmp_path / "adapter"), "--merged_dir", str(tmp_path / "merged")]
    capsys.readouterr()
    assert merge.main([*words, "--max_seq_length", str(LENGTH), "--doc_stride", "16"]) == 0
    printed, said = capsys.readouterr()
    assert "Writing" not in said, "a bar of the library"
    assert json.loads(printed[printed.index("{") :])["largest_difference"] <= merging.TOLERANCE
    plain = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged").eval()
    assert not any("lora" in name for name in plain.state_dict())
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    saved = json.loads((tmp_path / "merged" / "config.json").read_text())
    original = json.loads((tmp_path / "base" / "config.json").read_text())
    assert {name: saved[name] for name in saved if "dropout" in name} == {
        name: original[name] for name in original if "dropout" in name
    }
    assert difference(tmp_path / "merged", config, tmp_path / "adapter") <= 1e-4


def difference(merged: Path, config: ModelConfig, adapter: Path) -> float:
    """Largest difference of a logit between a plain model and an adapter on its base, as a share of the largest."""
    ids = torch.randint(5, 50, (20,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model = load_trained(config, str(adapter), max_seq_length=LENGTH, tokenizer_pads_left=False)
        expected = torch.stack(model(ids, torch.zeros_like(ids), (20,)))
        plain = AutoModelForQuestionAnswering.from_pretrained(merged).eval()
        output = plain(input_ids=ids[None], attention_mask=torch.ones(1, 20, dtype=torch.long))
    found = torch.stack((output.start_logits[0], output.end_logits[0]))
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_run_over_a_quantised_base_is_merged_into_the_base_as_it_was_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: Any
) -> None:
    pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")
    folder = trained_folder(tmp_path, quantization=kind, lora_target_modules="all-linear", learning_rate="1e-2")
    adapter, merged = folder / "adapter", folder / "merged"
    capsys.readouterr()
    # Everything but the folders is in the run's config.yaml.
    some_calibration().write(adapter)
    assert merge.main(["--adapter", str(adapter), "--merged_dir", str(merged)]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["largest_difference"] <= merging.TOLERANCE
    assert f"was trained over a base in {kind} and goes into the whole one" in said.err
    assert not (merged / "calibration.json").exists(), "it was fitted to other logits"
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert {tensor.dtype for tensor in load_file(merged / "model.safetensors").values()} == {torch.float32}
    config = ModelConfig(model_name_or_path=str(folder / "model"), lora_target_modules=("all-linear",))
    assert difference(merged, config, adapter) <= 1e-4
    assert difference(merged, dataclasses.replace(config, quantization=kind), adapter) > 1e-3


def test_the_lengths_of_a_run_cannot_be_changed_by_merging(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--adapter", str(trained / "adapter"), "--merged_dir", str(trained / "merged"), "--doc_stride", "8"]
    # That of the run may be repeated, in whatever words.
    told = refusal(merge.main, [*words, "--max_question_length", "none"], capsys)
    assert told == "--doc_stride: the merged model keeps the lengths of the run; leave it out"


def test_a_merge_that_changes_the_logits_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    random_adapter(tmp_path, "bert")
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    words = ["--adapter", str(tmp_path / "adapter"), "--merged_dir", str(tmp_path / "merged")]
    assert merge.main([*words, "--max_seq_length", str(LENGTH), "--doc_stride", "16"]) == 2
    assert "the merged model's logits differ from the adapter's" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_what_cannot_be_merged_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_model("bert", tmp_path / "whole")
    assert merge.main(["--adapter", str(base), "--merged_dir", str(tmp_path / "merged")]) == 2
    assert "holds a whole model; there is nothing to merge" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    told = refusal(merge.main, ["--adapter", str(tmp_path / "empty"), "--merged_dir", str(tmp_path / "merged")], capsys)
    assert told.endswith("empty holds no adapter and no model; give the --output_dir of a finished training run")
    random_adapter(tmp_path, "bert")
    assert merge.main(["--adapter", str(tmp_path / "adapter"), "--merged_dir", str(base)]) == 2
    assert f"--merged_dir {base} exists already" in capsys.readouterr().err
    (tmp_path / "link").symlink_to("nowhere")
    words = ["--adapter", str(tmp_path / "adapter"), "--merged_dir"]
    assert "link exists already" in refusal(merge.main, [*words, str(tmp_path / "link")], capsys)
    told = refusal(merge.main, [*words, str(tmp_path / "not" / "there" / "merged")], capsys)
    assert "--max_seq_length 384 is more than the 160 positions of this model" in told
    assert not (tmp_path / "not").exists(), "nothing is made where nothing is written"
    told = refusal(merge.main, [*words, str(tmp_path / "merged"), "--train_file", "a.json", "--subset_seed=1"], capsys)
    assert told.endswith("--train_file, --subset_seed: merging reads no data; leave it out")
    told = refusal(merge.main, [*words, str(tmp_path / "merged"), "--version_2_with_negative"], capsys)
    assert told.endswith("--version_2_with_negative: merging reads no data; leave it out")
    told = refusal(merge.main, [*words, str(tmp_path / "merged"), "--quantization", "8bit"], capsys)
    assert told.endswith("--quantization: the merged model has no padding and no quantization; leave it out")
    told = refusal(merge.main, [*words, str(tmp_path / "merged"), "--show_structure", "true"], capsys)
    assert "--show_structure: the model is trained, with values of its own that stay" in told
    told = refusal(merge.main, [*words, str(tmp_path / "merged"), "--lora_r=64", "--use_dora", "true"], capsys)
    assert "--lora_r, --use_dora: the model is trained, with values of its own that stay; leave it out here" in told


def made_elsewhere(folder: Path, *, added: int = 0) -> tuple[Any, Any]:
    """An adapter in folder/adapter as peft alone makes it, with its tokenizer; returns its model and that tokenizer."""
    from peft import LoraConfig, TaskType, get_peft_model

    base = AutoModelForQuestionAnswering.from_pretrained(tiny_model("bert", folder / "base"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"ostrel{number}" for number in range(added)])
    if added:
        base.resize_token_embeddings(len(tokenizer))
    lora = LoraConfig(task_type=TaskType.QUESTION_ANS, r=4, target_modules=["query", "value"])
    model: Any = get_peft_model(base, lora)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=bool(added))
    tokenizer.save_pretrained(folder / "adapter")
    return model.eval(), tokenizer


@pytest.mark.parametrize("added", [0, 3])
def test_an_adapter_made_elsewhere_keeps_its_tokenizer_embedding_and_lack_of_token_types(
    added: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = made_elsewhere(tmp_path, added=added)
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    assert (
        merge.main(["--adapter", adapter, "--merged_dir", merged, "--max_seq_length", "64", "--doc_stride", "16"]) == 0
    )
    said = capsys.readouterr().err
    assert "was made elsewhere (it has no config.yaml): its tokenizer is that of its folder" in said
    assert "it reads no token types" in said
    for folder in (adapter, merged):
        options = base_options(folder)
        config = ModelConfig(**options)
        found, _ = load_tokenizer_of(folder, config)
        assert len(found) == len(tokenizer)
        assert not TokenizerSpec.of(found).has_token_types
        ours = load_trained(config, folder, max_seq_length=LENGTH, tokenizer_pads_left=False)
        # The last ids are those of added tokens.
        ids = torch.arange(len(tokenizer) - 30, len(tokenizer))
        with torch.no_grad():
            output = model(input_ids=ids[None], token_type_ids=torch.ones(1, 30, dtype=torch.long))
            start_T, _ = ours(ids, torch.zeros_like(ids), (30,))
        torch.testing.assert_close(start_T, output.start_logits[0], rtol=0, atol=1e-4)


def test_a_tokenizer_without_token_types_is_saved_as_such(tmp_path: Path) -> None:
    made_elsewhere(tmp_path)
    # Of a class whose tokenizers make token types unless it is said that they do not.
    described = tmp_path / "adapter" / "tokenizer_config.json"
    settings = json.loads(described.read_bytes()) | {"tokenizer_class": "BertTokenizer"}
    settings.pop("model_input_names", None)
    described.write_text(json.dumps(settings), encoding="utf-8")
    config = ModelConfig(**base_options(str(tmp_path / "adapter")))
    tokenizer, _ = load_tokenizer_of(str(tmp_path / "adapter"), config)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(again).__name__.startswith("BertTokenizer")
    assert "token_type_ids" not in again.model_input_names


def test_an_adapter_trained_here_reads_token_types_also_where_it_was_copied_alone(tmp_path: Path) -> None:
    config = random_adapter(tmp_path, "bert")
    tokenizer, notes = load_tokenizer_of(str(tmp_path / "adapter"), config)
    assert notes == []
    assert TokenizerSpec.of(tokenizer).has_token_types


def test_whether_questions_may_have_no_answer_is_left_to_the_data_where_the_run_left_it(tmp_path: Path) -> None:
    trained_folder(tmp_path)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert merge.main(["--adapter", str(adapter), "--merged_dir", str(merged)]) == 0
    assert base_options(str(merged)).get("version_2_with_negative") is None
    chosen = tmp_path / "chosen"
    write_options({**base_options(str(adapter)), "version_2_with_negative": False}, adapter / "config.yaml")
    assert merge.main(["--adapter", str(adapter), "--merged_dir", str(chosen)]) == 0
    assert base_options(str(chosen))["version_2_with_negative"] is False


@pytest.mark.parametrize(("main", "flag"), [(merge.main, "--merged_dir"), (export.main, "--output_dir")])
def test_a_folder_in_a_file_is_said_to_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Any, flag: str
) -> None:
    random_adapter(tmp_path, "bert")
    # Libraries greet on standard output.
    capsys.readouterr()
    (tmp_path / "file").touch()
    model = ["--adapter" if main is merge.main else "--model", str(tmp_path / "adapter")]
    message = refusal(main, [*model, flag, str(tmp_path / "file" / "new")], capsys)
    assert message == f"the folder of {flag} {tmp_path / 'file'} cannot be used: Not a directory; choose another folder"
