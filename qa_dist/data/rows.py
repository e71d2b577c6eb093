"""Raw records, and rows of questions in which each stands for itself, whatever their columns are called."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from qa_dist.data.values import (
    RawAnswer,
    are_floats,
    is_nothing,
    number_as_text,
    read_answers,
    read_cell,
    read_name,
    spelled,
    without_point,
)

Row = Mapping[str, Any]

COLUMNS = ("id", "context", "question", "answers")
"""What a row should have; `title` is optional, and `is_impossible` is honoured where it occurs."""

# What a column may be called, the usual name first. `text` is the context where no other column is. Capitals, and
# blanks or dashes for underscores, make no difference: "Answer Start" and "answerStart" are `answer_start`.
IDS = ("id", "qid", "question_id", "query_id", "qas_id", "example_id", "_id", "guid", "uid")
CONTEXTS = ("context", "context_text", "passage", "paragraph", "document", "text")
_QUESTIONS = ("question", "query", "question_text", "query_text")
_ANSWERS = ("answers", "answer", "answer_text", "answers.text", "answers_text", "text")
_STARTS = ("answer_start", "answers.answer_start", "answers_answer_start", "answer_starts", "start")
_NUM_NAMES_SHOWN = 8
_FEW_NAMES = 64
_NO_ANSWER = "NONE"
"""What Haystack's annotation tool writes as `answer_category` of a question without an answer."""

_NOWHERE = ("-1", "-1.0")
"""Offsets that say there is no answer; beside another one, "[]" is a text."""


@dataclass(frozen=True, slots=True)
class Record:
    """One question as its source has it, not yet checked.

    Attributes:
        place: where it stands in its source, for records without a usable id.
        row: its keys and values under the names of `COLUMNS`; nesting is already flattened.
        problem: a key of `PROBLEMS`, if the record is already known to be unusable.
    """

    place: str
    row: Row
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read from a source.

    Attributes:
        records: the records, in order.
        notes: what was taken in another way than usual, for the user.
        is_version_2: whether the file calls itself SQuAD 2; None if it does not say.
        is_numbered: whether the ids are no more than the numbers of the rows, 0, 1, ..., as pandas writes them.
    """

    records: Sequence[Record]
    notes: tuple[str, ...] = ()
    is_version_2: bool | None = None
    is_numbered: bool = False

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


def read_rows(rows: Sequence[Any], word: str = "row") -> Reading:
    """Records of rows in which every question stands for itself."""
    names = list(dict.fromkeys(key for row in rows if isinstance(row, Mapping) for key in row))
    columns = Columns.of(names)
    rows = _with_whole_answers(rows, columns)
    records = [
        Record(f"{word} {number}", columns.row(row))
        if isinstance(row, Mapping)
        else Record(f"{word} {number}", {}, "not_object")
        for number, row in enumerate(rows, 1)
    ]
    taken = ", ".join(f"{actual} for {usual}" for actual, usual in columns.renamed.items())
    notes = [f"read as rows, taking {taken}"] if taken else []
    if columns.answers is None and columns.is_impossible is None:
        notes.append(no_answers_note(names))
    return Reading(records, tuple(notes))


def merged(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Rows that differ in their answers only, one for each annotation, as one with all of these answers.

    They have one id, one question and one context. Where not all of them have answers they are left, and so are all if
    none differ: an id that occurs twice is then a mistake.

    Args:
        records: The records of a file.

    Returns:
        The records, a merged one in the place of the first of its own, and what there is to say of it.
    """
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        if (name := _identity(record)) is not None:
            groups.setdefault(name, []).append(index)
    answers = {}
    for indices in groups.values():
        rows = [records[index].row for index in indices]
        if len(rows) > 1 and (found := _answers_of_one_question(rows)) is not None:
            answers[tuple(indices)] = found
    if not any(len({*map(tuple, found)}) > 1 for found in answers.values()):
        return list(records), []
    kept: list[Record | None] = [*records]
    for (first, *others), found in answers.items():
        every = [{"text": answer.text, "answer_start": answer.start} for each in found for answer in each]
        kept[first] = Record(records[first].place, {**records[first].row, "answers": every})
        for index in others:
            kept[index] = None
    num_rows = sum(map(len, answers))
    note = f"{num_rows:,} rows that differ in their answers only are {len(answers):,} questions with all of these"
    return [record for record in kept if record is not None], [note]


def _identity(record: Record) -> str | None:
    """The id of a record that can be used, as text; None if it has none."""
    try:
        return None if record.problem else read_name(record.row.get("id")) or None
    except ValueError:
        return None


def _answers_of_one_question(rows: Sequence[Row]) -> list[list[RawAnswer]] | None:
    """The answers in each of some rows; None if they are not about one question, or not all of them answer it."""
    first = rows[0]
    alike = ("question", "context", "is_impossible")
    if not isinstance(first.get("question"), str) or not isinstance(first.get("context"), str):
        return None
    if any(row.get(name) != first.get(name) for row in rows for name in alike):
        return None
    try:
        answers = [read_answers(row.get("answers")) or [] for row in rows]
    except (ValueError, OverflowError):
        return None
    return answers if all(each and all(a.text.strip() for a in each) for each in answers) else None


