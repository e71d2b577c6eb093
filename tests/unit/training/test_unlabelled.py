"""Validation data without answers, or with some: what a run does with them, from its start to its files."""

import json
from pathlib import Path
from typing import Any

import pytest

from qa_dist import evaluate, train
from tests.refusals import refusal
from tests.tiny import tiny_model, tiny_squad
from tests.unit.trained import options_of, reset_accelerate, words

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, training data, `none.json` of which no answers are known, and `some.json` where half of them are."""
    folder = tmp_path_factory.mktemp("unlabelled")
    tiny_model("bert", folder / "model")
    tiny_squad(folder / "train.json", 12, seed=1, longest=30)
    for name, every in (("none", 1), ("some", 2)):
        document = json.loads((folder / "train.json").read_bytes())
        qas = [qa for article in document["data"] for p in article["paragraphs"] for qa in p["qas"]]
        for qa in qas[::every]:
            del qa["answers"]
        (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def options(folder: Path, validation: str, **others: str) -> list[str]:
    reset_accelerate()
    own = {**options_of(folder), "validation_file": str(folder / validation), "num_train_epochs": "1"}
    return words({**own, **others})


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def test_nothing_is_scored_or_chosen_and_predictions_are_written(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert train.main(options(folder, "none.json", output_dir=str(tmp_path / "out"))) == 0
    said = capsys.readouterr().err
    assert "no answers of the validation data are known" in said
    assert "12 questions without known answers are predicted, not scored" in said
    out = tmp_path / "out"
    assert len(read(out / "predictions.json")) == 12
    assert read(out / "metrics.json") == {"num_examples": 0, "num_unlabelled": 12}
    assert not (out / "best").exists()
    record = read(out / "run.json")
    assert record["weights_of_step"] == record["num_steps"]
    assert record["final"] == {"loss": None, "num_examples": 0, "num_unlabelled": 12}
    assert "eval_loss" not in (out / "metrics.jsonl").read_text()

    reset_accelerate()
    assert evaluate.main(["--adapter", str(out), "--results_dir", str(tmp_path / "again")]) == 0
    said = capsys.readouterr()
    assert "nothing is scored; the predictions are written" in said.err
    assert json.loads(said.out) == {"num_examples": 0, "num_unlabelled": 12}
    assert (tmp_path / "again" / "predictions.json").read_bytes() == (out / "predictions.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("early_stopping_patience", "2"),
        ("eval_on_start", "true"),
        ("eval_steps", "1"),
        ("max_eval_features", "3"),
        ("metric_for_best_model", "loss"),
    ],
)
def test_options_that_need_scores_are_refused_at_the_start(
    name: str, value: str, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    argv = options(folder, "none.json", output_dir=str(tmp_path / "out"), **{name: value})
    message = refusal(train.main, argv, capsys)
    assert f"--{name}" in message
    assert "no question with known answers" in message
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_loss_is_refused_where_none_of_the_chosen_features_has_one(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Every other question has an answer, the first has none."""
    argv = options(folder, "some.json", output_dir=str(tmp_path / "out"), max_eval_features="1")
    assert "none of the features that --max_eval_features 1 chooses" in refusal(train.main, argv, capsys)
    for more, said in (
        ({"eval_steps": "no"}, "and --eval_steps is no"),
        ({"metric_for_best_model": "exact_match"}, "loss alone"),
    ):
        argv = options(folder, "some.json", output_dir=str(tmp_path / "out"), max_eval_features="2", **more)
        assert said in refusal(train.main, argv, capsys)
    argv = options(folder, "some.json", output_dir=str(tmp_path / "out"), max_eval_features="2")
    assert train.main(argv) == 0


def test_of_mixed_data_those_with_answers_are_scored(folder: Path, tmp_path: Path) -> None:
    assert train.main(options(folder, "some.json", output_dir=str(tmp_path / "out"), eval_on_start="true")) == 0
    metrics = read(tmp_path / "out" / "metrics.json")
    assert (metrics["num_examples"], metrics["num_unlabelled"]) == (6, 6)
    assert len(read(tmp_path / "out" / "predictions.json")) == 12
    assert 0 <= metrics["exact_match"] <= metrics["f1"] <= 100
    assert (tmp_path / "out" / "best").exists()


def test_training_data_without_answers_are_refused(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    argv = options(folder, "train.json", train_file=str(folder / "none.json"), output_dir=str(tmp_path / "out"))
    assert "12 where answers is missing" in refusal(train.main, argv, capsys)


def test_a_wrong_path_is_said_before_a_model_is_looked_for(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    wrong = {"train_file": str(tmp_path / "typo.json"), "model_name_or_path": str(tmp_path / "typo")}
    told = refusal(train.main, options(folder, "none.json", **wrong, output_dir=str(tmp_path / "out")), capsys)
    assert "typo.json does not exist" in told


def test_training_data_in_which_nothing_is_to_be_found_are_refused(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    document = json.loads((folder / "train.json").read_bytes())
    for qa in (qa for article in document["data"] for p in article["paragraphs"] for qa in p["qas"]):
        qa["answers"] = []
    (tmp_path / "train.json").write_text(json.dumps(document), encoding="utf-8")
    others = {"train_file": str(tmp_path / "train.json"), "output_dir": str(tmp_path / "out")}
    told = refusal(train.main, options(folder, "none.json", **others), capsys)
    assert "no window of the training data holds an answer: of 12 questions 12 have an empty list of answers" in told
    assert "--version_2_with_negative true" in told
    meant = options(folder, "none.json", **others, version_2_with_negative="true", max_train_steps="1")
    assert train.main(meant) == 0


def test_dropped_records_are_counted_in_the_metrics(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = read(folder / "train.json")
    qas = document["data"][0]["paragraphs"][0]["qas"]
    qas[0]["answers"] = [{"text": "of another text"}]
    qas.append({**qas[0], "id": "bad", "question": 3})
    (tmp_path / "dev.json").write_text(json.dumps(document), encoding="utf-8")
    argv = options(folder, str(tmp_path / "dev.json"), on_invalid="drop", output_dir=str(tmp_path / "out"))
    assert train.main(argv) == 0
    metrics = read(tmp_path / "out" / "metrics.json")
    assert (metrics["num_examples"], metrics["num_dropped"]) == (12, 1)
    assert "scored but without a label: 1" in caplog.text
