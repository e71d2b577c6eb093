import csv
import gzip
import hashlib
import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from qa_dist.common.errors import DataError
from qa_dist.config.options import DataConfig
from qa_dist.data.checking import PROBLEMS, Report, validate
from qa_dist.data.records import Answer, Example
from qa_dist.data.rows import read_rows
from qa_dist.data.sample import sample_path
from qa_dist.data.sources import available_splits, load_examples, open_source, subset
from tests.unit.data_fixtures import (
    MALFORMED,
    TINY_SQUAD,
    read_file,
    row,
    tiny_examples,
    write_rows,
)


def check(*rows: dict[str, Any], **options: Any) -> tuple[list[Example], Report]:
    return validate(read_rows(rows), **options)


def kinds(report: Report) -> dict[str, int]:
    return {problem.kind: problem.count for problem in report.problems}


# ----------------------------------------------------------------------------------------------------------- layouts


def test_squad_json_flattens_to_examples_whose_answers_are_in_place() -> None:
    examples, report = validate(read_file(TINY_SQUAD))
    assert kinds(report) == {}
    assert (report.num_records, report.num_unanswerable, report.num_mended) == (len(examples), 2, 0)
    assert examples[0].title == "Cafés"
    assert examples[1].question == "   Where did the slate come from?"
    for example in examples:
        for answer in example.answers:
            assert example.context[answer.start_char : answer.end_char] == answer.text
    by_id = {example.id: example for example in examples}
    assert by_id["none-1"].answers == ()
    assert "\r\n" in by_id["crlf-1"].context
    assert by_id["combining-1"].answers == (Answer("cafe\u0301", 30),)
    assert by_id["emoji-2"].answers[0].text == "\N{STEAM LOCOMOTIVE}"


def csv_bytes(examples: list[Example], separator: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator)
    writer.writerow(["title", "id", "question", "context", "answers"])
    for example in examples:
        answers = {"text": [a.text for a in example.answers], "answer_start": [a.start_char for a in example.answers]}
        writer.writerow([example.title, example.id, example.question, example.context, json.dumps(answers)])
    return text.getvalue().encode()


def tsv_bytes(examples: list[Example]) -> bytes:
    return csv_bytes(examples, "\t")


def semicolon_bytes(examples: list[Example]) -> bytes:
    return csv_bytes(examples, ";")


def jsonl_bytes(examples: list[Example]) -> bytes:
    rows = []
    for example in examples:
        answers = [{"text": a.text, "answer_start": a.start_char} for a in example.answers]
        parts = {"id": example.id, "title": example.title, "context": example.context, "question": example.question}
        rows.append(json.dumps({**parts, "answers": answers}, ensure_ascii=False))
    return "\n".join(rows).encode()


def json_rows_bytes(examples: list[Example]) -> bytes:
    return json.dumps({"data": [json.loads(line) for line in jsonl_bytes(examples).decode().split("\n")]}).encode()


def parquet_bytes(examples: list[Example]) -> bytes:
    rows = []
    for example in examples:
        answers = {"text": [a.text for a in example.answers], "answer_start": [a.start_char for a in example.answers]}
        parts = {"id": example.id, "title": example.title, "context": example.context, "question": example.question}
        rows.append({**parts, "answers": answers})
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", jsonl_bytes),
        ("a.JSONL", jsonl_bytes),
        ("a.json", jsonl_bytes),
        ("a.json", json_rows_bytes),
        ("a", json_rows_bytes),
        ("a", jsonl_bytes),
        ("a.csv", csv_bytes),
        ("a.txt", csv_bytes),
        ("a.csv", semicolon_bytes),
        ("a.csv", tsv_bytes),
        ("a.tsv", tsv_bytes),
        ("a.txt", tsv_bytes),
        ("a.parquet", parquet_bytes),
        ("a", parquet_bytes),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_layout_holds_the_same_examples(
    tmp_path: Path, name: str, write: Any, compressed: bool, mark: bytes
) -> None:
    expected = tiny_examples()
    content = (b"" if write is parquet_bytes else mark) + write(expected)
    path = tmp_path / (f"{name}.gz" if compressed else name)
    path.write_bytes(gzip.compress(content) if compressed else content)
    examples, report = validate(read_file(path))
    assert examples == expected
    assert report.problems == ()


