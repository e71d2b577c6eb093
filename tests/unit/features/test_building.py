"""A store built: what its name depends on, several builders, killed builders, disks that refuse."""

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qa_dist.common.errors import ConfigError, DataError, StoreError, UserError
from qa_dist.config.options import DataConfig
from qa_dist.features import building, workers
from qa_dist.features.building import prepare_store, store_root
from qa_dist.features.store import FeatureStore
from tests.tiny import tiny_tokenizer
from tests.unit.data_fixtures import (
    TINY_SQUAD,
    byte_tokenizer,
    files_of,
    prepared,
    row,
    run_config,
    save_tokenizer,
    tiny_examples,
    write_rows,
)

ROOT = Path(__file__).resolve().parents[3]

# What a child process runs: the tokenizer without the seconds that importing transformers takes.
PREAMBLE = """
import os, signal, sys, types, logging
import tokenizers
from qa_dist.features import building
from qa_dist.config.options import DataConfig, RunConfig

def prepare(tokenizer_folder, train_file, store_dir, **options):
    tokenizer = types.SimpleNamespace(
        is_fast=True, name_or_path="tiny", padding_side="right", cls_token_id=2, bos_token_id=None,
        backend_tokenizer=tokenizers.Tokenizer.from_file(tokenizer_folder + "/tokenizer.json"),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        special_tokens_map={f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "PAD", "CLS", "SEP", "MASK")},
    )
    data = DataConfig(max_seq_length=96, doc_stride=24, train_file=train_file, store_dir=store_dir)
    return building.prepare_store(RunConfig(data=data), "train", tokenizer=tokenizer, **options)

folder, train_file, store_dir = sys.argv[1:4]
"""


@contextlib.contextmanager
def running(code: str, tokenizer_folder: str, store_dir: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that runs PREAMBLE and `code`, and does not outlive the test."""
    arguments = [tokenizer_folder, str(TINY_SQUAD), str(store_dir)]
    with subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


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


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_CHUNK_EXAMPLES", 2)
    monkeypatch.setattr(workers, "_MIN_EXAMPLES_PER_WORKER", 1)
    contents = []
    for num_workers in (1, 2, 3):
        config = run_config(tokenizer_folder, tmp_path / str(num_workers), preprocessing_num_workers=num_workers)
        contents.append(files_of(prepared(config, "train").path))
    assert sorted(contents[0]) == ["examples.arrow", "features.arrow", "manifest.json"]
    assert contents[0] == contents[1] == contents[2]


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


# ---------------------------------------------------------------------------------------------------------- building


@pytest.mark.parametrize("moment", ["_example_batch", "_feature_batch", "_file_entry", "os.fsync", "os.replace"])
def test_a_killed_builder_leaves_nothing_that_counts(tokenizer_folder: str, tmp_path: Path, moment: str) -> None:
    kill = f"building.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    code = f"{kill}\nprepare(folder, train_file, store_dir)"
    with running(code, tokenizer_folder, tmp_path) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    (staging,) = visible(tmp_path)
    assert staging.endswith(".building")
    store = prepared(run_config(tokenizer_folder, tmp_path), "train")
    assert visible(tmp_path) == [store.fingerprint]


def test_a_builder_that_is_killed_at_any_time_leaves_a_whole_store_or_none(
    tokenizer_folder: str, built: FeatureStore, tmp_path: Path
) -> None:
    for delay in (0.0, 0.002, 0.01, 0.03):
        code = "print('go', flush=True)\nprepare(folder, train_file, store_dir)"
        with running(code, tokenizer_folder, tmp_path) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
        whole = [name for name in (visible(tmp_path) if tmp_path.exists() else []) if not name.startswith(".")]
        assert whole in ([], [built.fingerprint])
        for name in whole:
            FeatureStore(tmp_path / name)
            shutil.rmtree(tmp_path / name)
    prepared(run_config(tokenizer_folder, tmp_path), "train")
    assert visible(tmp_path) == [built.fingerprint]


def test_several_processes_at_once_get_one_store_that_one_of_them_builds(
    tokenizer_folder: str, built: FeatureStore, tmp_path: Path
) -> None:
    code = (
        "build = building.build_columns\n"
        "def counted(*args, **options):\n"
        "    print('building', flush=True)\n"
        "    import time; time.sleep(0.5)\n"
        "    return build(*args, **options)\n"
        "building.build_columns = counted\n"
        "found = prepare(folder, train_file, store_dir)\n"
        "print(found.fingerprint, int(found.flat(range(found.num_features))[0].sum()))"
    )
    outputs = []
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(running(code, tokenizer_folder, tmp_path)) for _ in range(4)]
        for process in processes:
            output, errors = process.communicate()
            assert process.returncode == 0, errors
            outputs.append(output.split("\n"))
    assert sum("building" in lines for lines in outputs) == 1
    total = int(built.flat(range(built.num_features))[0].sum())
    assert {lines[-2] for lines in outputs} == {f"{built.fingerprint} {total}"}
    assert visible(tmp_path) == [built.fingerprint]


def test_waiting_for_a_builder_is_said_once_and_ends_with_it(
    tokenizer_folder: str, built: FeatureStore, tmp_path: Path
) -> None:
    code = (
        "def stuck(*args, **options):\n"
        "    print('stuck', flush=True)\n"
        "    signal.pause()\n"
        "building.build_columns = stuck\n"
        "prepare(folder, train_file, store_dir)"
    )
    with running(code, tokenizer_folder, tmp_path) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "stuck\n"
        with running("prepare(folder, train_file, store_dir)\nprint('done')", tokenizer_folder, tmp_path) as waiter:
            assert waiter.stderr is not None
            message = waiter.stderr.readline()
            assert "waiting for another process" in message
            assert waiter.poll() is None
            # However the builder ends, its lock is free.
            builder.kill()
            output, errors = waiter.communicate()
    assert (output, errors, waiter.returncode) == ("done\n", "", 0)
    assert visible(tmp_path) == [built.fingerprint]


def test_only_what_dead_builders_left_is_swept(tokenizer_folder: str, built: FeatureStore, tmp_path: Path) -> None:
    dead = tmp_path / f".{'0' * 64}.1234.building"
    own = tmp_path / f".{built.fingerprint}.1234.building"
    for folder in (dead, own):
        folder.mkdir()
        (folder / "features.arrow").touch()
    code = (
        "def stuck(*args, **options):\n"
        "    print('stuck', flush=True)\n"
        "    signal.pause()\n"
        "building._file_entry = stuck\n"
        "DataConfig.__init__.__kwdefaults__['max_train_samples'] = 3\n"
        "prepare(folder, train_file, store_dir)"
    )
    with running(code, tokenizer_folder, tmp_path) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "stuck\n"
        (alive,) = (path for path in tmp_path.glob(".*.building") if path not in (dead, own))
        prepared(run_config(tokenizer_folder, tmp_path), "train")
        assert alive.exists()
        assert visible(tmp_path) == sorted([alive.name, built.fingerprint])


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
    with pytest.raises(StoreError, match=r"cannot be written to .*--store_dir"):
        prepared(run_config(tokenizer_folder, tmp_path / "file" / "stores"), "train")


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
    for error, options in (
        (DataError, {"train_file": str(tmp_path / "none.json")}),
        (ConfigError, {"doc_stride": 95}),
    ):
        with pytest.raises(error):
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
