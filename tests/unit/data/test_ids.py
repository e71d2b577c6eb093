"""Ids as files have them, which predictions are written and scored under."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from qa_dist import score
from qa_dist.answering.question_files import QuestionFiles
from qa_dist.common.errors import DataError
from qa_dist.config.options import DataConfig
from qa_dist.data.checking import Report, validate
from qa_dist.data.records import Example
from qa_dist.data.rows import read_rows
from qa_dist.data.sources import load_examples
from tests.unit.data.layout_writers import by_index, columns, lines, lists, paragraphs, squad
from tests.unit.data_fixtures import row

TEXTS, NUMBERS = ("1.0", "2.0"), (1.0, 2.0)
JSON = {
    "rows.json": json.dumps,
    "rows.jsonl": lines,
    "columns.json": lists,
    "squad.json": squad,
    "paragraphs.json": paragraphs,
}


def check(*rows: dict[str, Any], **options: Any) -> tuple[list[Example], Report]:
    return validate(read_rows(rows), **options)


def kinds(report: Report) -> dict[str, int]:
    return {problem.kind: problem.count for problem in report.problems}


def rows(ids: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [row(example_id=name) for name in ids]


def ids(path: Path) -> list[str]:
    examples, _, _ = load_examples(DataConfig(validation_file=str(path)), "validation")
    return [example.id for example in examples]


@pytest.mark.parametrize("name", JSON)
def test_an_id_of_json_that_is_text_stays_and_a_number_is_what_it_means(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for given, expected in ((TEXTS, ["1.0", "2.0"]), (NUMBERS, ["1", "2"])):
        path.write_text(JSON[name](rows(given)), encoding="utf-8")
        assert ids(path) == expected
        # qa-dist predict reads line by line, and writes answers under the same ids.
        asked = [record.row["id"] for unit in QuestionFiles([path]).units() for record in unit.parse()]
        assert asked == list(given)


def test_ids_of_tables_are_the_whole_numbers_that_they_were(tmp_path: Path) -> None:
    table, typed = tmp_path / "a.csv", tmp_path / "a.parquet"
    table.write_text("id,context,question,answer\n1.0,Mora.,Where?,Mora\n,Mora.,Who?,Mora\n2.0,Mora.,What?,Mora\n")
    examples, report, _ = load_examples(DataConfig(validation_file=str(table), on_invalid="drop"), "validation")
    assert ([each.id for each in examples], report.num_invalid) == (["1", "2"], 1)
    for given in (TEXTS, NUMBERS):
        parquet.write_table(pa.Table.from_pylist(rows(given)), typed)
        assert ids(typed) == ["1", "2"]


@pytest.mark.parametrize("name", JSON)
def test_predictions_are_scored_under_the_ids_of_json(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, predictions = tmp_path / name, tmp_path / "predictions.json"
    path.write_text(JSON[name](rows(TEXTS)), encoding="utf-8")
    for predicted in (
        dict.fromkeys(ids(path), "on a lake"),
        [{"id": n, "prediction_text": "on a lake"} for n in TEXTS],
    ):
        predictions.write_text(json.dumps(predicted), encoding="utf-8")
        assert score.main(["--references", str(path), "--predictions", str(predictions)]) == 0
        assert json.loads(capsys.readouterr().out) == {"exact_match": 100.0, "f1": 100.0}


# -------------------------------------------------------------------------------------------------- ids that are made


def without_ids(*places: str) -> list[dict[str, Any]]:
    return [row(id=..., question=f"{place}?") for place in places]


@pytest.mark.parametrize("write", [json.dumps, lines, columns, lists, by_index])
def test_ids_that_are_made_are_unique_in_a_folder(write: Callable[[Any], str], tmp_path: Path) -> None:
    for name, places in (("a.json", ("one", "two")), ("b.json", ("three", "four"))):
        (tmp_path / name).write_text(write(without_ids(*places)), encoding="utf-8")
    assert ids(tmp_path) == ["1", "2", "3", "4"]
    # A file that stands alone has the ids that it always had.
    assert ids(tmp_path / "b.json") == (["0", "1"] if write is by_index else ["1", "2"])


def test_numbers_of_one_file_beside_ids_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"a": row(id=...), "b": row(id=...)}), encoding="utf-8")
    (tmp_path / "b.json").write_text(by_index(without_ids("three", "four")), encoding="utf-8")
    assert ids(tmp_path) == ["a", "b", "0", "1"]
    # Names that occur twice are no numbers: somebody gave them.
    (tmp_path / "c.json").write_bytes((tmp_path / "a.json").read_bytes())
    with pytest.raises(DataError, match=r"2 where the id occurred before \(a, b\)"):
        ids(tmp_path)


# ------------------------------------------------------------------------- ids that occur twice, and are left out


def test_the_first_of_several_records_with_one_id_stays() -> None:
    examples, report = check(row("a", question="1?"), row("a", question="2?"), row("a", question="3?"), row("b"))
    assert [example.question for example in examples] == ["1?", "Where does Mora lie?"]
    assert kinds(report) == {"duplicate_id": 2}


def test_a_record_that_is_left_out_takes_no_id_from_the_one_behind_it() -> None:
    examples, report = check(row("a", question=" "), row("a", question="2?"), row("a", question="3?"))
    assert [example.question for example in examples] == ["2?"]
    assert kinds(report) == {"empty_question": 1, "duplicate_id": 1}
    assert report.num_invalid == 2


def test_records_that_are_scored_in_spite_of_a_problem_are_told_apart() -> None:
    rows = (row("a", question=" "), row("b"), row("c", question=5))
    examples, report = check(*rows, for_training=False, keep_scored=True)
    assert [example.id for example in examples] == ["a", "b"]
    assert (report.num_records, report.num_examples, report.num_invalid, report.num_kept_invalid) == (3, 2, 1, 1)
    assert "valid: 1, unanswerable: 0, invalid: 2 (1 of them scored all the same): 1 where" in report.text()


def test_whole_numbers_are_ids_and_equal_their_text() -> None:
    examples, report = check(row(7), row("7"))  # type: ignore[arg-type]
    assert [example.id for example in examples] == ["7"]
    assert kinds(report) == {"duplicate_id": 1}
