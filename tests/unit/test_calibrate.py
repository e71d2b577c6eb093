"""A threshold and a temperature that are tuned for a model go with it, and count wherever it answers."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qa_dist import calibrate, evaluate, merge, train
from qa_dist.answering.reader import Reader
from qa_dist.evaluation.tuning import in_tuned_half
from qa_dist.model.calibration import FILE, read_calibration
from qa_dist.reporting.card import CardOptions, card
from qa_dist.reporting.publication import publication
from qa_dist.reporting.run_record import read_run
from tests.tiny import tiny_squad
from tests.unit.trained import edit_json, options_of, reset_accelerate, some_calibration, words

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of which every fourth has no answer; of the others it is the text, so that any answer has some F1."""
    path = tiny_squad(tmp_path_factory.mktemp("dev") / "dev.json", 140, seed=3, unanswerable=True, longest=7)
    value = read(path)
    for paragraph in value["data"][0]["paragraphs"]:
        for answer in paragraph["qas"][0]["answers"]:
            answer.update(text=paragraph["context"], answer_start=0)
    path.write_text(json.dumps(value))
    return path


def asked_in(path: Path) -> list[dict[str, Any]]:
    paragraphs = json.loads(path.read_text())["data"][0]["paragraphs"]
    return [{**entry, "context": paragraph["context"]} for paragraph in paragraphs for entry in paragraph["qas"]]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def without_temperature(not_kept: Any) -> dict[str, Any]:
    """A report on a temperature that was fitted and not kept."""
    return {"calibration": {**some_calibration().report["calibration"], "not_kept": not_kept}, "null_threshold": None}


def evaluated(folder: Path, dev: Path, results: Path, *more: str) -> Path:
    reset_accelerate()
    own = ["--adapter", str(folder), "--validation_file", str(dev), "--results_dir", str(results), *more]
    assert evaluate.main(own) == 0
    return results


def as_written(answers: dict[str, str]) -> bytes:
    return (json.dumps(answers, indent=2, ensure_ascii=False) + "\n").encode()


def texts(reader: Reader, dev: Path) -> dict[str, str]:
    return {item["id"]: answer.text for item, answer in reader.answer_many(asked_in(dev))}  # type: ignore[union-attr]


def test_what_is_tuned_counts_for_all_that_answers(copy: Path, dev: Path, tmp_path: Path, capsys: Capture) -> None:
    adapter = copy / "adapter"
    before = evaluated(adapter, dev, tmp_path / "before")
    capsys.readouterr()
    reset_accelerate()
    assert calibrate.main([str(adapter), "--validation_file", str(dev)]) == 0
    printed = capsys.readouterr()
    found = read(adapter / FILE)
    assert json.loads(printed.out) == found
    threshold, temperature = found["null_score_diff_threshold"], found["temperature"]
    assert f"null threshold {threshold:.6g}, tuned on 140 questions of dev.json" in printed.err
    assert found["tuned_on"]["num_unanswerable"] == 35
    # What an evaluation says of the best threshold is what is tuned.
    metrics = read(before / "metrics.json")
    odds = read(before / "null_odds.json").values()
    assert metrics["best_f1_thresh"] < threshold < min(each for each in odds if each > metrics["best_f1_thresh"])
    assert found["report"]["null_threshold"]["before"]["f1"] == metrics["f1"]

    after = evaluated(adapter, dev, tmp_path / "after")
    said = capsys.readouterr().err
    assert "was tuned on 140 questions of dev.json: these questions, so the scores flatter" in said
    assert read(after / "metrics.json")["f1"] == found["report"]["null_threshold"]["after"]["f1"] > metrics["f1"]
    assert read(after / "metrics.json")["best_f1"] == metrics["best_f1"]
    without = evaluated(adapter, dev, tmp_path / "without", "--null_score_diff_threshold", "0")
    for name in ("predictions.json", "metrics.json", "nbest.json", "null_odds.json"):
        assert (without / name).read_bytes() == (before / name).read_bytes()
    asked = evaluated(adapter, dev, tmp_path / "auto", "--null_score_diff_threshold", "auto")
    assert (asked / "predictions.json").read_bytes() == (after / "predictions.json").read_bytes()

    reader = Reader(adapter, device="cpu", allow_no_answer=True)
    assert (reader.settings["null_score_diff_threshold"], reader.settings["temperature"]) == (threshold, temperature)
    assert as_written(texts(reader, dev)) == (after / "predictions.json").read_bytes()
    plain = Reader(adapter, device="cpu", allow_no_answer=True, null_score_diff_threshold=0, temperature=1)
    assert as_written(texts(plain, dev)) == (before / "predictions.json").read_bytes()

    # Again on the same data, it is the same, whatever is in force.
    written = (adapter / FILE).read_bytes()
    reset_accelerate()
    assert calibrate.main([str(adapter), "--validation_file", str(dev)]) == 0
    assert (adapter / FILE).read_bytes() == written

    merged = tmp_path / "merged"
    assert merge.main(["--adapter", str(adapter), "--merged_dir", str(merged)]) == 0
    assert (merged / FILE).read_bytes() == written
    lengths = {"max_seq_length": 64, "doc_stride": 16}
    assert texts(Reader(merged, device="cpu", allow_no_answer=True, **lengths), dev) == texts(reader, dev)  # type: ignore[arg-type]


