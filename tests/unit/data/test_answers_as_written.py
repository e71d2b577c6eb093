"""Answers in cells, in rows of their own, as numbers, blank, or with characters that have no width."""

import json
from pathlib import Path
from typing import Any

import pytest

from qa_dist.common.errors import DataError
from qa_dist.config.options import DataConfig
from qa_dist.data.checking import Report, reference_texts, validate
from qa_dist.data.folders import Split
from qa_dist.data.formats import parse
from qa_dist.data.records import Answer, Example
from qa_dist.data.sources import load_examples
from tests.unit.data_fixtures import row, write_rows

CONTEXT = "The mill was built in 1871 by Ada Kerrow."
ADA, YEAR = Answer("Ada Kerrow", 30), Answer("1871", 22)


def read(name: str, content: str, **options: Any) -> tuple[list[Example], Report]:
    return validate(parse(content.encode(), Path(name)), **options)


def table(*rows: tuple[str, ...]) -> str:
    """Rows of id, question, answer and offset as CSV."""
    head = "id,context,question,answers,answer_start\n"
    return head + "".join(f'{name},{CONTEXT},{asked},"{text}","{start}"\n' for name, asked, text, start in rows)


@pytest.mark.parametrize(
    ("cell", "start", "answers"),
    [
        ("[{'text': 'Ada Kerrow', 'answer_start': 30}]", "30", (ADA,)),
        ("[{'text': 'Ada Kerrow', 'answer_start': 30}]", "[30]", (ADA,)),
        ("['Ada Kerrow']", "30", (ADA,)),
        ("['Ada Kerrow']", "30.0", (ADA,)),
        ("['Ada Kerrow']", "[30]", (ADA,)),
        ("array(['Ada Kerrow'], dtype=object)", "30", (ADA,)),
        ("['Ada Kerrow', '1871']", "[30, 22]", (ADA, YEAR)),
        ("[]", "-1", ()),
        ("[]", "[]", ()),
    ],
)
def test_a_list_in_a_cell_beside_a_column_of_offsets_is_a_list(cell: str, start: str, answers: tuple[Answer]) -> None:
    (example,), report = read("a.csv", table(("a", "Who?", cell, start)))
    assert (example.answers, example.other_texts, report.num_mended) == (answers, (), 0)


def test_a_cell_that_begins_as_a_list_and_is_none_is_a_text() -> None:
    for text in ("['Ada' he wrote", "[{ and so on", "[]"):
        (example,), _ = read("a.csv", table(("a", "Who?", text, "5")), for_training=False)
        assert example.other_texts == (text,)


@pytest.mark.parametrize(("cell", "start"), [("['Ada Kerrow', '1871']", "30"), ("[['Ada Kerrow']]", "30")])
def test_a_list_that_is_no_list_of_answers_is_refused(cell: str, start: str) -> None:
    examples, report = read("a.csv", table(("a", "Who?", cell, start)), for_training=False)
    assert (examples, [problem.kind for problem in report.problems]) == ([], ["wrong_answers"])


@pytest.mark.parametrize(
    "answers",
    [
        *(1871, 1871.0, [1871]),
        *({"text": 1871, "answer_start": 22}, {"text": [1871], "answer_start": [22]}),
        [{"text": 1871, "answer_start": 22}],
        # What pandas makes of whole numbers beside cells without one.
        *([1871.0], "array([1871.])", {"text": 1871.0}, {"text": [1871.0]}),
        *({"text": [1871.0], "answer_start": [22.0]}, [{"text": 1871.0, "answer_start": 22.0}]),
    ],
)
@pytest.mark.parametrize("beside", [{}, {"answer_start": 22}])
def test_a_whole_number_is_a_text(answers: Any, beside: dict[str, int]) -> None:
    (example,), report = read("a.jsonl", json.dumps(row(context=CONTEXT, answers=answers) | beside))
    assert (example.answers, report.problems) == ((YEAR,), ())
    (example,), report = read("a.json", json.dumps([{"context": CONTEXT, "qas": [row(context=..., answers=answers)]}]))
    assert (example.answers, report.problems) == ((YEAR,), ())


@pytest.mark.parametrize("answers", [[True], [18.71], [float("inf")], {"text": [18.71]}])
def test_a_number_that_is_no_whole_one_is_no_text(answers: Any) -> None:
    _, report = read("a.jsonl", json.dumps(row(context=CONTEXT, answers=answers)), for_training=False)
    assert [problem.kind for problem in report.problems] == ["wrong_answers"]


@pytest.mark.parametrize("name", ["guid", "uid"])
def test_other_names_of_ids(name: str) -> None:
    (example,), report = read("a.jsonl", json.dumps({name: "klue-1", **row(id=...)}).replace('"id": "q1", ', ""))
    assert (example.id, report.notes) == ("klue-1", (f"read as rows, taking {name} for id",))


# ---------------------------------------------------------------------------------------------- a row per annotation

ANNOTATED = (
    ("a", "Who?", "Ada Kerrow", "30"),
    ("b", "When?", "1871", "22"),
    ("a", "Who?", "Kerrow", "34"),
    ("b", "When?", "1871", "22"),
    ("c", "What?", "The mill", "0"),
)


