"""Questions in every layout, from what other programs write, read back to the same examples."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qa_dist.common.errors import DataError
from qa_dist.config.options import DataConfig
from qa_dist.data.checking import Report, reference_texts, validate
from qa_dist.data.formats import parse
from qa_dist.data.records import Answer, Example
from qa_dist.data.sources import available_splits, load_examples
from tests.unit.data.layout_writers import (
    WRITERS,
    Rows,
    flat_cells,
    json_cells,
    korquad2,
    label_studio,
    lines,
    mrqa,
    paragraphs,
    squad,
)
from tests.unit.data_fixtures import row, write_rows

PAGE = Path(__file__).resolve().parents[3] / "docs" / "data.md"


def read(name: str, content: str | bytes, **options: Any) -> tuple[list[Example], Report]:
    return validate(parse(content.encode() if isinstance(content, str) else content, Path(name)), **options)


texts = st.text(st.sampled_from("abcdé中🦉 .,'\"\\\n"), min_size=1, max_size=30).map(lambda text: f"a{text}z")


@st.composite
def drawn_rows(draw: st.DrawFn, *, answerable: bool = False) -> Rows:
    rows = []
    for number in range(draw(st.integers(1, 3))):
        context = draw(texts)
        answers = {}
        for _ in range(draw(st.integers(1 if answerable else 0, 2))):
            start = draw(st.integers(0, len(context) - 1))
            text = context[start : draw(st.integers(start + 1, len(context)))]
            # What is all blank is no answer, and a text is marked once; a cell of text that looks like a list is one.
            if text.strip() and not text.startswith(("[", "{", "(")):
                answers[text] = start
        assume(answers or not answerable)
        rows.append(
            {
                **{"id": f"q{number}", "context": context, "question": draw(texts)},
                "answers": {"text": [*answers], "answer_start": [*answers.values()]},
            }
        )
    return rows


def expected(rows: Rows) -> list[tuple[str, str, str, tuple[Answer, ...]]]:
    return [
        (
            row["id"],
            row["context"],
            row["question"],
            tuple(Answer(text, start) for text, start in zip(*row["answers"].values(), strict=True)),
        )
        for row in rows
    ]


@pytest.mark.parametrize("layout", WRITERS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_records_in_each_layout_read_back_to_the_same_examples(layout: str, data: st.DataObject) -> None:
    name, write, takes_none = WRITERS[layout]
    rows = data.draw(drawn_rows(answerable=not takes_none))
    examples, report = read(name, write(rows))
    assert report.problems == ()
    assert [(e.id, e.context, e.question, e.answers) for e in examples] == expected(rows)
    assert not any(example.other_texts for example in examples)


odd_values = st.sampled_from([None, 3, 2.5, True, "x", "[", [], {}, [3], ["a"], {"a": 1}, [[]], [{}], -1, 10**30])


def spoilt(value: Any, data: st.DataObject) -> Any:
    """The value with something in it replaced, taken away or put in."""
    if not isinstance(value, dict | list) or not value:
        return data.draw(odd_values)
    key = data.draw(st.sampled_from([*value] if isinstance(value, dict) else [*range(len(value))]))
    change = data.draw(st.integers(0, 9))
    changed = dict(value) if isinstance(value, dict) else list(value)
    if change == 0:
        del changed[key]
    elif change == 1 and isinstance(changed, list):
        changed.append(data.draw(odd_values))
    else:
        changed[key] = data.draw(odd_values) if change < 4 else spoilt(value[key], data)
    return changed


@pytest.mark.parametrize("layout", [name for name, (file, *_) in WRITERS.items() if file != "a.csv"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_wrong_in_a_layout_is_a_problem_or_one_sentence(layout: str, data: st.DataObject) -> None:
    name, write, _ = WRITERS[layout]
    texts = write([row("a"), row("b")])
    values = [json.loads(line) for line in (texts.splitlines() if name.endswith("l") else [texts])]
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, len(values) - 1))
        values[number] = spoilt(values[number], data)
    refused = ""
    try:
        reading = parse("\n".join(map(json.dumps, values)).encode(), Path(name))
    except DataError as error:
        refused = str(error)
    assert "\n" not in refused
    if refused:
        return
    for for_training in (True, False):
        examples, report = validate(reading, for_training=for_training)
        assert report.num_records == len(examples) + report.num_invalid
        assert all(e.context[a.start_char : a.end_char] == a.text for e in examples for a in e.answers)
    assert len(reference_texts(reading).texts) <= report.num_records


# ------------------------------------------------------------------------------------------------------ what is said


MARKED = """text,id,question,{head},annotator
Mora lies on a lake.,11,Where?,"[{{""start"":10,""end"":19,""text"":""on a lake"",""labels"":[""answer""]}}]",1
"""
"""What Label Studio exports as CSV: a column has the name of the tag that marks."""


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("a.json", paragraphs([row()]), "read as paragraphs of {context, qas}"),
        ("a.jsonl", mrqa([row()]), "read as MRQA"),
        ("a.json", label_studio([row()]), "read as Label Studio"),
        ("a.json", korquad2([row()]), "read as KorQuAD 2"),
        ("a.csv", flat_cells([row()]), "read as rows, taking answer_text for answers"),
        (
            "a.csv",
            "ID;Context;Question;Answer Text;Answer Start\na;Mora lies on a lake.;Where?;on a lake;10\n",
            "read as rows, taking ID for id, Context for context, Question for question, Answer Text for answers",
        ),
        ("a.csv", MARKED.format(head="label"), "read as Label Studio"),
        ("a.csv", MARKED.format(head="answer"), "read as Label Studio"),
        ("a.jsonl", mrqa([row()]).replace("detected_answers", "token_spans"), "read as MRQA"),
        ("a.json", squad([row()]).replace('"answers"', '"answer"'), "answer is taken for answers"),
        ("a.json", squad([row(id=...) | {"id": None}]), "no question has an id: they are numbered from 1"),
    ],
)
def test_what_a_file_was_read_as_is_said(name: str, content: str, note: str) -> None:
    examples, report = read(name, content)
    assert report.notes == (note,)
    assert report.is_worth_telling
    assert report.text().startswith(note)
    assert [example.answers for example in examples] == [(Answer("on a lake", 10),)]


@pytest.mark.parametrize("content", [squad([row()]), lines([row()]), json_cells([row()])])
def test_the_usual_layouts_are_not_worth_a_word(content: str) -> None:
    name = "a.csv" if content.startswith(",") else "a.json"
    assert not read(name, content)[1].is_worth_telling


def test_unanswered_questions_of_haystack_in_csv() -> None:
    head = "question_id,question,text,answer_start,answer_end,context,answer_category\n"
    rows = "1,Where?,on a lake,10,19,Mora lies on a lake.,\n2,Who?,,0,0,Mora lies on a lake.,NONE\n3,Who?,,-1,,Mora.,\n"
    examples, report = read("a.csv", head + rows)
    assert [example.is_unanswerable for example in examples] == [False, True, True]
    assert report.problems == ()


@pytest.mark.parametrize("start", [{}, {"answer_start": 3}])
def test_a_column_of_years_is_one_of_texts(start: dict[str, int]) -> None:
    rows = [{"id": "a", "context": "In 1911.", "question": "When?", "answer": 1911.0, **start}]
    (example,), _ = read("a.jsonl", lines(rows))
    assert example.answers == (Answer("1911", 3),)


def test_floats_of_a_table_are_the_whole_numbers_that_they_were() -> None:
    head = "id,context,question,answer_text,answer_start\n"
    rows = [
        "1.0,In 1911.,When?,1911.0,3.0",
        "2.0,It was 7.0 miles or 7 miles.,How far?,7.0,7.0",
        "3.0,In 1911.,When?,,",
    ]
    examples, _ = read("a.csv", "\n".join([head.strip(), rows[0], rows[2]]), for_training=False)
    assert [(e.id, e.answers) for e in examples] == [("1", (Answer("1911", 3),)), ("3", ())]
    # One of them is in its context as it is.
    examples, _ = read("a.csv", "\n".join([head.strip(), *rows]), for_training=False)
    assert [(e.id, e.answers, e.other_texts) for e in examples] == [
        ("1", (), ("1911.0",)),
        ("2", (Answer("7.0", 7),), ()),
        ("3", (), ()),
    ]


def test_articles_and_paragraphs_in_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    for name, value in (("a", json.loads(squad([row()]))["data"]), ("b", json.loads(paragraphs([row()])))):
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pa.Table.from_pylist(value), path)
        (example,), report = read(str(path), path.read_bytes())
        assert (example.answers, report.problems) == ((Answer("on a lake", 10),), ())


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_document_under_the_name_of_lines(indent: int | None) -> None:
    for write in (squad, paragraphs):
        (example,), report = read("a.jsonl", json.dumps(json.loads(write([row()])), indent=indent))
        assert (example.answers, report.problems) == ((Answer("on a lake", 10),), ())


def test_an_article_that_stands_alone_under_data() -> None:
    value = json.loads(squad([row()]))
    assert read("a.json", json.dumps({"version": "1.1", "data": value["data"][0]}))[0][0].answers


@pytest.mark.parametrize("write", [lines, paragraphs, squad])
def test_where_no_answers_are_known_the_keys_are_listed(write: Callable[[Rows], str]) -> None:
    content = write([row()]).replace('"answers"', '"answers_of_mine"')
    for for_training in (True, False):
        _, report = read("a.jsonl", content, for_training=for_training)
        (note,) = (note for note in report.notes if "among the keys" in note)
        assert {"id", "question", "answers_of_mine"} <= {
            *note.removeprefix("no answers are among the keys ").split(", ")
        }
        assert report.num_without_references == (0 if for_training else 1)
    # Not where it is said that there are none.
    impossible = content.replace('"answers_of_mine"', '"is_impossible": true, "answers_of_mine"')
    assert not any("keys" in note for note in read("a.jsonl", impossible)[1].notes)


def test_answers_that_stand_in_no_context_are_worth_a_word() -> None:
    rows = [row(name, answers={"text": ["a river"], "answer_start": [0]}) for name in ("a", "b")]
    assert read("a.jsonl", lines(rows), for_training=False)[1].notes == ("no answer stands in its context",)
    assert read("a.jsonl", lines([*rows, row("c")]), for_training=False)[1].notes == ()


def test_a_file_in_which_no_question_has_an_answer_is_worth_a_word() -> None:
    assert read("a.jsonl", lines([row(answers=[])]))[1].notes == ("no question has an answer",)


@pytest.mark.parametrize("value", [True, "True", "true", "1", 1, 1.0])
def test_truth_in_every_way_it_is_written(value: Any) -> None:
    (example,), _ = read("a.jsonl", lines([row(answers=..., is_impossible=value)]))
    assert example.is_unanswerable


@pytest.mark.parametrize("value", [False, "False", "0", 0, None, ""])
def test_untruth_says_nothing_of_a_question_without_answers(value: Any) -> None:
    (example,), report = read("a.jsonl", lines([row(answers=..., is_impossible=value)]), for_training=False)
    assert not example.has_references
    assert report.num_without_references == 1


@pytest.mark.parametrize(("value", "name"), [(7, "7"), (7.0, "7"), ("7", "7")])
def test_numbers_as_ids_and_titles(value: Any, name: str) -> None:
    (example,), _ = read("a.jsonl", lines([row(id=value, title=value)]))
    assert (example.id, example.title) == (name, name)


# ---------------------------------------------------------------------------------------- references without a place


def test_a_question_is_scored_by_its_texts_and_labelled_by_one_place() -> None:
    some = {"text": ["Mora", "Lake Mora"], "answer_start": [0, 0]}
    none = {"text": ["Lake Mora", "the river"]}
    content = lines([row("a", answers=some), row("b", answers=none)])
    (example,), report = read("a.jsonl", content)
    assert (example.answers, example.other_texts) == ((Answer("Mora", 0),), ("Lake Mora",))
    assert [(problem.kind, problem.first_ids) for problem in report.problems] == [("answer_not_at_offset", ("b",))]
    examples, report = read("a.jsonl", content, for_training=False)
    assert [(e.answers, e.other_texts) for e in examples] == [
        ((Answer("Mora", 0),), ("Lake Mora",)),
        ((), ("Lake Mora", "the river")),
    ]
    assert (report.problems, report.num_without_place) == ((), 1)
    assert not any(example.is_unanswerable for example in examples)


def test_dropping_does_not_shorten_what_scores_are_a_share_of(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "dev.jsonl",
        row("good"),
        row("blank", question=" "),
        row("both", is_impossible=True),
        row("nothing", question=" ", answers=[]),
        row("nowhere", answers={"text": ["a river"], "answer_start": [3]}),
        row("half", question="\ud83d"),
    )
    data = DataConfig(validation_file=path, on_invalid="drop")
    examples, report, _ = load_examples(data, "validation")
    assert [example.id for example in examples] == ["good", "blank", "both", "nothing", "nowhere"]
    assert (report.num_records, report.num_invalid) == (6, 1)
    trained, _, _ = load_examples(DataConfig(train_file=path, on_invalid="drop"), "train")
    assert [example.id for example in trained] == ["good"]


# ------------------------------------------------------------------------------------------------------------ folders


def test_a_folder_of_files_has_the_splits_that_their_names_say(tmp_path: Path) -> None:
    for name, id_ in (("train-v1.1", "t1"), ("my_train_2", "t2"), ("dev-v1.1", "d"), ("test", "no")):
        (tmp_path / f"{name}.json").write_text(squad([row(id_)]))
    (tmp_path / "README.md").write_text("train")
    data = DataConfig(dataset_name=str(tmp_path))
    assert available_splits(data) == ("train", "validation")
    examples, report, _ = load_examples(data, "train")
    assert [example.id for example in examples] == ["t2", "t1"]
    assert report.notes == ("read from 2 files: my_train_2.json, train-v1.1.json",)
    assert [example.id for example in load_examples(data, "validation")[0]] == ["d"]
    (tmp_path / "train-dev.json").write_text(squad([row("which")]))
    for split in ("train", "validation"):
        with pytest.raises(DataError, match=r"train-dev.json is of both splits by its name; rename it, or name files"):
            load_examples(data, split)
    (tmp_path / "train-dev.json").unlink()
    both = DataConfig(train_file=str(tmp_path), validation_file=str(tmp_path))
    assert load_examples(both, "validation")[0][0].id == "d"
    assert load_examples(both, "train")[2] == load_examples(data, "train")[2] != load_examples(data, "validation")[2]


def test_a_folder_whose_names_say_nothing_is_read_whole(tmp_path: Path) -> None:
    for id_ in ("b", "a"):
        (tmp_path / f"{id_}.json").write_text(squad([row(id_)]))
    assert [e.id for e in load_examples(DataConfig(train_file=str(tmp_path)), "train")[0]] == ["a", "b"]


def test_folders_without_what_is_asked_for_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match="is a folder; name one file"):
        available_splits(DataConfig(train_file=str(tmp_path)))
    (tmp_path / "train.json").write_text(squad([row()]))
    with pytest.raises(DataError, match=r"files of other splits \(train.json\)"):
        available_splits(DataConfig(validation_file=str(tmp_path)))
    with pytest.raises(DataError, match="no validation"):
        load_examples(DataConfig(dataset_name=str(tmp_path)), "validation")


def test_data_sets_saved_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    single = datasets.Dataset.from_list([row("a"), row("b")])
    single.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict({"train": single, "validation": single.select([1])}).save_to_disk(str(tmp_path / "both"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert available_splits(DataConfig(dataset_name="~/single")) == ("train",)
    assert [e.id for e in load_examples(DataConfig(dataset_name="~/single"), "train")[0]] == ["a", "b"]
    assert available_splits(DataConfig(dataset_name=str(tmp_path / "both"))) == ("train", "validation")
    files = DataConfig(train_file=str(tmp_path / "single"), validation_file=str(tmp_path / "both"))
    assert available_splits(files) == ("train", "validation")
    assert [e.id for e in load_examples(files, "validation")[0]] == ["b"]
    # A data set of one split is what the option says it is.
    assert len(load_examples(DataConfig(validation_file=str(tmp_path / "single")), "validation")[0]) == 2


# ----------------------------------------------------------------------------------------------------------- the page

EXAMPLES = dict(re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
SAID = {
    "flat.csv": "taking question_id for id, text for answers",
    "paragraphs.json": "read as paragraphs",
    "mrqa.jsonl": "read as MRQA",
    "label-studio.json": "read as Label Studio",
    "label-studio-min.json": "read as Label Studio",
    "korquad2.json": "read as KorQuAD 2",
    "cmrc.json": "read as CMRC 2018",
    "bytes.json": "offsets count UTF-8 bytes",
    "mended.json": "mended: 1",
}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_page_shows_what_can_be_read(name: str) -> None:
    (example,), report = read(name, EXAMPLES[name], for_training=name != "unlabelled.json")
    assert report.problems == ()
    assert SAID.get(name, "") in report.text()
    assert example.id == ("11" if name.startswith("label-studio") else "q1")
    if name in ("no-answer.json", "unlabelled.json"):
        assert example.is_unanswerable == (name == "no-answer.json")
        return
    (answer,) = example.answers
    assert answer.text.split() == ["Ada", "Kerrow"]
    assert example.context[answer.start_char : answer.end_char] == answer.text


def test_the_page_has_an_example_of_each() -> None:
    assert {*SAID} < {*EXAMPLES}
    assert len(EXAMPLES) >= 13