def test_probabilities_are_softmaxes_by_the_temperature_over_all_passages(copy: Path) -> None:
    adapter = copy / "adapter"
    raw, passages = Reader(adapter, device="cpu"), ["amber basin cedar delta ember", "fjord grove haven inlet amber"]
    some_calibration(temperature=3.0).write(adapter)
    reader = Reader(adapter, device="cpu")
    for contexts in (passages[0], passages):
        before, after = (
            each.answer("what follows amber ?", contexts, top_k=20, overlap_threshold=None) for each in (raw, reader)
        )
        assert isinstance(before, list)
        assert isinstance(after, list)
        assert [answer.text for answer in before] == [answer.text for answer in after]
        ratios = [answer.probability ** (1 / 3) for answer in before]
        scale = after[0].probability / ratios[0]
        assert [answer.probability for answer in after] == pytest.approx([scale * ratio for ratio in ratios])
        assert after[0].probability < before[0].probability
    assert Reader(adapter, device="cpu", temperature=1.0).temperature == 1


def test_training_writes_it_and_leaves_its_results(trained: Path, dev: Path, tmp_path: Path, capsys: Capture) -> None:
    own = {**options_of(trained), "validation_file": str(dev), "max_train_steps": "2", "learning_rate": "0.05"}
    folders = {part: tmp_path / part for part in ("all", "no")}
    for part, folder in folders.items():
        reset_accelerate()
        assert train.main(words({**own, "output_dir": str(folder), "tune_on": part})) == 0
    said = capsys.readouterr().err
    assert said.count("temperature ") == said.count("null threshold ") == 1
    assert not (folders["no"] / FILE).exists()
    for name in ("predictions.json", "metrics.json", "nbest.json", "null_odds.json", "adapter_model.safetensors"):
        assert (folders["all"] / name).read_bytes() == (folders["no"] / name).read_bytes()
    found = read_calibration(folders["all"])
    assert found is not None
    metrics = read(folders["all"] / "metrics.json")
    threshold = found.null_score_diff_threshold
    assert threshold is not None
    assert threshold > metrics["best_f1_thresh"]
    let_in = [
        sum(each <= limit for each in read(folders["all"] / "null_odds.json").values())
        for limit in (threshold, metrics["best_f1_thresh"])
    ]
    assert let_in[0] == let_in[1]
    # The run's own threshold gives the run's own answers.
    reader = Reader(folders["all"], device="cpu", null_score_diff_threshold=0)
    assert as_written(texts(reader, dev)) == (folders["all"] / "predictions.json").read_bytes()
    again = evaluated(folders["all"], dev, tmp_path / "again")
    assert read(again / "metrics.json")["f1"] == found.report["null_threshold"]["after"]["f1"]


def test_a_threshold_that_the_run_chose_is_the_models(trained: Path, dev: Path, tmp_path: Path) -> None:
    own = {**options_of(trained), "validation_file": str(dev), "max_train_steps": "1", "tune_on": "all"}
    reset_accelerate()
    assert train.main(words({**own, "output_dir": str(tmp_path / "run"), "null_score_diff_threshold": "1.5"})) == 0
    found = read_calibration(tmp_path / "run")
    assert found is not None
    assert found.null_score_diff_threshold is None
    reader = Reader(tmp_path / "run", device="cpu")
    assert reader.settings["null_score_diff_threshold"] == 1.5
    assert as_written(texts(reader, dev)) == (tmp_path / "run" / "predictions.json").read_bytes()
    # What is tuned later, on purpose, takes its place.
    reset_accelerate()
    assert calibrate.main([str(tmp_path / "run")]) == 0
    tuned = read_calibration(tmp_path / "run")
    assert tuned is not None
    again = Reader(tmp_path / "run", device="cpu")
    assert again.settings["null_score_diff_threshold"] == tuned.null_score_diff_threshold != 1.5


