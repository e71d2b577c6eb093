"""Ids as files have them, which predictions are written and scored under."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from qa_dist import score
from qa_dist.answering.question_files import QuestionFiles
from qa_dist.config.options import DataConfig
from qa_dist.data.sources import load_examples
from tests.unit.data.layout_writers import lines, lists, paragraphs, squad
from tests.unit.data_fixtures import row

TEXTS, NUMBERS = ("1.0", "2.0"), (1.0, 2.0)
JSON = {
    "rows.json": json.dumps,
    "rows.jsonl": lines,
    "columns.json": lists,
    "squad.json": squad,
    "paragraphs.json": paragraphs,
}


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
