"""Raw records checked: what becomes an example, what is mended on the way, and what is reported as a problem.

`PROBLEMS` lists everything that can be wrong with a record. A `Report` counts what was found, with the first few ids.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from qa_dist.data.placing import UNITS, Convert, find_unit, place
from qa_dist.data.records import Answer, Example
from qa_dist.data.rows import Reading, Record, listed, printable
from qa_dist.data.values import RawAnswer, is_nothing, read_answers, read_name, read_truth

READING_RULES = 8
"""Changes with whatever in this room decides what becomes of a file; stores are named after it."""

PROBLEMS = {
    "not_object": "an entry is not an object",
    "surplus_values": "a row has more values than the header has columns",
    **{f"missing_{key}": f"{key} is missing" for key in ("paragraphs", "qas", "id", "question", "context")},
    **{f"wrong_{key}": f"{key} is not a list" for key in ("paragraphs", "qas")},
    **{f"wrong_{key}": f"{key} is not a string" for key in ("id", "question", "context", "title")},
    "wrong_is_impossible": "is_impossible is not true or false",
    "wrong_answers": "answers is neither a list of {text, answer_start} nor a list of each, texts and whole numbers",
    "missing_answers": "answers is missing (where a question has no answer, write an empty list)",
    "empty_id": "id is empty",
    "duplicate_id": "the id occurred before",
    "empty_question": "question is empty or blank",
    "empty_context": "context is empty or blank",
    "not_unicode": "a text holds half a surrogate pair and cannot be written as UTF-8",
    "empty_answer": "an answer text is empty or blank",
    # Stores of earlier versions may name it.
    "answer_beyond_context": "an answer reaches beyond the context",
    "answer_not_at_offset": "an answer text is not at its answer_start, nor at exactly one other place",
    "impossible_with_answers": "is_impossible is true but there are answers",
    "no_answers": "there are no answers; pass --version_2_with_negative true or drop them",
}
"""Every kind of problem a record can have, in the order in which they are reported."""

_SCORED_ALL_THE_SAME = {"empty_question", "empty_context", "empty_answer", "impossible_with_answers"}
"""Problems of records that the official scripts would score: leaving those out would shorten their denominator."""

_NUM_IDS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """How many records have one kind of problem, and the ids (or places) of the first few."""

    kind: str
    count: int
    first_ids: tuple[str, ...]

    def text(self) -> str:
        """The finding as a clause."""
        return f"{self.count:,} where {PROBLEMS[self.kind]} ({listed(self.first_ids, self.count)})"


@dataclass(frozen=True, slots=True)
class Report:
    """What validation found in all records of a source, before any subset is taken.

    Attributes:
        num_records: records read.
        num_invalid: records that were left out for a problem.
        num_examples: records that were kept.
        num_unanswerable: valid records that are known to have no answer.
        num_mended: valid records with an answer_start that was wrong or not given, and was found.
        first_mended: ids of the first few of those.
        problems: the kinds found, in the order of `PROBLEMS`. A record with two problems counts in both.
        num_without_references: valid records of which nothing says whether they have an answer; not for training.
        num_without_place: valid records none of whose references has a place in the context; not for training.
        num_kept_invalid: records that were kept in spite of a problem, as they can be scored.
        notes: what was taken in another way than usual.
    """

    num_records: int
    num_invalid: int
    num_examples: int
    num_unanswerable: int
    num_mended: int
    first_mended: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    num_without_references: int = 0
    num_without_place: int = 0
    num_kept_invalid: int = 0
    notes: tuple[str, ...] = ()

    @property
    def is_worth_telling(self) -> bool:
        """Whether anything is not as it should be."""
        counts = self.num_mended + self.num_without_references + self.num_without_place
        return bool(self.problems or self.notes or counts)

    def text(self) -> str:
        """The findings in one paragraph."""
        parts = [
            f"records: {self.num_records:,}",
            f"valid: {self.num_examples - self.num_kept_invalid:,}",
            f"unanswerable: {self.num_unanswerable:,}",
        ]
        if self.num_mended:
            parts.append(
                f"mended: {self.num_mended:,}, whose answer text was found although its answer_start is wrong or not "
                f"given ({listed(self.first_mended, self.num_mended)})"
            )
        if self.num_without_references:
            parts.append(f"without known answers, predicted but not scored: {self.num_without_references:,}")
        if self.num_without_place:
            parts.append(f"with answers that have no place, scored but without a label: {self.num_without_place:,}")
        if self.problems:
            kinds = "; ".join(problem.text() for problem in self.problems)
            kept = f" ({self.num_kept_invalid:,} of them scored all the same)" if self.num_kept_invalid else ""
            parts.append(f"invalid: {self.num_invalid + self.num_kept_invalid:,}{kept}: {kinds}")
        return "; ".join([*self.notes, ", ".join(parts)])

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Report":
        """The report that `to_json` gave."""
        problems = tuple(Problem(item["kind"], item["count"], tuple(item["first_ids"])) for item in value["problems"])
        lists = {name: tuple(value.get(name, ())) for name in ("first_mended", "notes")}
        return cls(**{**value, **lists, "problems": problems})


class Draft(NamedTuple):
    """What a record says, as far as it can be read, before its answers are placed."""

    id: str
    question: str
    context: str
    title: str
    answers: list[RawAnswer] | None


def validate(
    records: Iterable[Record],
    *,
    allow_unanswerable: bool = True,
    for_training: bool = True,
    keep_scored: bool = False,
    keep_spelling: bool = False,
) -> tuple[list[Example], Report]:
    """The valid examples, and what was found in all records.

    Offsets that count something else than characters are converted (`placing.UNITS`). An answer that is not at its
    offset is mended where its place is certain (`placing.place`). Of several records with one id, the first that
    can be used is kept. Where no record has an id, all are numbered. Examples of one context share one string.

    Args:
        records: Raw records; a `Reading` may bring notes on how they were read.
        allow_unanswerable: Whether a question may have no answer.
        for_training: Whether every example needs a label: an answer that has a place, or that there is none. If not, an
            example may have references without a place, or none that are known.
        keep_scored: Keep invalid records that can be scored all the same: those with an id, texts and references. A
            blank answer is then a reference without a place, as the official scripts have it.
        keep_spelling: Score by the answers as the file spells them: where the context has characters without a width
            that an answer lacks, or the other way round, the answer is a reference without a place. White space makes
            no difference to any score, so an answer that differs in it alone is as the context has it.
    """
    rows, notes = _numbered(records)
    checked = [draft_of(record, allow_unanswerable) for record in rows]
    drafts = [draft for draft, _ in checked if draft is not None]
    unit = find_unit(
        (answer.text, answer.start, draft.context)
        for draft in drafts
        for answer in draft.answers or ()
        if answer.start is not None and answer.start >= 0 and answer.text.strip()
    )
    if unit is not None:
        notes.append(f"offsets count {unit} and were converted")
    convert = UNITS.get(unit or "")
    found = _Found(for_training=for_training, keep_scored=keep_scored, keep_spelling=keep_spelling, convert=convert)
    for record, (draft, problems) in zip(rows, checked, strict=True):
        found.add(record, draft, problems)
    return found.examples, found.report(len(rows), tuple(notes))


class _Found:
    """Examples as they are made, and what is found on the way."""

    def __init__(self, *, for_training: bool, keep_scored: bool, keep_spelling: bool, convert: Convert | None) -> None:
        self.examples: list[Example] = []
        self._for_training = for_training
        self._keep_scored = keep_scored
        self._keep_spelling = keep_spelling
        self._convert = convert
        self._kept_ids: set[str] = set()
        self._num_kept_invalid = 0
        self._contexts: dict[str, str] = {}
        self._ids_by_problem: dict[str, list[str]] = {kind: [] for kind in PROBLEMS}
        self._mended_ids: list[str] = []

    def add(self, record: Record, draft: Draft | None, problems: set[str]) -> None:
        """Take a record that was read as this draft with these problems."""
        label = _label(record)
        if label in self._kept_ids:
            problems.add("duplicate_id")
        shown = printable(label or record.place)
        placed: list[Answer] = []
        others: list[str] = []
        is_mended = False
        if draft is not None and draft.answers is not None:
            placed, others, is_mended = self._place(draft)
            if any(map(str.strip, others)) and not placed and self._for_training:
                problems.add("answer_not_at_offset")
        if draft is not None and draft.answers is None and self._for_training:
            problems.add("missing_answers")
        for kind in problems:
            self._ids_by_problem[kind].append(shown)
        if draft is None or (problems and not self._is_scored(problems, draft)):
            return
        self._kept_ids.add(draft.id)
        self._num_kept_invalid += bool(problems)
        context = self._contexts.setdefault(draft.context, draft.context)
        self.examples.append(
            Example(
                draft.id,
                draft.question,
                context,
                tuple(placed),
                draft.title,
                tuple(others),
                has_references=draft.answers is not None,
            )
        )
        if is_mended:
            self._mended_ids.append(shown)

    def _is_scored(self, problems: set[str], draft: Draft) -> bool:
        return self._keep_scored and problems <= _SCORED_ALL_THE_SAME and draft.answers is not None

    def _place(self, draft: Draft) -> tuple[list[Answer], list[str], bool]:
        """The answers that have a place, the texts of the others, and whether an offset was wrong."""
        placed: list[Answer] = []
        others: list[str] = []
        is_mended = False
        for answer in draft.answers or ():
            if not answer.text.strip():
                others.append(answer.text)
                continue
            start = answer.start
            if self._convert is not None and start is not None and start >= 0:
                start = self._convert(start, draft.context)
            span = place(answer.text, start, draft.context)
            if span is None or (self._keep_spelling and answer.text.split() != draft.context[slice(*span)].split()):
                others.append(answer.text)
                continue
            placed.append(Answer(draft.context[slice(*span)], span.start))
            is_mended = is_mended or span.start != start
        return placed, others, is_mended

    def report(self, num_records: int, notes: tuple[str, ...]) -> Report:
        """What was found in so many records."""
        examples = self.examples
        if examples and all(example.is_unanswerable for example in examples):
            notes = (*notes, "no question has an answer")
        num_without_place = sum(bool(example.other_texts) and not example.answers for example in examples)
        if num_without_place > 1 and not any(example.answers for example in examples):
            notes = (*notes, "no answer stands in its context")
        return Report(
            num_records=num_records,
            num_invalid=num_records - len(examples),
            num_examples=len(examples),
            num_unanswerable=sum(example.is_unanswerable for example in examples),
            num_mended=len(self._mended_ids),
            first_mended=tuple(self._mended_ids[:_NUM_IDS_SHOWN]),
            problems=_counted(self._ids_by_problem),
            num_without_references=sum(not example.has_references for example in examples),
            num_without_place=num_without_place,
            num_kept_invalid=self._num_kept_invalid,
            notes=notes,
        )


def _numbered(records: Iterable[Record]) -> tuple[list[Record], list[str]]:
    """The records, numbered if none has an id, and what was noted so far."""
    rows = [*records]
    notes = list(records.notes) if isinstance(records, Reading) else []
    usable = [record for record in rows if record.problem is None]
    if usable and all(map(has_no_id, usable)):
        notes.append("no question has an id: they are numbered from 1")
        rows = [
            row if row.problem else Record(row.place, {**row.row, "id": str(number)})
            for number, row in enumerate(rows, 1)
        ]
    return rows, notes


class ReferenceTexts(NamedTuple):
    """What is needed of a file to score predictions by it.

    Attributes:
        texts: the texts of the reference answers by id; None where nothing is known of them.
        has_impossible: whether any record says if its question has an answer.
        problems: what keeps records from being used.
        repeated: ids that occur more than once.
        notes: what was taken in another way than usual.
    """

    texts: dict[str, tuple[str, ...] | None]
    has_impossible: bool
    problems: tuple[Problem, ...]
    repeated: tuple[str, ...]
    notes: tuple[str, ...]


def reference_texts(records: Iterable[Record]) -> ReferenceTexts:
    """The texts of the reference answers, read as `validate` reads them to score by; contexts are not looked at."""
    rows, notes = _numbered(records)
    texts: dict[str, tuple[str, ...] | None] = {}
    found: dict[str, list[str]] = {kind: [] for kind in PROBLEMS}
    repeated: list[str] = []
    has_impossible = False
    for record in rows:
        problems = {record.problem} if record.problem else set()
        identity = _value(record.row.get("id"), read_name, "wrong_id", problems)
        if not identity and not problems:
            problems.add("missing_id" if identity is None else "empty_id")
        is_impossible = _value(record.row.get("is_impossible"), read_truth, "wrong_is_impossible", problems)
        has_impossible = has_impossible or is_impossible is not None
        answers = _value(record.row.get("answers"), read_answers, "wrong_answers", problems)
        for kind in problems:
            found[kind].append(printable(identity or record.place))
        if problems or identity is None:
            continue
        if identity in texts:
            repeated.append(identity)
        meant = _answers_meant(answers, is_impossible, set())
        texts[identity] = None if meant is None else tuple(answer.text for answer in meant)
    return ReferenceTexts(texts, has_impossible, _counted(found), tuple(repeated), tuple(notes))


def _counted(ids_by_problem: Mapping[str, Sequence[str]]) -> tuple[Problem, ...]:
    """The kinds of problems that occur, given the ids or places of the records that have each."""
    return tuple(
        Problem(kind, len(where), tuple(where[:_NUM_IDS_SHOWN])) for kind, where in ids_by_problem.items() if where
    )


def draft_of(record: Record, allow_unanswerable: bool) -> tuple[Draft | None, set[str]]:
    """What a record says (None if there is no way to make an example of it), and its problems."""
    if record.problem:
        return None, {record.problem}
    row = record.row
    problems: set[str] = set()
    values: dict[str, Any] = {}
    for key, read in (("id", read_name), ("title", read_name), ("is_impossible", read_truth)):
        values[key] = _value(row.get(key), read, f"wrong_{key}", problems)
    answers = _value(row.get("answers"), read_answers, "wrong_answers", problems)
    question, context = row.get("question"), row.get("context")
    for key, value in (("id", values["id"]), ("question", question), ("context", context)):
        if value is None and f"wrong_{key}" not in problems:
            problems.add(f"missing_{key}")
    for key, value in (("question", question), ("context", context)):
        if not isinstance(value, str | None):
            problems.add(f"wrong_{key}")
    if problems or not isinstance(question, str) or not isinstance(context, str):
        return None, problems
    identity, title, is_impossible = values["id"], values["title"] or "", values["is_impossible"]
    if not identity:
        problems.add("empty_id")
    if not question.strip():
        problems.add("empty_question")
    if not context.strip():
        problems.add("empty_context")
    answers = _answers_meant(answers, is_impossible, problems)
    if answers == [] and not allow_unanswerable:
        problems.add("no_answers")
    if not all(_is_unicode(text) for text in (identity, question, context, title, *(a.text for a in answers or ()))):
        problems.add("not_unicode")
        return None, problems
    return Draft(identity, question, context, title, answers), problems


def has_no_id(record: Record) -> bool:
    """Whether there is none at all; an empty one is a mistake."""
    value = record.row.get("id")
    return is_nothing(value) and value != ""


def _value(raw: Any, read: Callable[[Any], Any], kind: str, problems: set[str]) -> Any:
    """What `read` makes of a value; None and a problem of this kind if it cannot."""
    try:
        return read(raw)
    except (ValueError, OverflowError):
        problems.add(kind)
        return None


def _answers_meant(
    answers: list[RawAnswer] | None, is_impossible: bool | None, problems: set[str]
) -> list[RawAnswer] | None:
    """The answers with a text; []: the question has no answer, also where an empty text says so; None: nobody said.

    An empty text that got lost stays among them: the official scripts take it for a reference.
    """
    if answers is None:
        return [] if is_impossible else None
    with_text = [answer for answer in answers if answer.text.strip()]
    if is_impossible and with_text:
        problems.add("impossible_with_answers")
    if len(with_text) < len(answers) and not is_impossible:
        # An empty text at an offset is an answer that got lost, and so is one beside others.
        is_no_answer = is_impossible is None and not with_text and all(a.start is None or a.start < 0 for a in answers)
        if not is_no_answer:
            problems.add("empty_answer")
            return answers
    return with_text


def _label(record: Record) -> str | None:
    """The id of a record as text, if it has one."""
    try:
        return read_name(record.row.get("id"))
    except ValueError:
        return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