def no_answers_note(names: Sequence[str]) -> str:
    """What to say of questions with these keys, none of which is known to hold answers."""
    return f"no answers are among the keys {listed(names, len(names))}"


def with_whole_ids(rows: Sequence[Any]) -> Sequence[Any]:
    """The rows of a table with the ids as they were before a column of whole numbers became one of floats: `7.0` is 7.

    An id in JSON that reads so is a text of its own, and not for this function.
    """
    name = Columns.of(list(dict.fromkeys(key for row in rows if isinstance(row, Mapping) for key in row))).id
    return _without_points(rows, name) if name and are_floats([cell for cell, _ in _cells(rows, name)]) else rows


def _with_whole_answers(rows: Sequence[Any], columns: "Columns") -> Sequence[Any]:
    """Rows with the answers as they were before that, if none of them is in its context as it is now."""
    if columns.answers is None:
        return rows
    cells = _cells(rows, columns.answers)
    if not are_floats([cell for cell, _ in cells]) or any(cell in str(row.get(columns.context)) for cell, row in cells):
        return rows
    return _without_points(rows, columns.answers)


def _cells(rows: Sequence[Any], name: str) -> list[tuple[Any, Any]]:
    """What the rows say in a column, each with its row."""
    return [(row[name], row) for row in rows if isinstance(row, Mapping) and not is_nothing(row.get(name))]


def _without_points(rows: Sequence[Any], name: str) -> Sequence[Any]:
    return [
        {**row, name: without_point(row[name])} if isinstance(row, Mapping) and isinstance(row.get(name), str) else row
        for row in rows
    ]


class Columns(NamedTuple):
    """Which keys hold what; None where nothing does."""

    id: str | None
    context: str | None
    question: str | None
    answers: str | None
    start: str | None
    title: str | None
    is_impossible: str | None
    category: str | None

    @classmethod
    def of(cls, names: Sequence[str]) -> "Columns":
        """The columns among these names."""
        # The questions of a file mostly have the same few keys; an object may have one for each question.
        return (_columns if len(names) <= _FEW_NAMES else _columns.__wrapped__)(tuple(names))

    @property
    def renamed(self) -> dict[str, str]:
        """The usual name of each column that has another one."""
        pairs = {"id": self.id, "context": self.context, "question": self.question, "answers": self.answers}
        return {actual: usual for usual, actual in pairs.items() if actual is not None and actual != usual}

    def row(self, values: Row) -> Row:
        """A row under the usual names; what is not there stays away."""
        found: dict[str, Any] = {}
        for usual in ("id", "context", "question", "title", "is_impossible"):
            name = getattr(self, usual)
            if name is not None and name in values:
                found[usual] = values[name]
        answers = None if self.answers is None else values.get(self.answers)
        start = None if self.start is None else values.get(self.start)
        if self.category is not None and values.get(self.category) == _NO_ANSWER and is_nothing(answers):
            answers = []
        elif self.start is not None and isinstance(answers, str):
            answers = _flat(answers, start)
        elif isinstance(answers, int | float) and not isinstance(answers, bool):
            # What pandas makes of a column of years.
            answers = _flat(answers, start)
        elif isinstance(answers, list) and start is not None and _are_texts(answers):
            # Texts in one column and offsets in another; lists of objects have offsets of their own.
            answers = {"text": answers, "answer_start": start}
        found["answers"] = answers
        return found


@lru_cache(maxsize=256)
def _columns(names: tuple[str, ...]) -> Columns:
    """The columns among these names."""
    known = spelled(names)

    def first(wanted: Sequence[str]) -> str | None:
        return next((known[name] for name in wanted if name in known), None)

    context = first(CONTEXTS)
    return Columns(
        id=first(IDS),
        context=context,
        question=first(_QUESTIONS),
        answers=first([name for name in _ANSWERS if known.get(name) != context]),
        start=first(_STARTS),
        title=first(("title",)),
        is_impossible=first(("is_impossible",)),
        category=first(("answer_category",)),
    )


def _flat(text: str | int | float, start: Any) -> Any:
    """The answers in a column of texts beside one of offsets."""
    if is_nothing(text):
        # -1 is an offset that says there is no answer; an empty cell says nothing.
        return None if is_nothing(start) else {"text": "", "answer_start": start}
    if isinstance(text, str):
        if is_nothing(start) or text.lstrip().startswith("{"):
            return text
        # What pandas writes for a list of objects or of texts; objects have offsets of their own.
        cell = [] if text.strip() == "[]" and str(start).strip() in _NOWHERE else read_cell(text)
        if cell is not None:
            return {"text": cell, "answer_start": start} if cell and _are_texts(cell) else cell
    return {"text": str(number_as_text(text)), "answer_start": start}


def _are_texts(answers: Any) -> bool:
    """Whether a value is a list of answer texts, or of the whole numbers that stand for some."""
    return isinstance(answers, list) and all(isinstance(number_as_text(item), str) for item in answers)


def printable(text: str) -> str:
    """Text that any terminal can print: lone surrogates are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def listed(names: Sequence[str], count: int) -> str:
    """The first of `count` names, with dots for the rest."""
    shown = names[:_NUM_NAMES_SHOWN]
    text = ", ".join(printable(str(name)) for name in shown)
    return f"{text}, ..." if count > len(shown) else text
