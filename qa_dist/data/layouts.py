"""How questions are laid out in a file, once its bytes are values: the layouts that are recognised by their shape.

`LAYOUTS` has a row for each, with what it is recognised by and the function that reads it into raw records. A new one
needs such a function and a row. `lay_out` is the way in.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qa_dist.common.errors import DataError
from qa_dist.common.parsers import ParseError, read_json, type_name
from qa_dist.data.rows import IDS, Columns, Reading, Record, Row, listed, merged, no_answers_note, read_rows

ALLOWED = (
    'allowed are SQuAD ({"data": [articles]}), lists of {context, qas}, rows with id, context, question and answers '
    "(or answer_text and answer_start), MRQA, Label Studio, KorQuAD 2 and CMRC 2018"
)
"""The layouts, for messages."""

# ----------------------------------------------------------------------------------------------------------- layouts


def _read_articles(articles: Sequence[Any], word: str) -> Reading:
    """SQuAD's articles → paragraphs → questions, flattened; what is broken on the way is a record with a problem."""
    records: list[Record] = []
    keys = _Keys()
    for article_number, article in enumerate(articles, 1):
        place = f"article {article_number}"
        if problem := _list_problem(article, "paragraphs"):
            records.append(Record(place, {}, problem))
            continue
        for number, paragraph in enumerate(article["paragraphs"], 1):
            records += _questions(paragraph, f"{place}, paragraph {number}", article.get("title"), keys)
    note = tuple(f"{actual} is taken for {usual}" for actual, usual in keys.renamed.items())
    return Reading(records, (*note, *keys.notes()))


def _read_paragraphs(paragraphs: Sequence[Any], word: str) -> Reading:
    """Questions under their contexts, without articles around them."""
    records: list[Record] = []
    keys = _Keys()
    for number, paragraph in enumerate(paragraphs, 1):
        title = paragraph.get("title") if isinstance(paragraph, dict) else None
        records += _questions(paragraph, f"paragraph {number}", title, keys)
    return Reading(records, (f"read as {_kind_of_paragraphs(paragraphs)}", *keys.notes()))


def _kind_of_paragraphs(paragraphs: Sequence[Any]) -> str:
    first = next((item for item in paragraphs if isinstance(item, dict) and "qas" in item), {})
    if "raw_html" in first:
        return "KorQuAD 2"
    return "CMRC 2018" if "context_text" in first else "paragraphs of {context, qas}"


class _Keys:
    """What the keys of questions are called.

    Attributes:
        renamed: The usual name of each that has another one.
    """

    def __init__(self) -> None:
        self.renamed: dict[str, str] = {}
        self._names: dict[str, None] = {}
        self._has_answers = False

    def add(self, names: Sequence[str], columns: Columns) -> None:
        """Take the keys of a question, and what they mean."""
        self.renamed.update((actual, usual) for actual, usual in columns.renamed.items() if usual != "context")
        self._names.update(dict.fromkeys(names))
        self._has_answers = self._has_answers or columns.answers is not None or columns.is_impossible is not None

    def notes(self) -> tuple[str, ...]:
        """What is worth saying of questions none of which has answers."""
        return () if self._has_answers or not self._names else (no_answers_note([*self._names]),)


def _questions(paragraph: Any, place: str, title: Any, keys: _Keys) -> Iterator[Record]:
    if problem := _list_problem(paragraph, "qas"):
        yield Record(place, {}, problem)
        return
    name = Columns.of(list(paragraph)).context
    context = None if name is None else paragraph[name]
    for number, qa in enumerate(paragraph["qas"], 1):
        where = f"{place}, question {number}"
        if not isinstance(qa, dict):
            yield Record(where, {}, "not_object")
            continue
        columns = Columns.of(list(qa))
        keys.add(list(qa), columns)
        yield Record(where, {**columns.row(qa), "context": context, "title": title})


def _list_problem(parent: Any, key: str) -> str | None:
    if not isinstance(parent, dict):
        return "not_object"
    if parent.get(key) is None:
        return f"missing_{key}"
    return None if isinstance(parent[key], list) else f"wrong_{key}"


