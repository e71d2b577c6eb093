"""Files as spreadsheets, annotation tools and libraries write them, with more in them than questions."""

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from qa_dist.common.errors import DataError
from qa_dist.config.options import DataConfig
from qa_dist.data.checking import validate
from qa_dist.data.formats import parse
from qa_dist.data.records import Example
from qa_dist.data.sources import available_splits, file_source, load_examples, training_splits

CONTEXT = "Ada Kerrow built the mill at Lower Brand in 1911."
NAMED = {"id": "q1", "context": CONTEXT, "question": "Who built the mill?"}
PLACE = {"start": 29, "end": 40, "text": "Lower Brand"}
ADA = {"start": 0, "end": 10, "text": "Ada Kerrow"}


def read(rows: list[dict[str, Any]], name: str = "a.json") -> list[Example]:
    """The examples of a file, none of which is invalid."""
    examples, report = validate(parse(json.dumps(rows).encode(), Path(name)), for_training=False)
    assert report.problems == ()
    return examples


def answers(example: Example) -> list[tuple[str, int]]:
    return [(answer.text, answer.start_char) for answer in example.answers]


@pytest.mark.parametrize(
    "given", [{"answer": "Ada Kerrow", "answer_start": 0}, {"answer": {"text": "Ada Kerrow", "answer_start": 0}}]
)
def test_marks_beside_an_answer_are_not_the_answer(given: dict[str, Any]) -> None:
    """Such as entities that another program has found."""
    (found,) = read([{**NAMED, "entities": [PLACE], **given}])
    assert answers(found) == [("Ada Kerrow", 0)]


def test_marks_are_the_answer_where_nothing_else_is() -> None:
    for name in ("label", "answer", "answers_of_mine"):
        (found,) = read([{**NAMED, name: [ADA]}])
        assert answers(found) == [("Ada Kerrow", 0)]
    # Of two columns of marks, the one of answers.
    (found,) = read([{**NAMED, "entities": [PLACE], "answer": [ADA]}])
    assert answers(found) == [("Ada Kerrow", 0)]


def test_an_empty_list_of_marks_says_that_there_is_no_answer() -> None:
    for nothing in ([], "[]"):
        first, second = read([{**NAMED, "answer": [ADA]}, {**NAMED, "id": "q2", "answer": nothing}])
        assert (answers(first), first.is_unanswerable, second.is_unanswerable) == ([("Ada Kerrow", 0)], False, True)
    _, unknown = read([{**NAMED, "answer": [ADA]}, {**NAMED, "id": "q2", "answer": None}])
    assert not unknown.has_references


def task(*results: dict[str, Any]) -> dict[str, Any]:
    return {"id": 7, "data": {"text": CONTEXT, "question": "Who?"}, "annotations": [{"result": list(results)}]}


def test_texts_that_are_typed_are_answers() -> None:
    typed = {"type": "textarea", "value": {"text": ["Ada Kerrow"]}}
    (found,) = read([task(typed)])
    assert answers(found) == [("Ada Kerrow", 0)]
    # Beside a mark they are remarks.
    (found,) = read([task({"type": "labels", "value": PLACE}, typed)])
    assert answers(found) == [("Lower Brand", 29)]
    (found,) = read([task({"type": "choices", "value": {"choices": ["no answer"]}})])
    assert found.is_unanswerable


def test_a_table_of_a_spreadsheet_ends_in_separators() -> None:
    text = f"id,context,question,answer,answer_start,,\nq1,{CONTEXT},Who?,Ada Kerrow,0,,\n,,,,,,\n,,,,,,\n"
    examples, report = validate(parse(text.encode(), Path("a.csv")))
    assert report.problems == ()
    assert [answers(each) for each in examples] == [[("Ada Kerrow", 0)]]


def table(**columns: Any) -> pa.Table:
    usual = {"context": [CONTEXT], "question": ["Who?"], "answer": ["Ada Kerrow"], "answer_start": [0]}
    return pa.table({**usual, **columns})


@pytest.mark.parametrize(
    "odd",
    [
        pa.array([b"\xe9t\xe9"]).view(pa.string()),
        pa.array([2**62], pa.timestamp("us")),
        pa.array([0], pa.timestamp("us", tz="Nowhere/Land")),
    ],
    ids=["no UTF-8", "a year that Python has not", "a time zone that is not known"],
)
def test_values_that_python_has_not_are_one_sentence(tmp_path: Path, odd: Any) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(table(odd=odd), path)
    with pytest.raises(DataError, match="is not Parquet that can be read") as caught:
        parse(path.read_bytes(), path)
    assert "\n" not in str(caught.value)
    parquet.write_table(table(odd=pa.array([datetime.datetime(2026, 1, 1)])), path)
    assert len(parse(path.read_bytes(), path).records) == 1


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path, once = tmp_path / "a.parquet", table()
    parquet.write_table(pa.table([*once.columns, once.column(0)], names=[*once.column_names, "context"]), path)
    with pytest.raises(DataError, match="has the column context more than once"):
        parse(path.read_bytes(), path)


def test_a_file_that_lies_there_compressed_too_is_not_read_twice(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{**NAMED, "answer": "Ada Kerrow"}]), encoding="utf-8")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress((tmp_path / "a.json").read_bytes()))
    with pytest.raises(DataError, match=r"a\.json lies there as a\.json\.gz too; keep one of them, or name one file"):
        file_source(str(tmp_path), "train")
    assert len(file_source(str(tmp_path / "a.json.gz"), "train").records().records) == 1


