import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qa_dist.features.store import FeatureStore
from qa_dist.prepare import main
from tests.refusals import refusal
from tests.unit.data_fixtures import MALFORMED, TINY_SQUAD, row, save_tokenizer, tiny_examples, write_rows

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"num_examples", "num_features", "mean_tokens", "fingerprint", "seconds"}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def flags(tokenizer_folder: str, tmp_path: Path) -> list[str]:
    return ["--model_name_or_path", tokenizer_folder, "--store_dir", str(tmp_path / "stores")]


def prepared(capsys: pytest.CaptureFixture[str], argv: list[str]) -> dict[str, Any]:
    assert main(argv) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_one_split_is_described_at_the_top(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    found = prepared(capsys, ["--train_file", str(TINY_SQUAD), *flags])
    assert set(found) > KEYS
    assert found["split"] == "train"
    assert {**found["splits"]["train"], "split": "train", "splits": found["splits"]} == found
    assert list(found["splits"]) == ["train"]
    store = FeatureStore(found["path"])
    assert found["fingerprint"] == store.fingerprint
    assert found["num_examples"] == store.num_examples == len(tiny_examples())
    assert found["num_features"] == store.num_features
    assert found["mean_tokens"] == round(float(store.lengths.mean()), 2)
    assert found["num_unanswerable"] == 2
    assert found["seconds"] > 0


def test_of_two_splits_the_training_one_is_at_the_top(
    capsys: pytest.CaptureFixture[str], flags: list[str], tmp_path: Path
) -> None:
    dev = write_rows(tmp_path / "dev.jsonl", row("a"), row("b", answers={"text": ["Mora"], "answer_start": [1]}))
    both = prepared(capsys, ["--train_file", str(TINY_SQUAD), "--validation_file", dev, *flags])
    assert list(both["splits"]) == ["train", "validation"]
    assert both["ceiling"] == both["splits"]["validation"]["ceiling"] == {"exact_match": 100.0, "f1": 100.0}
    assert "ceiling" not in both["splits"]["train"]
    assert all(0 <= split["unknown_token_share"] < 1 for split in both["splits"].values())
    assert both["num_examples"] == both["splits"]["train"]["num_examples"] == len(tiny_examples())
    assert (both["splits"]["validation"]["num_examples"], both["splits"]["validation"]["num_mended"]) == (2, 1)
    alone = prepared(capsys, ["--validation_file", dev, *flags])
    assert alone["split"] == "validation"
    assert alone["fingerprint"] == both["splits"]["validation"]["fingerprint"]


def test_the_ceiling_follows_the_longest_answer_and_the_rules(
    capsys: pytest.CaptureFixture[str], flags: list[str], tmp_path: Path
) -> None:
    answers = {"text": ["The harbor"], "answer_start": [15]}
    dev = write_rows(tmp_path / "dev.jsonl", row("a", context="North of it. - The harbor", answers=answers))
    words = ["--validation_file", dev, *flags, "--max_answer_length", "1"]
    found = prepared(capsys, words)
    assert found["ceiling"] == {"exact_match": 100.0, "f1": 100.0}, "by SQuAD's rules an article does not count"
    found = prepared(capsys, [*words, "--answer_normalization", "none"])
    assert found["ceiling"] == {"exact_match": 0.0, "f1": pytest.approx(200 / 3)}
    assert found["out_of_reach"] == {"too_long": 1}


def test_the_embedded_sample_is_the_default(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    found = prepared(capsys, flags)
    assert list(found["splits"]) == ["train", "validation"]
    assert found["num_examples"] >= 1000
    assert found["num_unlabelled_examples"] == 0


def test_dropped_records_are_counted_and_told(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, flags: list[str], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", row("a"), row("b", question=""))
    found = prepared(capsys, ["--train_file", path, "--on_invalid", "drop", *flags])
    assert (found["num_examples"], found["num_dropped"]) == (1, 1)
    assert "question is empty or blank (b)" in caplog.text


def test_a_recipe_with_options_of_training_serves_here_too(
    capsys: pytest.CaptureFixture[str], flags: list[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"train_file: {TINY_SQUAD}\nlearning_rate: 0.001\nmax_seq_length: 100\ndoc_stride: 20\n")
    assert prepared(capsys, ["--config", str(recipe), *flags])["num_features"] > len(tiny_examples())


def test_a_damaged_store_is_one_sentence_until_it_is_deleted(
    capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    argv = ["--train_file", str(TINY_SQUAD), *flags]
    path = Path(prepared(capsys, argv)["path"])
    with (path / "features.arrow").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff")
    assert main(argv) == 2
    assert "delete that folder" in capsys.readouterr().err
    shutil.rmtree(path)
    assert prepared(capsys, argv)["path"] == str(path)


def assert_one_sentence(code: int | None, out: str, err: str) -> None:
    assert code == 2
    assert out == ""
    assert err.startswith("qa_dist.prepare: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("path", sorted(MALFORMED.iterdir()), ids=lambda path: path.name)
def test_malformed_files_end_with_one_sentence(
    capsys: pytest.CaptureFixture[str], flags: list[str], tmp_path: Path, path: Path
) -> None:
    code = main(["--train_file", str(path), *flags])
    assert_one_sentence(code, *capsys.readouterr())
    stores = tmp_path / "stores"
    assert not stores.exists() or all(item.name.endswith(".lock") for item in stores.iterdir())


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--train_file", "/no/such/file.json"], "/no/such/file.json does not exist"),
        (["--train_file", str(ROOT / "launch")], "is a folder"),
        (["--dataset_name", "synthetic:x"], "synthetic:N"),
        (["--doc_stride", "400"], "--doc_stride 400"),
        (["--max_seq_lenght", "384"], "--max_seq_length"),
        (["--tokenizer_name", "package:no_such_package_here/x"], "not installed"),
        (["--tokenizer_name", "/no/such/folder"], "/no/such/folder does not exist"),
    ],
)
def test_mistakes_on_the_command_line_end_with_one_sentence(
    capsys: pytest.CaptureFixture[str], flags: list[str], argv: list[str], part: str
) -> None:
    code = main([*argv, *flags])
    captured = capsys.readouterr()
    assert_one_sentence(code, *captured)
    assert part in captured.err


def test_nothing_is_prepared_for_a_model_that_is_not_trained(
    capsys: pytest.CaptureFixture[str], tokenizer_folder: str, tmp_path: Path
) -> None:
    model, stores = tmp_path / "t5", tmp_path / "stores"
    shutil.copytree(tokenizer_folder, model)
    (model / "config.json").write_text('{"model_type": "t5", "num_layers": 2}')
    argv = ["--train_file", str(TINY_SQUAD), "--model_name_or_path", str(model), "--store_dir", str(stores)]
    code = main(argv)
    captured = capsys.readouterr()
    assert_one_sentence(code, *captured)
    assert "t5 models are not trained here" in captured.err
    assert not stores.exists()


@pytest.mark.parametrize("name", ["truncated.json.gz", "several.json", "deep.json"])
def test_malformed_files_from_the_command_line(capsys: pytest.CaptureFixture[str], flags: list[str], name: str) -> None:
    code = main(["--train_file", str(MALFORMED / name), *flags])
    assert_one_sentence(code, *capsys.readouterr())


def test_a_second_run_from_the_command_line_finds_the_store_of_the_first(
    capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    words = ["--train_file", str(TINY_SQUAD), *flags]
    assert main(words) == 0
    first = capsys.readouterr()
    assert "100%" in first.err
    assert main(words) == 0
    second = capsys.readouterr()
    assert json.loads(first.out)["fingerprint"] == json.loads(second.out)["fingerprint"]
    assert second.err == ""


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, qa_dist.prepare\n"
        "try:\n    qa_dist.prepare.main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code in (0, None)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 250, len(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "--preprocessing_num_workers" in done.stdout


def test_a_model_that_is_not_trained_is_refused_before_packages_for_its_tokenizer_are_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")
    (tmp_path / "spiece.model").write_bytes(b"not to be read without the packages")
    monkeypatch.setattr("qa_dist.model.pretrained._is_installed", lambda module: False)
    told = refusal(main, ["--train_file", str(TINY_SQUAD), "--model_name_or_path", str(tmp_path)], capsys)
    assert "t5 models are not trained here" in told
    assert "pip install" not in told
