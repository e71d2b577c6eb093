"""The mean of several models is the mean of every weight, or it is not written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForQuestionAnswering, BertConfig

from qa_dist import average, merge
from qa_dist.config.recipe_files import read_run_options, write_options
from qa_dist.model import averaging
from qa_dist.model.folder import base_options
from tests.refusals import refusal
from tests.tiny import MODEL_TYPES, tiny_model, tiny_tokenizer
from tests.unit.trained import edit_json, random_adapter, some_calibration, trained_folder

Weights = dict[str, torch.Tensor]


def changed(folder: Path, to: Path, *, seed: int, scale: float = 0.05) -> Path:
    """A copy of an adapter or a model whose every weight is another, by so much."""
    shutil.copytree(folder, to)
    (path,) = to.glob("*.safetensors")
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: tensor + scale * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return to


def merged_folder(adapter: Path, to: Path) -> Path:
    """`to`, with what `merge` writes for an adapter."""
    words = ["--adapter", str(adapter), "--merged_dir", str(to), "--max_seq_length", "64", "--doc_stride", "16"]
    assert merge.main(words) == 0
    return to


def merged(adapter: Path, to: Path) -> Weights:
    """The weights that `merge` writes for an adapter."""
    return load_file(merged_folder(adapter, to) / "model.safetensors")


def averaged(models: list[Path], to: Path) -> Weights:
    assert average.main([*map(str, models), "--output_dir", str(to)]) == 0
    return load_file(to / "model.safetensors")


def whole(folder: Path) -> Path:
    """A model with a head, and its tokenizer."""
    tiny_model("bert", folder)
    AutoModelForQuestionAnswering.from_pretrained(folder).save_pretrained(folder)
    return folder


def mean_of(weights: list[Weights]) -> Weights:
    """The mean of every tensor, the short way."""
    return {name: torch.stack([each[name].double() for each in weights]).mean(0).float() for name in weights[0]}


def require_equal(found: Weights, expected: Weights) -> None:
    """Make sure that both have the same names, some, and bit for bit the same tensor under each."""
    assert found.keys() == expected.keys() != set()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_weight_is_the_mean_of_those_of_the_merged_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str
) -> None:
    random_adapter(tmp_path, model_type, lora_target_modules=("all-linear",))
    adapters = [tmp_path / "adapter", *(changed(tmp_path / "adapter", tmp_path / str(n), seed=n) for n in (1, 2))]
    weights = [merged(adapter, tmp_path / f"merged{n}") for n, adapter in enumerate(adapters)]
    capsys.readouterr()
    found = averaged(adapters, tmp_path / "mean")
    expected = mean_of(weights)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Doubles that are added in another order.
        torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-9)
    away = [torch.cat([(each[name] - expected[name]).flatten() for name in expected]) for each in weights]
    norm = torch.cat([tensor.flatten() for tensor in expected.values()]).norm()
    spread = json.loads(capsys.readouterr().out)["spread"]
    assert spread == pytest.approx(float(torch.stack(away).square().sum(1).mean().sqrt() / norm), rel=1e-4)
    assert 0 < spread < averaging.LARGEST_SPREAD
    require_equal(AutoModelForQuestionAnswering.from_pretrained(tmp_path / "mean").state_dict(), found)


def test_the_order_of_the_models_changes_no_weight(tmp_path: Path) -> None:
    random_adapter(tmp_path, "bert")
    adapters = [tmp_path / "adapter", *(changed(tmp_path / "adapter", tmp_path / str(n), seed=n) for n in (1, 2, 3))]
    require_equal(averaged(adapters, tmp_path / "once"), averaged(adapters[::-1], tmp_path / "again"))


def test_whole_models_and_adapters_go_together(tmp_path: Path) -> None:
    random_adapter(tmp_path, "bert")
    first = merged(tmp_path / "adapter", tmp_path / "whole")
    other = changed(tmp_path / "whole", tmp_path / "other", seed=4, scale=0.01)
    found = averaged([tmp_path / "adapter", other], tmp_path / "mean")
    require_equal(found, mean_of([first, load_file(other / "model.safetensors")]))


def test_options_are_those_of_the_first_run_and_a_calibration_is_of_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained_folder(tmp_path) / "adapter"
    some_calibration().write(adapter)
    other = changed(adapter, tmp_path / "other", seed=1)
    write_options(read_run_options(str(other / "config.yaml")) | {"max_answer_length": 7}, other / "config.yaml")
    capsys.readouterr()
    averaged([adapter, other], tmp_path / "mean")
    said = capsys.readouterr().err
    assert f"the runs differ in max_answer_length; the result has the values of {adapter}" in said
    options = base_options(str(tmp_path / "mean"))
    assert (options["max_seq_length"], options["max_answer_length"]) == (64, 30)
    assert not (tmp_path / "mean" / "calibration.json").exists(), "it was fitted to other logits"


def test_models_that_differ_in_dropout_or_names_of_labels_are_of_one_architecture(tmp_path: Path) -> None:
    first = whole(tmp_path / "first")
    # As runs with other --model_dropout save theirs.
    second = changed(first, tmp_path / "second", seed=1, scale=0.01)
    labels = {"id2label": {"0": "start", "1": "end"}, "label2id": {"start": 0, "end": 1}}
    edit_json(second / "config.json", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0, **labels)
    averaged([first, second], tmp_path / "mean")
    config = BertConfig.from_pretrained(tmp_path / "mean")
    assert config.hidden_dropout_prob == BertConfig.from_pretrained(first).hidden_dropout_prob


def test_what_the_user_should_know_about_a_model_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = trained_folder(tmp_path) / "adapter"
    quantised = changed(adapter, tmp_path / "quantised", seed=1)
    write_options(
        read_run_options(str(quantised / "config.yaml")) | {"quantization": "4bit"}, quantised / "config.yaml"
    )
    plain = changed(merged_folder(adapter, tmp_path / "merged"), tmp_path / "plain", seed=2, scale=0.01)
    (plain / "config.yaml").unlink()
    capsys.readouterr()
    averaged([adapter, quantised, plain], tmp_path / "mean")
    assert notes(capsys) == [
        f"{quantised}: the adapter was trained over a base in 4bit and goes into the whole one, with which its logits "
        "are others: evaluate the result, and calibrate it again"
    ]
    averaged([plain, adapter], tmp_path / "other")
    assert notes(capsys) == [
        f"{plain} was made by no run here, so that the result has no lengths and rules of scores, as others have"
    ]
    assert not (tmp_path / "other" / "config.yaml").exists()


def notes(capsys: pytest.CaptureFixture[str]) -> list[str]:
    begin = "qa_dist.average: note: "
    return [line.removeprefix(begin) for line in capsys.readouterr().err.splitlines() if line.startswith(begin)]


def test_a_disk_that_takes_no_model_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(averaging, "require_written", fails)
    first = whole(tmp_path / "first")
    words = [str(first), str(changed(first, tmp_path / "second", seed=1)), "--output_dir", str(tmp_path / "mean")]
    told = f"--output_dir {tmp_path / 'mean'} cannot be written: No space left on device"
    assert refusal(average.main, words, capsys) == told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def other_base(folder: Path) -> None:
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    torch.manual_seed(9)
    type(model)(model.config).save_pretrained(folder)


def wider(folder: Path) -> None:
    config = BertConfig.from_pretrained(folder)
    config.intermediate_size *= 2
    AutoModelForQuestionAnswering.from_config(config).save_pretrained(folder)


def deeper(folder: Path) -> None:
    config = BertConfig.from_pretrained(folder)
    config.num_hidden_layers += 1
    AutoModelForQuestionAnswering.from_config(config).save_pretrained(folder)


def other_activation(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "relu"}))


def other_tokens(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["ostrel"])
    tokenizer.save_pretrained(folder)


def other_kind(folder: Path) -> None:
    AutoModelForQuestionAnswering.from_pretrained(tiny_model("electra", folder)).save_pretrained(folder)


def same(folder: Path) -> None:
    """Leave it as it is: a copy."""


def infinite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["qa_outputs.bias"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_base, "of their mean apart, and those of models that began as one at most 0.5; average runs from the"),
        (wider, "intermediate_size of {both} differs, 64 and 128; average models of one architecture"),
        (deeper, "num_hidden_layers of {both} differs, 2 and 3; average models of one architecture"),
        (other_activation, "hidden_act of {both} differs, gelu and relu; average models of one architecture"),
        (other_kind, "model_type of {both} differs, bert and electra; average models of one architecture"),
        (other_tokens, "the tokenizers of {both} differ; average models of one tokenizer"),
        (same, "{both} hold the same weights; name each model once"),
        (infinite, "the mean of qa_outputs.bias is not finite; leave out the model that has such weights"),
    ],
)
def test_models_that_have_no_mean_are_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], told: str
) -> None:
    first = whole(tmp_path / "first")
    shutil.copytree(first, tmp_path / "second")
    change(tmp_path / "second")
    both = f"{first} and {tmp_path / 'second'}"
    words = [str(first), str(tmp_path / "second"), "--output_dir", str(tmp_path / "new" / "mean")]
    assert told.format(both=both) in refusal(average.main, words, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    options = average.build_parser().parse_args(["~/one", "~/two", "--output_dir=~/mean"])
    assert options.models == [f"{tmp_path}/one", f"{tmp_path}/two"]
    assert options.output_dir == f"{tmp_path}/mean"


def test_what_is_no_two_models_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = str(whole(tmp_path / "first"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(first)
    where = ["--output_dir", str(tmp_path / "mean")]
    told = [
        ([first, *where], f"{first} is the only model; name two or more"),
        ([first, first, "--output_dir", first], f"--output_dir {first} exists already; name a folder that does not"),
        ([first, str(tmp_path / "link"), *where], "link are one folder; name each model once"),
        ([first, str(tmp_path / "none"), *where], "none is not a folder; name those of trained models"),
        ([first, str(tmp_path / "empty"), *where], "empty holds no adapter and no model"),
    ]
    for words, sentence in told:
        assert sentence in refusal(average.main, words, capsys)