def _read_mrqa(items: Sequence[Any], word: str) -> Reading:
    """MRQA's contexts with questions, whose answers are texts beside the places at which they were found.

    Source: https://github.com/mrqa/MRQA-Shared-Task-2019#dataset-format. The ends of `char_spans` are inclusive.
    """
    records: list[Record] = []
    contexts = [item for item in items if not (isinstance(item, dict) and "header" in item)]
    for number, item in enumerate(contexts, 1):
        place = f"context {number}"
        # The hub's copy has a row for each question.
        nested = {**item, "qas": [item]} if isinstance(item, dict) and "qas" not in item else item
        if problem := _list_problem(nested, "qas"):
            records.append(Record(place, {}, problem))
            continue
        for qa, record in zip(nested["qas"], _questions(nested, place, None, _Keys()), strict=True):
            if record.problem:
                records.append(record)
                continue
            identity = qa.get("qid", qa.get("id"))
            answers = _mrqa_answers(qa, record.row.get("context"))
            records.append(Record(record.place, {**record.row, "id": identity, "answers": answers}))
    return Reading(records, ("read as MRQA",))


def _mrqa_answers(qa: Row, context: Any) -> Any:
    detected = qa.get("detected_answers")
    texts = qa.get("answers")
    if isinstance(detected, dict):  # the hub's copy: lists by name
        detected = [
            {"text": text, "char_spans": spans}
            for text, spans in zip(_listed(detected.get("text")), _listed(detected.get("char_spans")), strict=False)
        ]
    if not isinstance(detected, list):
        return texts
    found: list[Any] = []
    for answer in detected:
        if not isinstance(answer, dict):
            return answer
        spans = answer.get("char_spans")
        if isinstance(spans, dict):
            spans = list(zip(_listed(spans.get("start")), _listed(spans.get("end")), strict=False))
        found += [_mrqa_answer(answer.get("text"), span, context) for span in _listed(spans)] or [
            {"text": answer.get("text")}
        ]
    known = {item["text"] for item in found if isinstance(item["text"], str)}
    others = texts if isinstance(texts, list) else []
    return [*found, *({"text": text} for text in others if not (isinstance(text, str) and text in known))]


def _listed(value: Any) -> list[Any]:
    """A value that should be a list; none if it is something else."""
    return value if isinstance(value, list) else []


def _mrqa_answer(text: Any, span: Any, context: Any) -> dict[str, Any]:
    """An answer at a span; as its context writes it, which may differ in case and white space."""
    start, end = span if isinstance(span, list | tuple) and len(span) == 2 else (None, None)
    if isinstance(start, int) and isinstance(end, int) and isinstance(context, str) and isinstance(text, str):
        written = context[start : end + 1] if 0 <= start <= end else ""
        if written.casefold().split() == text.casefold().split():
            text = written
    return {"text": text, "answer_start": start}


def _read_label_studio(tasks: Sequence[Any], word: str) -> Reading:
    """Label Studio's export: tasks whose annotations mark spans of a text (JSON), or flattened ones (JSON-MIN)."""
    is_nested = any(isinstance(task, dict) and isinstance(task.get("data"), dict) for task in tasks)
    marks = None if is_nested else _marks_column(tasks)
    records = []
    for number, task in enumerate(tasks, 1):
        place = f"task {number}"
        data = task.get("data") if is_nested and isinstance(task, dict) else task
        if not isinstance(task, dict) or not isinstance(data, dict):
            records.append(Record(place, {}, "not_object"))
            continue
        columns = Columns.of([name for name in data if name != marks and not _is_marks(data[name])])
        marked = data.get(marks) if marks is not None else None
        # An empty list says that there is no answer; an empty cell says nothing.
        answers = _annotated(task) if is_nested else [] if marked in ([], "[]") else marked or None
        row = {**columns.row(data), "answers": answers}
        records.append(Record(place, {**row, "id": task.get("id", row.get("id"))}))
    return Reading(records, ("read as Label Studio",))


def _marks_column(rows: Sequence[Any]) -> str | None:
    """The column of flattened tasks that has the spans marked as answers: that of answers, or else the first such."""
    objects = [row for row in rows if isinstance(row, dict)]
    names = list(dict.fromkeys(name for row in objects for name in row))
    marked = [name for name in names if any(_is_marks(row.get(name)) for row in objects)]
    answers = Columns.of(names).answers
    return answers if answers in marked else next(iter(marked), None)