def test_gzip_is_recognised_without_its_extension(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(gzip.compress(TINY_SQUAD.read_bytes()))
    assert validate(read_file(path))[0] == tiny_examples()


def test_a_line_separator_inside_a_json_string_does_not_end_a_line(tmp_path: Path) -> None:
    text = json.dumps(row(question="Where\u2028is Mora?\x85"), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(text + "\r\n\n" + text.replace("q1", "q2"), encoding="utf-8", newline="")
    assert len(validate(read_file(tmp_path / "a.jsonl"))[0]) == 2


def test_csv_takes_contexts_beyond_the_modules_limit_and_leaves_that_limit_alone(tmp_path: Path) -> None:
    limit = 1000
    previous = csv.field_size_limit(limit)
    example = Example("q1", "Where?", "Mora " * 50_000, (Answer("Mora", 0),))
    (tmp_path / "a.csv").write_bytes(csv_bytes([example]))
    assert validate(read_file(tmp_path / "a.csv"))[0] == [example]
    assert csv.field_size_limit(previous) == limit


# -------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["on a lake", "lake"], "answer_start": [10, 15]},
        [{"text": "on a lake", "answer_start": 10}, {"text": "lake", "answer_start": 15}],
        '{"text": ["on a lake", "lake"], "answer_start": [10, 15]}',
        '[{"text": "on a lake", "answer_start": 10}, {"text": "lake", "answer_start": 15}]',
    ],
)
def test_answers_in_every_layout(answers: Any) -> None:
    (example,), report = check(row(answers=answers))
    assert example.answers == (Answer("on a lake", 10), Answer("lake", 15))
    assert (report.num_mended, report.num_unanswerable) == (0, 0)


@pytest.mark.parametrize(
    "answers",
    [
        *([], {}, {"text": [], "answer_start": []}, "[]", '{"text":[],"answer_start":[]}'),
        *(
            "{'text': [], 'answer_start': []}",
            "{'text': array([], dtype=object), 'answer_start': array([], dtype=int64)}",
        ),
        *([{"text": "", "answer_start": -1}], [{"text": "", "answer_start": None}], [{"text": ""}]),
        *({"text": [""], "answer_start": [-1]}, {"text": "", "answer_start": -1}, [{"text": None, "answer_start": -1}]),
    ],
)
def test_no_answers_in_every_layout(answers: Any) -> None:
    (example,), report = check(row(answers=answers))
    assert example.answers == ()
    assert report.num_unanswerable == 1


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"id": ...}, "missing_id"),
        ({"id": None}, "missing_id"),
        ({"question": ...}, "missing_question"),
        ({"context": None}, "missing_context"),
        ({"id": 1.5}, "wrong_id"),
        ({"id": True}, "wrong_id"),
        ({"id": ""}, "empty_id"),
        ({"question": 3}, "wrong_question"),
        ({"context": ["a"]}, "wrong_context"),
        ({"title": ["Mora"]}, "wrong_title"),
        ({"is_impossible": "no"}, "wrong_is_impossible"),
        ({"answers": True}, "wrong_answers"),
        ({"answers": ...}, "missing_answers"),
        ({"answers": None}, "missing_answers"),
        ({"answers": math.nan}, "missing_answers"),
        ({"answers": " "}, "missing_answers"),
        ({"answers": {"text": None, "answer_start": None}}, "missing_answers"),
        ({"answers": {"text": [None], "answer_start": [None]}}, "missing_answers"),
        ({"answers": {"text": [math.nan], "answer_start": [math.nan]}}, "missing_answers"),
        ({"answers": [{"text": None, "answer_start": None}]}, "missing_answers"),
        ({"answers": [None]}, "missing_answers"),
        ({"answers": {"text": ["on a lake"], "answer_start": []}}, "wrong_answers"),
        ({"answers": {"text": "on a lake", "answer_start": [10, 12]}}, "wrong_answers"),
        ({"answers": {"answer_start": [10]}}, "wrong_answers"),
        ({"answers": [{"text": "on a lake", "answer_start": 10.5}]}, "wrong_answers"),
        ({"answers": [{"text": "on a lake", "answer_start": True}]}, "wrong_answers"),
        ({"answers": [{"text": "on a lake", "answer_start": "ten"}]}, "wrong_answers"),
        ({"answers": [{"text": None, "answer_start": 10}]}, "empty_answer"),
        ({"answers": [True]}, "wrong_answers"),
        ({"answers": "{'text': open('x'), 'answer_start': 3}"}, "wrong_answers"),
        ({"answers": "[{'text': 'on a lake', 'answer_start': 10]"}, "wrong_answers"),
        ({"question": ""}, "empty_question"),
        ({"question": " \t\n"}, "empty_question"),
        ({"context": "\u00a0", "answers": []}, "empty_context"),
        ({"question": "Where \ud83d?"}, "not_unicode"),
        ({"title": "\udfff"}, "not_unicode"),
        ({"id": "\ud800"}, "not_unicode"),
        ({"answers": [{"text": "", "answer_start": 10}]}, "empty_answer"),
        ({"answers": [{"text": "", "answer_start": -1}], "is_impossible": False}, "empty_answer"),
        ({"answers": [{"text": "", "answer_start": -1}, {"text": "Mora", "answer_start": 0}]}, "empty_answer"),
        ({"answers": [{"text": "ora", "answer_start": 35}]}, "answer_not_at_offset"),
        ({"answers": [{"text": "lake", "answer_start": -5}]}, "answer_not_at_offset"),
        ({"answers": [{"text": "lake", "answer_start": 0}]}, "answer_not_at_offset"),
        ({"answers": [{"text": "river", "answer_start": 0}]}, "answer_not_at_offset"),
        ({"is_impossible": True}, "impossible_with_answers"),
    ],
)
def test_one_bad_record_is_found_and_the_good_ones_stay(changes: dict[str, Any], kind: str) -> None:
    examples, report = check(row("a"), row(**changes), row("z"))
    assert [example.id for example in examples] == ["a", "z"]
    assert kinds(report) == {kind: 1}
    assert report.num_invalid == 1
    assert PROBLEMS[kind] in report.text()