def test_a_link_to_a_file_that_is_not_there_is_no_less_data(tmp_path: Path) -> None:
    (tmp_path / "train-1.json").write_text(json.dumps([{**NAMED, "answer": "Ada Kerrow"}]), encoding="utf-8")
    (tmp_path / "train-2.json").symlink_to(tmp_path / "annex" / "train-2.json")
    with pytest.raises(DataError, match=r"train-2\.json does not exist"):
        file_source(str(tmp_path), "train")


@pytest.mark.parametrize("row", ['q2,"Ada\n\nKerrow" built it,Who?\n', 'q2,"Ada Kerrow built it,Who?\nq3,Ada,Who?\n'])
def test_a_broken_row_of_a_table_is_found_at_its_first_line(row: str) -> None:
    table = f'id,context,question\nq1,"Ada Kerrow\nbuilt it",Who?\n{row}'
    with pytest.raises(DataError, match=r"is not CSV: .* in the row at line 4; mend the file"):
        parse(table.encode(), Path("a.csv"))


def test_keys_of_contexts_with_questions_may_have_capitals() -> None:
    (found,) = read([{"Context": CONTEXT, "qas": [{"id": "q1", "Question": "Who?", "Answer": "Ada Kerrow"}]}])
    assert (found.context, answers(found)) == (CONTEXT, [("Ada Kerrow", 0)])


def saved(folder: Path, split: str | None = None) -> Path:
    """What `save_to_disk` writes: a data set that may know its split, or without one a dictionary of training data."""
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset(table(), split=split)
    (one if split else datasets.DatasetDict({"train": one})).save_to_disk(str(folder))
    return folder


def test_a_saved_data_set_is_of_the_split_that_it_names(tmp_path: Path) -> None:
    for number, (split, expected) in enumerate(
        {"validation[:500]": "validation", "train[10%:]": "train", "train+validation": "train"}.items()
    ):
        folder = saved(tmp_path / str(number), split)
        assert available_splits(DataConfig(dataset_name=str(folder))) == (expected,)
        # Named by a file's option it is what the option says.
        assert len(file_source(str(folder), "validation").records().records) == 1
    dictionary = str(saved(tmp_path / "dictionary"))
    with pytest.raises(DataError, match="has the splits train but no validation"):
        file_source(dictionary, "validation")
    # Beside --dataset_name, the option of a file alone would be refused.
    named = DataConfig(dataset_name=dictionary)
    for read in (lambda: load_examples(named, "validation"), lambda: training_splits(named, evaluates=True)):
        with pytest.raises(DataError, match="--train_file and --validation_file in the place of --dataset_name"):
            read()


def saved_under(folder: Path, *names: str) -> DataConfig:
    """A saved dictionary whose splits have these names, and one question each, with the name as its id."""
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset(table(id=[name])) for name in names}
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return DataConfig(dataset_name=str(folder))


@pytest.mark.parametrize("name", ["dev", "val", "valid", "eval", "validation"])
def test_splits_of_saved_data_have_the_names_that_files_may_have(name: str, tmp_path: Path) -> None:
    data = saved_under(tmp_path / "both", "training", name, "test")
    assert training_splits(data, evaluates=False) == training_splits(data, evaluates=True) == ("train", "validation")
    assert [load_examples(data, "validation")[0][0].id, load_examples(data, "train")[0][0].id] == [name, "training"]
    named = DataConfig(validation_file=str(tmp_path / "both"))
    assert load_examples(named, "validation")[0][0].id == name
    # One that stands alone says by the same names what it is.
    alone = DataConfig(dataset_name=str(saved(tmp_path / "alone", name)))
    assert available_splits(alone) == ("validation",)


def test_of_two_names_of_a_split_the_usual_one_is_meant(tmp_path: Path) -> None:
    data = saved_under(tmp_path / "usual", "train", "dev", "validation")
    assert load_examples(data, "validation")[0][0].id == "validation"
    data = saved_under(tmp_path / "unusual", "train", "dev", "val")
    with pytest.raises(DataError, match="the splits dev and val are both for validation by their names; call one of"):
        training_splits(data, evaluates=False)


def test_a_split_without_rows_does_not_hide_the_others(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one, empty = datasets.Dataset(table()), datasets.Dataset(table()).select([])
    datasets.DatasetDict({"train": one, "validation": empty}).save_to_disk(str(tmp_path / "both"))
    empty.save_to_disk(str(tmp_path / "empty"))
    assert len(load_examples(DataConfig(train_file=str(tmp_path / "both")), "train")[0]) == 1
    for data in (DataConfig(dataset_name=str(tmp_path / "both")), DataConfig(validation_file=str(tmp_path / "empty"))):
        with pytest.raises(DataError, match="holds no questions"):
            load_examples(data, "validation")
    with pytest.raises(DataError, match="--dataset_config_name is for data sets of the hub"):
        available_splits(DataConfig(dataset_name=str(tmp_path / "both"), dataset_config_name="x"))


@pytest.mark.parametrize("name", ["data [1]", "da?a", "d*a"])
def test_a_folder_whose_name_the_library_takes_for_a_pattern_is_refused(tmp_path: Path, name: str) -> None:
    for folder in (tmp_path / name, tmp_path / "data"):
        (folder / "data").mkdir(parents=True)
        parquet.write_table(table(), folder / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"has \*, \? or \[ in it"):
        load_examples(DataConfig(dataset_name=str(tmp_path / name)), "train")