def _annotated(task: Row) -> list[Any] | None:
    """The answers in the annotations of a task: spans that are marked, else texts that are typed.

    None if there is no annotation; one without either says that there is no answer.
    """
    given = [task[name] for name in ("annotations", "completions") if isinstance(task.get(name), list)]
    done = [item for item in (given[0] if given else []) if isinstance(item, dict) and not item.get("was_cancelled")]
    if not done:
        return None
    values = [
        result["value"]
        for item in done
        for result in _listed(item.get("result"))
        if isinstance(result, dict) and isinstance(result.get("value"), dict)
    ]
    # Choices and ratings of a task are results too, and mark no text. Spans of HTML begin at a path.
    marks = [value for value in values if isinstance(value.get("text"), str) and "start" in value]
    # A TextArea's texts have no place.
    typed = [text for value in values for text in _listed(value.get("text")) if isinstance(text, str)]
    return [_mark(value) for value in marks] or [{"text": text} for text in typed]


def _mark(value: Row) -> dict[str, Any]:
    offsets = value.get("globalOffsets")
    start = offsets.get("start") if isinstance(offsets, dict) else value["start"]
    return {"text": value["text"], "answer_start": start if isinstance(start, int) else None}


def _is_marks(value: Any) -> bool:
    """Whether a value is what JSON-MIN, or a cell of CSV, has for marked spans."""
    if isinstance(value, str) and value.startswith("[{"):
        try:
            value = read_json(value)
        except ParseError:
            return False
    return isinstance(value, list) and any(
        isinstance(item, dict) and {"start", "end", "text"} <= set(item) for item in value
    )


def _some(items: Sequence[Any], test: Callable[[dict[str, Any]], bool]) -> bool:
    return any(isinstance(item, dict) and test(item) for item in items)


def _is_mrqa(items: Sequence[Any]) -> bool:
    return _some(
        items,
        lambda item: (
            "detected_answers" in item
            or ("header" in item and _some(items, lambda other: "qas" in other))
            or (isinstance(item.get("qas"), list) and _some(item["qas"], lambda qa: "detected_answers" in qa))
        ),
    )


def _is_label_studio(items: Sequence[Any]) -> bool:
    return _some(
        items,
        lambda item: (
            (isinstance(item.get("data"), dict) and ("annotations" in item or "completions" in item))
            or _has_marks_for_answers(item)
        ),
    )


def _has_marks_for_answers(item: Row) -> bool:
    """Whether spans are marked in a row, and its answers, if it has a column of them, are such spans themselves."""
    if "answers" in item or not any(map(_is_marks, item.values())):
        return False
    answers = Columns.of(list(item)).answers
    return answers is None or _is_marks(item[answers])


def _is_row(item: Row) -> bool:
    columns = Columns.of(list(item))
    return columns.context is not None and columns.question is not None


class Layout(NamedTuple):
    """A way to lay out questions in a list.

    Attributes:
        is_it: Whether a list is in this layout.
        read: Takes the list, and the word for its members in messages.
        has_annotations: Whether a question may be there once for each annotation; elsewhere it is there once, with all
            of its answers.
    """

    is_it: Callable[[Sequence[Any]], bool]
    read: Callable[[Sequence[Any], str], Reading]
    has_annotations: bool = False


LAYOUTS = {
    "SQuAD": Layout(lambda items: _some(items, lambda item: "paragraphs" in item), _read_articles),
    "MRQA": Layout(_is_mrqa, _read_mrqa),
    "Label Studio": Layout(_is_label_studio, _read_label_studio),
    # KorQuAD 2 and CMRC 2018 among them.
    "paragraphs": Layout(lambda items: _some(items, lambda item: "qas" in item), _read_paragraphs),
    "rows": Layout(lambda items: _some(items, _is_row), read_rows, has_annotations=True),
}
"""Every layout by name; the first that recognises a list reads it."""