def test_mending_is_counted_and_told() -> None:
    wrong = {"text": ["Mora", "on a lake"], "answer_start": [3, 10]}
    (example, _), report = check(row("q7", answers=wrong), row("q8"))
    assert example.answers == (Answer("Mora", 0), Answer("on a lake", 10))
    assert (report.num_mended, report.first_mended, report.num_invalid) == (1, ("q7",), 0)
    assert "mended: 1" in report.text()
    assert "q7" in report.text()


def test_overlapping_occurrences_are_not_taken_for_one() -> None:
    answers = {"text": ["aa"], "answer_start": [0]}
    _, report = check(row(context="b aaa b", answers=answers))
    assert kinds(report) == {"answer_not_at_offset": 1}


def test_the_report_counts_every_kind_shows_three_ids_and_survives_json() -> None:
    bad = [row(f"e{i}", question="", context="") for i in range(5)]
    _, report = check(*bad, row("ok", answers={"text": ["deep."], "answer_start": [1]}))
    assert kinds(report) == {"empty_question": 5, "empty_context": 5, "answer_not_at_offset": 5}
    assert report.problems[0].first_ids == ("e0", "e1", "e2")
    assert "e0, e1, e2, ..." in report.text()
    assert report.num_invalid == 5
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_examples_of_one_context_share_its_string() -> None:
    rows = [json.loads(json.dumps(row(str(i)))) for i in range(2)]
    examples, _ = check(*rows)
    assert examples[0].context is examples[1].context


def test_records_of_broken_articles_are_named_by_their_place() -> None:
    path = MALFORMED / "qas_is_object.json"
    _, report = validate(read_file(path))
    assert report.problems[0].first_ids == ("article 1, paragraph 1",)


# ----------------------------------------------------------------------------------------------------------- loading


