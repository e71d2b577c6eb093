"""What cannot be exported is said before anything is written, and answers that score alike are told from others."""

from pathlib import Path

import pytest

from qa_dist import export
from qa_dist.answering import export as exporting
from qa_dist.data.records import Prediction
from qa_dist.evaluation.answers import ExampleAnswer
from tests.tiny import tiny_config, tiny_model, tiny_squad, tiny_tokenizer
from tests.unit.trained import edit_json, export_words

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason="the onnx extra is not installed")


def answered(text: str, *entries: tuple[int, float], null_odds: float | None = None) -> ExampleAnswer:
    """An answer whose n-best list has these starts and scores; the first is chosen."""
    nbest = tuple(Prediction(text, score, 0.5, start, start + 1) for start, score in entries)
    return ExampleAnswer("id", nbest[0], nbest, null_odds)


@pytest.mark.parametrize(
    ("answer", "other", "same"),
    [
        (answered("a", (1, 2.0)), answered("a", (7, 9.0)), True),
        (answered("a", (1, 2.0), (5, 1.95)), answered("b", (5, 2.0)), True),
        (answered("a", (1, 2.0), (5, 1.8)), answered("b", (5, 2.0)), False),
        (answered("a", (1, 2.0)), answered("b", (5, 2.0)), False),
        (answered("a", (1, 2.0), null_odds=0.95), answered("", (-1, 2.0), null_odds=1.01), True),
        (answered("a", (1, 2.0), null_odds=0.8), answered("", (-1, 2.0), null_odds=1.01), False),
    ],
)
def test_answers_that_score_alike_count_as_the_same(answer: ExampleAnswer, other: ExampleAnswer, same: bool) -> None:
    assert exporting.is_same(answer, other, margin=0.1, threshold=1.0) is same


def refused_folder(folder: Path, kind: str) -> None:
    """A model in folder/model that cannot be exported."""
    (folder / "model").mkdir()
    if kind == "headless":
        tiny_model("bert", folder / "model")
        return
    if kind == "quantised":
        tiny_model("bert", folder / "model")
        edit_json(folder / "model" / "config.json", quantization_config={"load_in_8bit": True})
        return
    if kind != "empty":
        if kind == "gpt2":
            (folder / "model" / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
        else:
            tiny_config(kind, 100).save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("empty", "holds no adapter and no model"),
        ("headless", "lacks qa_outputs"),
        ("gpt2", "gpt2 models are not trained here"),
        ("convbert", "is a convbert model, which cannot be exported: its logits depend on how far a feature is padded"),
        ("longformer", "is a longformer model, which cannot be exported"),
        ("big_bird", "is a big_bird model, which cannot be exported"),
        ("quantised", "its weights are quantised already"),
    ],
)
def test_what_cannot_be_exported_is_a_sentence(
    kind: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused_folder(tmp_path, kind)
    tiny_squad(tmp_path / "dev.json", 2, seed=3)
    capsys.readouterr()
    assert export.main(export_words(tmp_path, model="model")) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1, message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev.json", "model"]


def test_mistakes_are_found_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("bert", tmp_path / "model")
    assert export.main(export_words(tmp_path, model="model", output="model")) == 2
    assert f"--output_dir {tmp_path / 'model'} exists already" in capsys.readouterr().err
    assert export.main(export_words(tmp_path, "--format", "coreml", model="model")) == 2
    assert "--format coreml is not one of onnx" in capsys.readouterr().err
    assert export.main(export_words(tmp_path, "--gather", "logits", "--max_train_samples", "3", model="model")) == 2
    assert "--max_train_samples: no questions to train on are read here; leave it out" in capsys.readouterr().err
    assert export.main(export_words(tmp_path, "--gather", "logits", model="model")) == 2
    assert "--gather: all logits that are computed here are compared here; leave it out" in capsys.readouterr().err
    assert export.main(export_words(tmp_path, "--padding", "unpadded", model="model")) == 2
    assert "--padding: an exported model pads" in capsys.readouterr().err
    find = export.require_package.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert export.main(export_words(tmp_path, model="model")) == 2
    assert "--format onnx needs onnxscript; install it with: pip install 'qa-dist[onnx]'" in capsys.readouterr().err