def lay_out(value: Any, path: Path, word: str = "row", shifted: Collection[int] = ()) -> Reading:
    """The records in the value of a file.

    Args:
        value: What the file holds, as JSON has it.
        path: The file, for messages.
        word: What messages call a member of a list of rows.
        shifted: Positions of members that have more values than there are columns.

    Raises:
        DataError: It is in no layout that is known.
    """
    items, is_version_2 = _items(value, path)
    names = dict.fromkeys(key for item in items if isinstance(item, dict) for key in item)
    for layout in LAYOUTS.values():
        if layout.is_it(items):
            reading = layout.read(items, word)
            records = [
                Record(record.place, record.row, "surplus_values") if number in shifted else record
                for number, record in enumerate(reading)
            ]
            records, found = merged(records) if layout.has_annotations else (records, [])
            return Reading(records, (*reading.notes, *found), is_version_2, _is_numbered(value, items))
    if not items:
        return Reading((), (), is_version_2)
    if not names:
        raise DataError(
            f"{path} is in no layout that is known: its list holds {type_name(items[0])}, and must hold objects; "
            f"{ALLOWED}"
        )
    require_columns(list(names), path)
    raise DataError(f"{path} is in no layout that is known: no object has both a context and a question; {ALLOWED}")


def _items(value: Any, path: Path) -> tuple[Sequence[Any], bool | None]:
    """The list in a value, and whether the value calls itself SQuAD 2 (None: it does not say)."""
    version = None
    if isinstance(value, dict):
        if "data" in value and "version" in value:
            # Others number their own data.
            version = {"1": False, "2": True}.get(str(value["version"]).lower().lstrip("v")[:1])
        by_column = rows_by_column(value) if _is_row(value) else None
        for unwrapped in (_wrapped(value), by_column, _by_index(value)):
            if unwrapped is not None:
                return unwrapped, version
        keys = f"with the keys {listed(list(value), len(value))}" if value else "without keys"
        raise DataError(f"{path} is in no layout that is known: its top level is an object {keys}; {ALLOWED}")
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{path} is in no layout that is known: its top level is {type_name(value)}; {ALLOWED}")
    return value, version


def _wrapped(value: Mapping[str, Any]) -> Sequence[Any] | None:
    """The list under `data`, pandas' rows beside its columns, or an article, paragraph or row that stands alone."""
    data = value.get("data")
    if isinstance(data, list):
        rows = split_rows(value)
        return data if rows is None else rows
    if isinstance(data, dict) and "paragraphs" in data:
        return [data]
    if "paragraphs" in value or "qas" in value:
        return [value]
    columns = Columns.of(list(value))
    if columns.context is None or columns.question is None or isinstance(value[columns.context], list | dict):
        return None
    return [value]


def split_rows(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Rows of an object as pandas' `split` has it, with lists of values beside the columns; None if it is none."""
    data, columns = value.get("data"), value.get("columns")
    if not (isinstance(columns, list) and isinstance(data, list) and data and all(isinstance(r, list) for r in data)):
        return None
    return [dict(zip(map(str, columns), row, strict=False)) for row in data]


def rows_by_column(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Rows of an object that holds a list, or an object by row, for each column; None if it does not."""
    if all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) != 1:
            return None
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if all(isinstance(column, dict) for column in value.values()):
        indices = dict.fromkeys(index for column in value.values() for index in column)
        return [{name: column[index] for name, column in value.items() if index in column} for index in indices]
    return None


def _by_index(value: Mapping[str, Any]) -> Sequence[Any] | None:
    """Rows of an object that holds each of them under its index, which is its id if it has no other."""
    rows = list(value.items())
    if not rows or not all(isinstance(row, dict) and _is_row(row) for _, row in rows):
        return None
    has_ids = any(name in row for _, row in rows for name in IDS)
    return [row if has_ids else {"id": index, **row} for index, row in rows]


def _is_numbered(value: Any, rows: Sequence[Any]) -> bool:
    """Whether an object holds rows under the numbers 0, 1, ..., and these are their ids for want of others."""
    numbers = list(map(str, range(len(rows))))
    return isinstance(value, dict) and [*value] == numbers and [row.get("id") for row in rows] == numbers


def require_columns(columns: Sequence[str], path: Path) -> None:
    """Make sure that rows with these columns are questions.

    Raises:
        DataError: They have no context or no question, or a column twice.
    """
    found = Columns.of(columns)
    missing = [name for name in ("context", "question") if getattr(found, name) is None]
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(missing)}: it has {listed(columns, len(columns)) or 'nothing'}; {ALLOWED}"
        )
    repeated = [name for name in dict.fromkeys(columns) if list(columns).count(name) > 1]
    if repeated:
        raise DataError(f"{path} has the column {listed(repeated, len(repeated))} more than once; keep one of them")
