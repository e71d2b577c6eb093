"""Raw records checked: what becomes an example, what is mended on the way, and what is reported as a problem.

`PROBLEMS` lists everything that can be wrong with a record. A `Report` counts what was found, with the first few ids.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qa_dist.common.parsers import ParseError, read_json
from qa_dist.data.formats import Record, listed, printable
from qa_dist.data.records import Answer, Example

PROBLEMS = {
    "not_object": "an entry is not an object",
    "surplus_values": "a row has more values than the header has columns",
    **{f"missing_{key}": f"{key} is missing" for key in ("paragraphs", "qas", "id", "question", "context")},
    **{f"wrong_{key}": f"{key} is not a list" for key in ("paragraphs", "qas")},
    **{f"wrong_{key}": f"{key} is not a string" for key in ("id", "question", "context", "title")},
    "wrong_is_impossible": "is_impossible is not true or false",
    "wrong_answers": "answers is neither a list of {text, answer_start} nor a list of each, texts and whole numbers",
    "empty_id": "id is empty",
    "duplicate_id": "the id occurred before",
    "empty_question": "question is empty",
    "empty_context": "context is empty",
    "not_unicode": "a text holds half a surrogate pair and cannot be written as UTF-8",
    "empty_answer": "an answer text is empty",
    "answer_beyond_context": "an answer reaches beyond the context",
    "answer_not_at_offset": "an answer text is not at its answer_start, nor at exactly one other place",
    "impossible_with_answers": "is_impossible is true but there are answers",
    "no_answers": "there are no answers; pass --version_2_with_negative true or drop them",
}
"""Every kind of problem a record can have, in the order in which they are reported."""

_NUM_IDS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """How many records have one kind of problem, and the ids (or places) of the first few."""

    kind: str
    count: int
    first_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What validation found in all records of a source, before any subset is taken.

    Attributes:
        num_records: records read.
        num_invalid: records with at least one problem.
        num_examples: valid records.
        num_unanswerable: valid records without answers.
        num_mended: valid records whose answer_start was wrong and could be corrected.
        first_mended: ids of the first few of those.
        problems: the kinds found, in the order of `PROBLEMS`. A record with two problems counts in both.
    """

    num_records: int
    num_invalid: int
    num_examples: int
    num_unanswerable: int
    num_mended: int
    first_mended: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def text(self) -> str:
        """The findings in one paragraph."""
        parts = [
            f"records: {self.num_records:,}",
            f"valid: {self.num_examples:,}",
            f"unanswerable: {self.num_unanswerable:,}",
        ]
        if self.num_mended:
            parts.append(
                f"mended: {self.num_mended:,}, whose answer text occurs exactly once but not at its answer_start "
                f"({listed(self.first_mended, self.num_mended)})"
            )
        if self.problems:
            kinds = "; ".join(
                f"{problem.count:,} where {PROBLEMS[problem.kind]} ({listed(problem.first_ids, problem.count)})"
                for problem in self.problems
            )
            parts.append(f"invalid: {self.num_invalid:,}: {kinds}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Report":
        """The report that `to_json` gave."""
        problems = tuple(Problem(item["kind"], item["count"], tuple(item["first_ids"])) for item in value["problems"])
        return cls(**{**value, "first_mended": tuple(value["first_mended"]), "problems": problems})


def validate(records: Iterable[Record], *, allow_unanswerable: bool = True) -> tuple[list[Example], Report]:
    """The valid examples, and what was found in all records.

    An answer that is not at its offset is mended where its text occurs exactly once in the context. The first of
    several records with one id is kept. Examples of one context share one string.
    """
    examples: list[Example] = []
    ids_by_problem: dict[str, list[str]] = {kind: [] for kind in PROBLEMS}
    mended_ids: list[str] = []
    contexts: dict[str, str] = {}
    ids: set[str] = set()
    num_records = 0
    for record in records:
        num_records += 1
        example, problems, mended = _check(record, allow_unanswerable)
        label = _label(record)
        if label is not None:
            if label in ids:
                problems.add("duplicate_id")
            ids.add(label)
        shown = printable(label or record.place)
        for kind in problems:
            ids_by_problem[kind].append(shown)
        if example is None or problems:
            continue
        context = contexts.setdefault(example.context, example.context)
        examples.append(Example(example.id, example.question, context, example.answers, example.title))
        if mended:
            mended_ids.append(shown)
    problems_found = tuple(
        Problem(kind, len(where), tuple(where[:_NUM_IDS_SHOWN])) for kind, where in ids_by_problem.items() if where
    )
    return examples, Report(
        num_records=num_records,
        num_invalid=num_records - len(examples),
        num_examples=len(examples),
        num_unanswerable=sum(not example.answers for example in examples),
        num_mended=len(mended_ids),
        first_mended=tuple(mended_ids[:_NUM_IDS_SHOWN]),
        problems=problems_found,
    )


def _check(record: Record, allow_unanswerable: bool) -> tuple[Example | None, set[str], bool]:
    """The example in a record (None if there is no way to make one), its problems, and whether it was mended."""
    if record.problem:
        return None, {record.problem}, False
    row = record.row
    problems = {f"missing_{key}" for key in ("id", "question", "context") if row.get(key) is None}
    identity, question, context = _label(record), row.get("question"), row.get("context")
    title, impossible = row.get("title"), row.get("is_impossible")
    for key, value in (("question", question), ("context", context), ("title", title)):
        if not isinstance(value, str | None):
            problems.add(f"wrong_{key}")
    if identity is None and row.get("id") is not None:
        problems.add("wrong_id")
    if not isinstance(impossible, bool | None):
        problems.add("wrong_is_impossible")
    answers = _answers(row.get("answers"))
    if answers is None:
        problems.add("wrong_answers")
    if problems or answers is None or identity is None or question is None or context is None:
        return None, problems, False
    if not identity:
        problems.add("empty_id")
    if not question.strip():
        problems.add("empty_question")
    if not context.strip():
        problems.add("empty_context")
    if not all(_is_unicode(text) for text in (identity, question, context, title or "", *(a.text for a in answers))):
        problems.add("not_unicode")
    if answers and impossible:
        problems.add("impossible_with_answers")
    if not answers and not allow_unanswerable:
        problems.add("no_answers")
    placed = []
    for answer in answers:
        mended, problem = _placed(answer, context)
        placed.append(mended)
        if problem:
            problems.add(problem)
    return Example(identity, question, context, tuple(placed), title or ""), problems, placed != answers


def _label(record: Record) -> str | None:
    """The id of a record as text, if it has one. Integers are taken, as some data sets number their questions."""
    value = record.row.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _answers(raw: Any) -> list[Answer] | None:
    """The answers in any of the layouts in use, not yet placed; None if `raw` is none of them.

    Layouts: `{"text": [...], "answer_start": [...]}` (hub), `[{"text", "answer_start"}, ...]` (SQuAD files), and the
    JSON text of either (CSV). Nothing, or an empty one, means unanswerable.
    """
    if isinstance(raw, str):
        if not raw.strip():
            return []
        try:
            raw = read_json(raw)
        except ParseError:
            return None
        if isinstance(raw, str):
            return None
    if raw is None or raw == {} or raw == []:
        return []
    if isinstance(raw, dict):
        texts, starts = raw.get("text"), raw.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            return None
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(raw, list) and all(isinstance(item, dict) for item in raw):
        pairs = [(item.get("text"), item.get("answer_start")) for item in raw]
    else:
        return None
    if not all(
        isinstance(text, str) and isinstance(start, int) and not isinstance(start, bool) for text, start in pairs
    ):
        return None
    return [Answer(text, start) for text, start in pairs]


def _placed(answer: Answer, context: str) -> tuple[Answer, str | None]:
    """The answer where its text really is, and a problem if that place is not certain."""
    if not answer.text.strip():
        return answer, "empty_answer"
    if answer.start_char < 0 or answer.end_char > len(context):
        return answer, "answer_beyond_context"
    if context.startswith(answer.text, answer.start_char):
        return answer, None
    first = context.find(answer.text)
    if first < 0 or context.find(answer.text, first + 1) >= 0:
        return answer, "answer_not_at_offset"
    return Answer(answer.text, first), None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