def test_too_few_questions_are_said_at_the_start_of_a_run(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    reset_accelerate()
    assert train.main(words({**options_of(trained), "max_train_steps": "1", "output_dir": str(tmp_path / "run")})) == 0
    said = capsys.readouterr().err
    assert said.count("stay untuned: the data has 12 questions whose answers are known, and at least 100 are") == 1
    assert said.index("stay untuned") < said.index("written:")
    assert not (tmp_path / "run" / FILE).exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--max_eval_samples", "60"],
            "the data has 60 questions whose answers are known, and at least 100 are needed",
        ),
        (["--tune_on", "half"], "half .* has .* questions"),
        (["--validation_file", "ANSWERED", "--version_2_with_negative", "true"], "0 questions without an answer among"),
        (["--null_score_diff_threshold", "1"], "--null_score_diff_threshold is what calibration finds"),
        (["--gather", "logits"], "--gather logits keeps a file of logits"),
        (["--train_file", "a.json"], "--train_file: no questions to train on are read here; leave it out"),
        (["--tune_on", "no"], "--tune_on no is not one of all, half"),
    ],
)
def test_what_cannot_be_calibrated_is_one_sentence(
    copy: Path, dev: Path, tmp_path: Path, capsys: Capture, more: list[str], message: str
) -> None:
    answered = tiny_squad(tmp_path / "answered.json", 110, seed=4, longest=20)
    own = ["--model", str(copy / "adapter"), "--validation_file", str(dev)]
    assert calibrate.main([*own, *(str(answered) if word == "ANSWERED" else word for word in more)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, said), said
    assert not (copy / "adapter" / FILE).exists()


def test_models_that_cannot_be_calibrated(copy: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "reader.json").write_text("{}")
    for name, message in (("exported", "is exported; calibrate the model it was made from"), ("none", "not a folder")):
        assert calibrate.main([str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "has format 2 but this program reads 1; remove it, or write it anew"),
        ({"temperature": 0}, "is not as it was written (temperature 0,"),
        ({"temperature": "1"}, "is not as it was written"),
        ({"temperature": float("nan")}, "is not as it was written"),
        ({"null_score_diff_threshold": True}, "is not as it was written"),
        ({"tuned_on": []}, "is not as it was written"),
        ({"report": {"calibration": {"before": {"ece": "5"}}}}, "is not as it was written"),
        ({"report": ...}, "is not as it was written"),
        ({"report": without_temperature(3)}, "is not as it was written"),
        ({"report": without_temperature({"temperature": 2.0, "before": 1.0})}, "is not as it was written"),
        ({"more": 1}, "is not as it was written"),
    ],
)
def test_a_file_that_is_damaged_is_one_sentence(
    copy: Path, capsys: Capture, changes: dict[str, Any], message: str
) -> None:
    some_calibration(threshold=1.0).write(copy / "adapter")
    edit_json(copy / "adapter" / FILE, **changes)
    assert evaluate.main(["--adapter", str(copy / "adapter")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert f"{FILE} {message}" in said[0]


def test_a_file_that_cannot_be_read_is_written_anew(copy: Path, dev: Path, capsys: Capture) -> None:
    some_calibration(threshold=1.0).write(copy / "adapter")
    edit_json(copy / "adapter" / FILE, format_version=2)
    assert calibrate.main([str(copy / "adapter"), "--validation_file", str(dev)]) == 0, capsys.readouterr().err
    found = read_calibration(copy / "adapter")
    assert found is not None
    assert found.tuned_on["data"] == "dev.json"


def test_it_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_calibration(tmp_path) is None
    written = some_calibration(threshold=float(np.float32(-1.3)))
    written.write(tmp_path)
    assert read_calibration(tmp_path) == written
    assert next(written.lines()).startswith(
        "temperature 2.000, fitted on the 300 questions about one half of the contexts of dev.json: expected"
    )


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({}, "does not lower their expected calibration error, which is"),
        ({"is_at_end": True}, "is the last of those that are tried and no fit; their expected calibration error is"),
    ],
)
def test_a_temperature_that_is_not_kept_is_told_of(copy: Path, more: dict[str, Any], why: str) -> None:
    report = without_temperature({"temperature": 1.2345, "before": 3.0, "after": 4.0, **more})
    dataclasses.replace(some_calibration(temperature=1.0), report=report).write(copy / "adapter")
    assert Reader(copy / "adapter", device="cpu").temperature == 1
    text = card(read_run(str(copy / "adapter")), CardOptions(folder_name="x"))
    said = (
        "- no temperature is kept: the one fitted on the 300 questions about one half of the contexts of dev.json, "
        f"1.234, {why} 3.00 without and 4.00 with it; 5.00 on the other half without it\n"
    )
    assert said in text


def test_halves_need_no_seed() -> None:
    sides = [in_tuned_half(f"context {number}") for number in range(1000)]
    assert 450 < sum(sides) < 550
    assert sides[:8] == [in_tuned_half(f"context {number}") for number in range(8)]


def test_it_is_published_with_the_model(copy: Path) -> None:
    some_calibration().write(copy / "adapter")
    (copy / "adapter" / "README.md").write_text("by hand")
    files = {file.name: file.content for file in publication(read_run(str(copy / "adapter")), "me/x", "me/base")}
    content = files[FILE]
    assert isinstance(content, bytes)
    assert json.loads(content) == some_calibration().as_dict()
    text = card(read_run(str(copy / "adapter")), CardOptions(folder_name="x"))
    assert "- temperature 2.000, fitted on the 300 questions about one half of the contexts of dev.json" in text