def test_rows_that_differ_in_their_answers_only_are_one_question() -> None:
    reading = parse(table(*ANNOTATED).encode(), Path("a.csv"))
    examples, report = validate(reading)
    assert [(example.id, example.answers) for example in examples] == [
        ("a", (ADA, Answer("Kerrow", 34))),
        ("b", (YEAR, YEAR)),
        ("c", (Answer("The mill", 0),)),
    ]
    assert (report.num_records, report.problems) == (3, ())
    assert report.notes == ("4 rows that differ in their answers only are 2 questions with all of these",)
    found = reference_texts(reading)
    assert (found.repeated, found.notes) == ((), report.notes)
    assert found.texts == {"a": ("Ada Kerrow", "Kerrow"), "b": ("1871", "1871"), "c": ("The mill",)}


@pytest.mark.parametrize(
    "rows",
    [
        (ANNOTATED[0], ("a", "Who else?", "Kerrow", "34")),
        (ANNOTATED[0], ANNOTATED[0]),
        (ANNOTATED[0], ("a", "Who?", "[]", "-1")),
    ],
)
def test_rows_that_say_the_same_or_ask_something_else_are_a_mistake(rows: Any) -> None:
    (example,), report = read("a.csv", table(*rows))
    assert example.answers == (ADA,)
    assert [(problem.kind, problem.first_ids) for problem in report.problems] == [("duplicate_id", ("a",))]


def test_rows_of_another_context_are_a_mistake() -> None:
    other = table(ANNOTATED[2]).replace("The mill was", "A mill  was").split("\n")[1]
    _, report = read("a.csv", table(ANNOTATED[0]) + other)
    assert [problem.kind for problem in report.problems] == ["duplicate_id"]


# --------------------------------------------------------------------------------- as the official scripts score them


@pytest.mark.parametrize(
    "answers", [[{"text": "", "answer_start": 0}], {"text": ["  "], "answer_start": [3]}, [{"text": None, "start": 9}]]
)
def test_a_blank_answer_of_validation_data_is_a_reference(answers: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "dev.jsonl", row("a"), row("b", answers=answers))
    examples, report, _ = load_examples(DataConfig(validation_file=path, on_invalid="drop"), "validation")
    assert [example.is_unanswerable for example in examples] == [False, False], "it would be scored as v2.0 for one"
    assert [text.strip() for text in examples[1].other_texts] == [""]
    assert (report.num_unanswerable, [problem.kind for problem in report.problems]) == (0, ["empty_answer"])
    found = reference_texts(parse(Path(path).read_bytes(), Path(path)))
    assert [text.strip() for text in found.texts["b"] or ()] == [""]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("version_2", [None, False])
@pytest.mark.parametrize("blank", ["", "  ", "\u00a0\n"])
def test_an_answer_of_white_space_is_an_empty_one(
    blank: str, version_2: bool | None, split: Split, tmp_path: Path
) -> None:
    def refusal(answers: Any) -> str | None:
        path = write_rows(tmp_path / "a.jsonl", row("a"), row("b", answers=answers))
        data = DataConfig(**{f"{split}_file": path, "version_2_with_negative": version_2})
        try:
            assert load_examples(data, split)[0][1].is_unanswerable
        except DataError as error:
            return str(error)
        return None

    assert "1 where an answer text is empty or blank (b). Mend them" in (refusal([{"text": blank, "start": 3}]) or "")
    for none in ([blank], [{"text": blank, "answer_start": -1}]):
        said = refusal(none)
        assert (
            said is None if version_2 is None else "there are no answers; pass --version_2_with_negative" in str(said)
        )


def test_a_blank_answer_beside_others_is_a_reference_too(tmp_path: Path) -> None:
    both = [{"text": "", "answer_start": 0}, {"text": "Mora", "answer_start": 0}]
    path = write_rows(tmp_path / "dev.jsonl", row("a", answers=both))
    (example,), _, _ = load_examples(DataConfig(validation_file=path, on_invalid="drop"), "validation")
    assert (example.answers, example.other_texts) == ((Answer("Mora", 0),), ("",))


@pytest.mark.parametrize("mark", ["\u200b", "\u2060", "\ufeff"])
@pytest.mark.parametrize("is_in_context", [True, False])
def test_validation_data_is_scored_by_the_answers_as_the_file_spells_them(
    mark: str, is_in_context: bool, tmp_path: Path
) -> None:
    marked, plain = f"Ada{mark} Kerrow", "Ada Kerrow"
    inside, asked = (marked, plain) if is_in_context else (plain, marked)
    wide = {"context": "By\u00a0Ada  Kerrow.", "answers": {"text": [plain], "answer_start": [3]}}
    path = write_rows(
        tmp_path / "a.jsonl",
        row("a", context=f"By {inside}.", answers={"text": [asked], "answer_start": [3]}),
        row("white space", **wide),
    )
    (example, other), report, _ = load_examples(DataConfig(validation_file=path), "validation")
    assert (example.answers, example.other_texts) == ((), (asked,))
    assert other.answers == (Answer("Ada  Kerrow", 3),)
    assert (report.num_without_place, report.num_mended) == (1, 0)
    # A model is trained on what stands in the context.
    (example, _), _, _ = load_examples(DataConfig(train_file=path), "train")
    assert (example.answers, example.other_texts) == ((Answer(inside, 3),), ())
