"""The precision of an evaluation and what is said where it is slow, its data, and where its results go."""

import json
from pathlib import Path
from typing import Any

import pytest

from qa_dist import Reader, calibrate, evaluate, merge
from qa_dist.model import precision
from tests.refusals import refusal
from tests.unit.trained import reset_accelerate, trained_folder

SLOW = "this processor has no instructions for bf16"


@pytest.fixture(scope="module")
def of_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a run in bfloat16, whose layers hand on bfloat16 too."""
    folder = tmp_path_factory.mktemp("bf16")
    return trained_folder(folder, mixed_precision="bf16", residual_dtype="bf16") / "adapter"


def evaluated(adapter: Path, results: Path, *more: str) -> tuple[Any, Any]:
    """metrics.json and nbest.json of an evaluation."""
    reset_accelerate()
    assert evaluate.main(["--adapter", str(adapter), "--results_dir", str(results), *more]) == 0
    return tuple(json.loads((results / name).read_text(encoding="utf-8")) for name in ("metrics.json", "nbest.json"))


def test_an_evaluation_has_the_precision_of_its_run_unless_another_is_asked_for(of_bf16: Path, tmp_path: Path) -> None:
    as_run = evaluated(of_bf16, tmp_path / "run")
    assert as_run[0] == json.loads((of_bf16 / "metrics.json").read_text(encoding="utf-8"))
    assert as_run[1] == json.loads((of_bf16 / "nbest.json").read_text(encoding="utf-8"))
    assert evaluated(of_bf16, tmp_path / "same", "--mixed_precision", "bf16") == as_run
    in_float32 = evaluated(of_bf16, tmp_path / "float32", "--mixed_precision", "no")
    best, other = (max(answers[0]["score"] for answers in nbest.values()) for _, nbest in (as_run, in_float32))
    assert best != other
    assert best == pytest.approx(other, abs=0.2)


@pytest.mark.parametrize("has_them", [False, True])
def test_what_makes_an_evaluation_slow_is_said(
    of_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_them: bool
) -> None:
    monkeypatch.setattr(precision, "has_instructions", lambda device_type, asked: has_them or asked == "no")
    evaluated(of_bf16, tmp_path / "run")
    assert (SLOW in capsys.readouterr().err) is not has_them
    evaluated(of_bf16, tmp_path / "float32", "--mixed_precision", "no")
    assert SLOW not in capsys.readouterr().err


def test_there_is_a_bar_unless_it_is_not_wanted(
    of_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {}
    for wanted in ("true", "false"):
        capsys.readouterr()
        evaluated(of_bf16, tmp_path / wanted, "--disable_tqdm", wanted)
        shown[wanted] = "evaluating:" in capsys.readouterr().err
    assert shown == {"true": False, "false": True}


def test_what_makes_a_run_slow_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "has_instructions", lambda device_type, asked: asked == "no")
    trained_folder(tmp_path, mixed_precision="bf16")
    shown = capsys.readouterr().err
    assert shown.count(f"note: {SLOW}") == 1
    assert "use no here" in shown


def test_how_much_of_its_data_a_run_used_says_nothing_of_other_data(tmp_path: Path) -> None:
    folder = trained_folder(tmp_path, max_eval_samples="3", subset_seed="1", max_train_samples="8")
    adapter, other = folder / "adapter", tmp_path / "other.json"
    other.write_bytes((folder / "train.json").read_bytes())
    assert evaluated(adapter, tmp_path / "own")[0]["num_examples"] == 3
    named = ("--validation_file", str(folder / "train.json"))
    assert evaluated(adapter, tmp_path / "named", *named)[0]["num_examples"] == 3
    assert evaluated(adapter, tmp_path / "others", "--validation_file", str(other))[0]["num_examples"] == 12
    asked = ("--validation_file", str(other), "--max_eval_samples", "5")
    assert evaluated(adapter, tmp_path / "asked", *asked)[0]["num_examples"] == 5


@pytest.mark.parametrize(
    ("main", "flag"), [(evaluate.main, "adapter"), (merge.main, "adapter"), (calibrate.main, "model")]
)
def test_a_model_is_named_on_the_command_line_and_the_last_one_counts(
    of_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Any, flag: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{flag}: {of_bf16}\n", encoding="utf-8")
    more = ["--merged_dir", str(tmp_path / "merged")] if main is merge.main else []
    assert main(["--config", str(recipe), *more]) == 2
    assert f"--{flag} {of_bf16} stands in a recipe, before which the model is looked for" in capsys.readouterr().err
    assert main([f"--{flag}", str(of_bf16), f"--{flag}={tmp_path / 'none'}", *more]) == 2
    assert "none is not a folder" in capsys.readouterr().err


def test_results_do_not_take_the_place_of_those_of_the_run(
    of_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(of_bf16)
    other.mkdir()
    (other / "run.json").write_text("{}", encoding="utf-8")
    for folder in (link, other):
        assert "the folder of a run, whose own results stay" in refusal(
            evaluate.main, ["--adapter", str(of_bf16), "--results_dir", str(folder)], capsys
        )


@pytest.fixture
def lacking(of_bf16: Path, tmp_path: Path) -> Path:
    """Questions of which one has no answer, which nothing but that says of them."""
    path = tmp_path / "lacking.json"
    questions = json.loads((of_bf16.parent / "train.json").read_text(encoding="utf-8"))
    del questions["version"]
    questions["data"][0]["paragraphs"][0]["qas"][0]["answers"] = []
    path.write_text(json.dumps(questions), encoding="utf-8")
    return path


def test_null_odds_of_earlier_results_go_with_them(of_bf16: Path, lacking: Path, tmp_path: Path) -> None:
    odds = tmp_path / "results" / "null_odds.json"
    evaluated(of_bf16, odds.parent, "--validation_file", str(lacking))
    assert odds.exists()
    evaluated(of_bf16, odds.parent)
    assert not odds.exists()


def test_results_beside_a_merged_model_say_nothing_of_the_run_that_made_it(
    of_bf16: Path, lacking: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    assert merge.main(["--adapter", str(of_bf16), "--merged_dir", str(merged)]) == 0
    evaluated(merged, merged, "--validation_file", str(lacking))
    assert (merged / "null_odds.json").exists()
    assert not Reader(merged, device="cpu").allow_no_answer