def test_invalid_records_stop_or_are_dropped(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", row("a"), row("b", question=" "), row("c", answers=[]))
    with pytest.raises(DataError, match=r"question is empty or blank \(b\).*--on_invalid drop"):
        load_examples(DataConfig(train_file=path), "train")
    examples, report, digest = load_examples(DataConfig(train_file=path, on_invalid="drop"), "train")
    assert [example.id for example in examples] == ["a", "c"]
    assert (report.num_invalid, report.num_unanswerable) == (1, 1)
    assert digest == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_questions_without_answers_are_invalid_where_they_are_ruled_out(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", row("a"), row("b", answers=[]))
    with pytest.raises(DataError, match=r"no answers; pass --version_2_with_negative"):
        load_examples(DataConfig(train_file=path, version_2_with_negative=False), "train")
    for allowed in (None, True):
        assert len(load_examples(DataConfig(train_file=path, version_2_with_negative=allowed), "train")[0]) == 2


def test_nothing_left_after_dropping_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", row(question=""))
    with pytest.raises(DataError, match="Nothing is left"):
        load_examples(DataConfig(train_file=path, on_invalid="drop"), "train")


def test_subsets_are_taken_from_the_valid_examples(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", row("bad", question="\ud83d"), *(row(str(i)) for i in range(9)))
    data = DataConfig(train_file=path, validation_file=path, on_invalid="drop", max_train_samples=3, max_eval_samples=2)
    assert [example.id for example in load_examples(data, "train")[0]] == ["0", "1", "2"]
    assert [example.id for example in load_examples(data, "validation")[0]] == ["0", "1"]
    drawn = DataConfig(train_file=path, on_invalid="drop", max_train_samples=3, subset_seed=42)
    wanted = np.random.default_rng(42).permutation(9)[:3].tolist()
    assert [example.id for example in load_examples(drawn, "train")[0]] == [str(index) for index in wanted]


@pytest.mark.parametrize("seed", [0, 42])
def test_a_drawn_subset_is_that_of_the_datasets_library(seed: int) -> None:
    datasets = pytest.importorskip("datasets")
    shuffled = datasets.Dataset.from_dict({"index": list(range(1000))}).shuffle(seed=seed).select(range(70))
    assert subset(1000, 70, seed).tolist() == shuffled["index"][:]


def test_subsets_without_seed_or_limit_are_the_first_ones() -> None:
    assert subset(5, None, None).tolist() == [0, 1, 2, 3, 4]
    assert subset(5, None, 3).tolist() == [0, 1, 2, 3, 4]
    assert subset(5, 2, None).tolist() == [0, 1]
    assert subset(5, 9, None).tolist() == [0, 1, 2, 3, 4]
    assert sorted(subset(5, 9, 3).tolist()) == [0, 1, 2, 3, 4]


def test_sources_know_their_splits(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", row())
    assert available_splits(DataConfig(train_file=path)) == ("train",)
    assert available_splits(DataConfig(validation_file=path)) == ("validation",)
    assert available_splits(DataConfig()) == ("train", "validation")
    with pytest.raises(DataError, match="--validation_file"):
        load_examples(DataConfig(train_file=path), "validation")


def test_the_sample_and_synthetic_sources_are_valid_and_deterministic() -> None:
    for data in (DataConfig(), DataConfig(dataset_name="sample")):
        train, report, _ = load_examples(data, "train")
        assert report.problems == ()
        assert not {example.context for example in train} & {
            example.context for example in load_examples(data, "validation")[0]
        }
    synthetic = DataConfig(dataset_name="synthetic:300")
    first, report, digest = load_examples(synthetic, "train")
    assert (len(first), report.problems) == (300, ())
    assert load_examples(synthetic, "train") == (first, report, digest)
    assert load_examples(synthetic, "validation")[2] != digest
    assert open_source(DataConfig(dataset_name="synthetic:301"), "train").content_sha256 != digest


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return tmp_path


def test_a_local_folder_is_a_data_set(hub_cache: Path) -> None:
    folder = hub_cache / "folder"
    folder.mkdir()
    write_rows(folder / "train.jsonl", row("a"), row("b"))
    write_rows(folder / "validation.jsonl", row("c"))
    data = DataConfig(dataset_name=str(folder))
    assert available_splits(data) == ("train", "validation")
    examples, _, digest = load_examples(data, "train")
    assert [example.id for example in examples] == ["a", "b"]
    assert load_examples(data, "train")[2] == digest != load_examples(data, "validation")[2]


def test_a_folder_without_the_columns_or_the_split_says_so(hub_cache: Path) -> None:
    folder = hub_cache / "folder"
    folder.mkdir()
    write_rows(folder / "train.jsonl", {"text": "a"})
    data = DataConfig(dataset_name=str(folder))
    with pytest.raises(DataError, match="lacks question: it has text"):
        load_examples(data, "train")
    with pytest.raises(DataError, match="but no validation"):
        load_examples(data, "validation")


def test_articles_under_names_without_a_split_are_one_sentence(hub_cache: Path) -> None:
    folder = hub_cache / "folder"
    folder.mkdir()
    articles = sample_path("train").read_text(encoding="utf-8")
    (folder / "geology.json").write_text(articles, encoding="utf-8")
    with pytest.raises(DataError, match=r"names do not say of which split they are; call them train\.\.\. and dev"):
        load_examples(DataConfig(dataset_name=str(folder)), "train")
    (folder / "train-geology.json").write_text(articles, encoding="utf-8")
    assert load_examples(DataConfig(dataset_name=str(folder)), "train")[1].num_records > 100


def test_an_unreachable_data_set_is_one_sentence(hub_cache: Path) -> None:
    with pytest.raises(DataError, match=r"--dataset_name nobody/nothing cannot be loaded .*--train_file") as caught:
        load_examples(DataConfig(dataset_name="nobody/nothing"), "train")
    assert "\n" not in str(caught.value)


def test_what_a_library_logs_before_its_error_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: Any, **__: Any) -> None:
        for library in ("huggingface_hub.utils._http", "datasets.load"):
            logging.getLogger(library).warning("thrown while requesting, retrying in 1 s")
        raise ConnectionError(f"{'no connection ' * 13} see https://example.org/some/page or another one")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"cannot be loaded \(no connection .* see \.\.\.\); it must be"):
        load_examples(DataConfig(dataset_name="nobody/nothing"), "train")
    assert "retrying" not in capfd.readouterr().err
    assert caplog.messages == []
