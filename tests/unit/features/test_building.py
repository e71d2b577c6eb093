"""A store built: what its name depends on, disks that refuse, and stores of earlier versions."""

import dataclasses
import errno
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qa_dist.common.errors import ConfigError, DataError, StoreError, UserError
from qa_dist.config.options import DataConfig
from qa_dist.data import formats, sources
from qa_dist.data.rows import with_whole_ids
from qa_dist.features import building
from qa_dist.features.building import prepare_store, store_root
from qa_dist.features.store import STAGING_SUFFIX, FeatureStore
from tests.tiny import tiny_tokenizer
from tests.unit.data_fixtures import (
    byte_tokenizer,
    prepared,
    row,
    run_config,
    save_tokenizer,
    tiny_examples,
    write_rows,
)

ROOT = Path(__file__).resolve().parents[3]


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


# ------------------------------------------------------------------------------------------------------- fingerprint


def test_a_store_that_is_there_is_mapped_and_nothing_is_parsed(
    tokenizer_folder: str, built: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load_source", "build_columns", "_locked"):
        monkeypatch.setattr(building, name, None)
    again = prepared(run_config(tokenizer_folder, built.path.parent), "train")
    assert again.path == built.path


def test_what_a_store_depends_on_is_in_its_fingerprint(tokenizer_folder: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", *(row(str(i)) for i in range(6)))
    other = write_rows(tmp_path / "b.jsonl", *(row(str(i)) for i in range(7)))
    same = write_rows(tmp_path / "c.jsonl", *(row(str(i)) for i in range(6)))

    def fingerprint(folder: str = tokenizer_folder, split: Any = "train", **options: Any) -> str:
        options.setdefault("train_file", path)
        return prepared(run_config(folder, tmp_path / "stores", **options), split).fingerprint

    base = fingerprint()
    different = {
        fingerprint(save_tokenizer(tmp_path / "cased", tiny_tokenizer(uncased=False))),
        fingerprint(save_tokenizer(tmp_path / "left", tiny_tokenizer(padding_side="left"))),
        fingerprint(save_tokenizer(tmp_path / "bytes", byte_tokenizer())),
        fingerprint(train_file=other),
        fingerprint(max_seq_length=97),
        fingerprint(doc_stride=25),
        fingerprint(max_question_length=10),
        fingerprint(version_2_with_negative=False),
        fingerprint(on_invalid="drop"),
        fingerprint(max_train_samples=5),
        fingerprint(max_train_samples=5, subset_seed=1),
        fingerprint(max_train_samples=5, subset_seed=2),
    }
    assert len(different | {base}) == 13
    assert base == fingerprint(train_file=same)
    # What is no example for training may be one for evaluation.
    assert base != fingerprint(validation_file=path, split="validation")
    assert base == fingerprint(preprocessing_num_workers=1)
    assert base == fingerprint(version_2_with_negative=True)
    assert base == fingerprint(max_eval_samples=3)
    # The longest question that fits is what "auto" means: 96 - 3 special tokens - stride 24 - 1.
    assert base == fingerprint(max_question_length=68)


def test_a_subset_is_stored_alone(tokenizer_folder: str, tmp_path: Path) -> None:
    config = run_config(tokenizer_folder, tmp_path, max_train_samples=4, subset_seed=3)
    store = prepared(config, "train")
    wanted = np.random.default_rng(3).permutation(len(tiny_examples()))[:4]
    assert store.example_ids == [tiny_examples()[i].id for i in wanted]
    assert store.report.num_examples == len(tiny_examples())


def test_where_stores_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("QA_DIST_STORE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert store_root(DataConfig()) == Path("/home/somebody/.cache/qa_dist")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert store_root(DataConfig()) == Path("/cache/qa_dist")
    monkeypatch.setenv("QA_DIST_STORE", "~/stores")
    assert store_root(DataConfig()) == Path("/home/somebody/stores")
    assert store_root(DataConfig(store_dir=str(tmp_path))) == tmp_path


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(building, "_write_batch", full)
    with pytest.raises(StoreError, match=r"cannot be written to .*No space left on device.*--store_dir") as caught:
        prepared(run_config(tokenizer_folder, tmp_path), "train")
    assert "\n" not in str(caught.value)
    assert visible(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(tokenizer_folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "stores"):
        with pytest.raises(StoreError, match=r"cannot be written to .*Not a directory.*--store_dir"):
            prepared(run_config(tokenizer_folder, folder), "train")


def test_a_store_in_a_read_only_folder_is_used(
    tokenizer_folder: str, built: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests may run as root, whom permissions do not stop; so the functions that write are taken away instead.
    def forbidden(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    monkeypatch.setattr(building.fcntl, "flock", forbidden)
    assert prepared(run_config(tokenizer_folder, built.path.parent), "train").path == built.path


def test_mistakes_are_told_before_anything_is_written(tokenizer_folder: str, tmp_path: Path) -> None:
    root = tmp_path / "stores"
    for error, options, part in (
        (DataError, {"train_file": str(tmp_path / "none.json")}, r"none\.json does not exist; check the path"),
        (ConfigError, {"doc_stride": 95}, "--doc_stride 95 leaves no room for a question"),
    ):
        with pytest.raises(error, match=part):
            prepared(run_config(tokenizer_folder, root, **options), "train")
    with pytest.raises(UserError, match="does not exist"):
        prepared(run_config("/no/such/folder", root), "train")
    assert not root.exists()


def test_findings_are_told_by_the_process_that_reports(
    tokenizer_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mended = row("q7", answers={"text": ["Mora"], "answer_start": [2]})
    path = write_rows(tmp_path / "a.jsonl", mended, row("q8", question="b " * 200), row("q9", question=" "))
    config = run_config(tokenizer_folder, tmp_path, train_file=path, on_invalid="drop")
    with caplog.at_level(logging.WARNING):
        prepared(config, "train")
        assert caplog.text == ""
        # The store is there by now, and its findings with it.
        store = prepared(config, "train", progress=True)
    assert "mended: 1" in caplog.text
    assert "q9" in caplog.text
    assert "1 questions were cut to 68 tokens" in caplog.text
    assert (store.report.num_mended, store.report.num_invalid, store.num_examples) == (1, 1, 2)


def test_the_tokenizer_of_the_caller_is_taken(built: FeatureStore, tmp_path: Path) -> None:
    config = run_config("/no/such/folder", tmp_path)
    assert prepare_store(config, "train", tokenizer=tiny_tokenizer()).fingerprint == built.fingerprint


LATER = ("labels", "reading_rules", "for_training")


@pytest.mark.parametrize("answers", [["on a lake"], ["on a lake", "a lake"]])
def test_a_store_of_when_only_first_answers_were_labels_is_used_where_that_is_the_same(
    answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = "Mora lies on a lake. The lake is deep."
    starts = [context.index(text) for text in answers]
    path = write_rows(tmp_path / "rows.jsonl", row(answers={"text": answers, "answer_start": starts}))
    config = run_config(save_tokenizer(tmp_path / "tokenizer"), tmp_path / "stores", train_file=path)
    ingredients = building._ingredients
    with monkeypatch.context() as earlier:
        earlier.setattr(
            building,
            "_ingredients",
            lambda *given: {name: value for name, value in ingredients(*given).items() if name not in LATER},
        )
        before = prepared(config, "train")
    again = prepared(config, "train")
    assert again.has_several_answers == (len(answers) > 1)
    assert (again.path == before.path) == (len(answers) == 1)
    assert prepared(config, "train").path == again.path


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"answers": []}, True),
        ({"answers": {"text": ["Mora"], "answer_start": [0]}}, True),
        ({"answers": {"text": ["Mora"], "answer_start": [3]}}, True),
        # What earlier versions took for an unanswerable question.
        ({"answers": None}, False),
    ],
)
def test_a_store_of_earlier_reading_rules_is_used_where_they_make_no_difference(
    changes: dict[str, Any], is_same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", row("a", **changes), row("b"))
    config = run_config(save_tokenizer(tmp_path / "tokenizer"), tmp_path / "stores", validation_file=path)
    ingredients, rows = building._ingredients, building.load_source

    def earlier_rules(source: Any, data: Any, split: Any) -> Any:
        examples, report = rows(source, data, split)
        examples = [dataclasses.replace(example, has_references=True) for example in examples]
        return examples, dataclasses.replace(report, num_unanswerable=sum(not e.answers for e in examples))

    with monkeypatch.context() as earlier:
        earlier.setattr(
            building,
            "_ingredients",
            lambda *given: {name: value for name, value in ingredients(*given).items() if name not in LATER},
        )
        earlier.setattr(building, "load_source", earlier_rules)
        before = prepared(config, "validation")
    again = prepared(config, "validation")
    assert (again.path == before.path) == is_same
    assert again.has_references.tolist() == [is_same, True]


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({}, True),
        ({"answers": {"text": ["Mora", "a lake"], "answer_start": [3, 13]}}, True),
        # An accent that is a character of its own was not the letter's.
        ({"context": "Mo\u0301ra lies on a lake.", "answers": {"text": ["Mo\u0301ra"], "answer_start": [0]}}, False),
    ],
)
def test_a_store_of_the_last_reading_rules_is_used_where_they_make_no_difference(
    changes: dict[str, Any], is_same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", row("a", **changes), row("b"))
    config = run_config(save_tokenizer(tmp_path / "tokenizer"), tmp_path / "stores", train_file=path)
    with monkeypatch.context() as earlier:
        earlier.setattr(building, "READING_RULES", building.READING_RULES - 1)
        before = prepared(config, "train")
    assert (prepared(config, "train").path == before.path) == is_same


def test_validation_data_of_earlier_reading_rules_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"text": ["Ada Kerrow"], "answer_start": [3]}
    path = write_rows(tmp_path / "rows.jsonl", row("a", context="By Ada\u200b Kerrow.", answers=answers))
    config = run_config(save_tokenizer(tmp_path / "tokenizer"), tmp_path / "stores", validation_file=path)
    read = sources.validate
    with monkeypatch.context() as earlier:
        earlier.setattr(building, "READING_RULES", building.READING_RULES - 1)
        earlier.setattr(
            sources, "validate", lambda *given, **options: read(*given, **options | {"keep_spelling": False})
        )
        before = prepared(config, "validation")
    again = prepared(config, "validation")
    assert before.answer_texts(0) == ["Ada\u200b Kerrow"]
    assert again.answer_texts(0) == ["Ada Kerrow"]


def test_training_data_whose_ids_were_made_whole_numbers_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", row("1.0"), row("2.0"))
    config = run_config(save_tokenizer(tmp_path / "tokenizer"), tmp_path / "stores", train_file=path)
    lay_out = formats.lay_out
    with monkeypatch.context() as earlier:
        earlier.setattr(building, "READING_RULES", 7)
        earlier.setattr(formats, "lay_out", lambda rows, *rest: lay_out(with_whole_ids(rows), *rest))
        assert prepared(config, "train").example_ids == ["1", "2"]
    assert prepared(config, "train").example_ids == ["1.0", "2.0"]


def test_files_that_were_renamed_are_named_as_they_are_now(
    tokenizer_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b"):
        write_rows(folder / f"{name}.jsonl", row(name))
    config = run_config(tokenizer_folder, tmp_path / "stores", train_file=str(folder))

    def told() -> str:
        caplog.clear()
        prepared(config, "train", progress=True)
        (said,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
        return said

    said = f"{folder}: read from 2 files: a.jsonl, b.jsonl; records: 2, valid: 2, unanswerable: 0"
    assert [told(), told()] == [said] * 2
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").rename(folder / f"new_{name}.jsonl")
    now = "read from 2 files: new_a.jsonl, new_b.jsonl"
    assert told() == f"{said}; the files were called so when the store was made, now it would be {now}"


def test_a_folder_without_locks_is_used(tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    config = run_config(tokenizer_folder, tmp_path / "stores")
    assert prepared(config, "train").num_examples
    # Another machine may have built the same store meanwhile: that one stays.
    (place,) = [path for path in (tmp_path / "stores").iterdir() if not path.name.startswith(".")]
    with building._kept_if_there(place):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")
    with pytest.raises(OSError, match="not empty"), building._kept_if_there(tmp_path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")


def test_what_another_machine_is_building_is_left_alone(tokenizer_folder: str, tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    mine, theirs = (stores / f".{'a' * 16}.{name}-12ab{STAGING_SUFFIX}" for name in (building._machine(), "0" * 8))
    for folder in (mine, theirs):
        folder.mkdir(parents=True)
    prepared(run_config(tokenizer_folder, stores), "train")
    assert (mine.exists(), theirs.exists()) == (False, True)
