"""Questions checked and cut into chunks: what a rank answers at a time, the same at any number of ranks.

Where a chunk ends depends on the questions in it alone: it is full when it holds so many of them, or so many
characters. Chunk i of the input is answered by rank i % world_size.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qa_dist.answering.question_files import Unit
from qa_dist.answering.question_records import Flaw
from qa_dist.answering.records import Question
from qa_dist.data.checking import PROBLEMS, draft_of, has_no_id
from qa_dist.data.rows import Record

MAX_CHARACTERS = 1 << 18
"""Characters of a chunk after which it is full, however few its questions: what bounds the memory of a rank."""


class Asked(NamedTuple):
    """A question of a file that can be answered.

    Attributes:
        place: Where it stands in its file.
        id: Its id as text; its number in the input, from 1, where it has none.
        question: The question with its contexts.
        references: Texts of the reference answers; empty if it is known that there is none, None if nothing is known.
    """

    place: str
    id: str
    question: Question
    references: tuple[str, ...] | None


@dataclass(slots=True)
class Chunk:
    """Questions that are answered together.

    Attributes:
        questions: Those that can be answered, in order.
        flaws: What else stood between them.
        num_units: Units of the input up to the end of the chunk.
        num_records: Records in them, those with flaws included.
        is_short: Whether the input ended before the chunk was full.
    """

    questions: list[Asked] = field(default_factory=list)
    flaws: list[Flaw] = field(default_factory=list)
    num_units: int = 0
    num_records: int = 0
    is_short: bool = False


def chunks(
    units: Iterable[Unit],
    *,
    num_units: int = 0,
    num_records: int = 0,
    most_questions: int,
    most_characters: int = MAX_CHARACTERS,
    ends_at_flaw: bool = False,
) -> Iterator[Chunk]:
    """The chunks of what is left of an input. A unit is never split, and none beyond the chunk is asked for.

    Args:
        units: What is left.
        num_units: Units before.
        num_records: Records before, by which those without an id are numbered.
        most_questions: Questions that make a chunk full.
        most_characters: Characters of questions and contexts that make it full.
        ends_at_flaw: Whether the unit of a flaw ends its chunk, as nothing is answered beyond it.
    """
    chunk, num_characters = Chunk(), 0
    for unit in units:
        num_units += 1
        for record in unit.parse():
            num_records += 1
            asked = read_question(record, num_records)
            if isinstance(asked, Flaw):
                chunk.flaws.append(asked)
                continue
            chunk.questions.append(asked)
            # A record without any would be free: there is a limit on their number.
            num_characters += len(asked.question.question) + sum(map(len, asked.question.contexts))
        is_full = len(chunk.questions) + len(chunk.flaws) >= most_questions or num_characters >= most_characters
        if is_full or (ends_at_flaw and chunk.flaws):
            chunk.num_units, chunk.num_records = num_units, num_records
            yield chunk
            chunk, num_characters = Chunk(), 0
    if chunk.questions or chunk.flaws:
        chunk.num_units, chunk.num_records, chunk.is_short = num_units, num_records, True
        yield chunk


def read_question(record: Record | Flaw, number: int) -> Asked | Flaw:
    """The question of a record, or what is wrong with it; `number` is its place among all records, from 1."""
    if isinstance(record, Flaw):
        return record
    row: dict[str, Any] = dict(record.row)
    if has_no_id(record):
        row["id"] = str(number)
    context = row.get("context")
    passages = context if isinstance(context, list) and context else [context]
    found: set[str] = set()
    contexts: list[str] = []
    draft = None
    for passage in passages:
        draft, problems = draft_of(Record(record.place, {**row, "context": passage}, record.problem), True)
        found |= problems
        if draft is not None:
            contexts.append(draft.context)
    if found or draft is None:
        return Flaw(record.place, "; ".join(text for kind, text in PROBLEMS.items() if kind in found))
    references = None if draft.answers is None else tuple(answer.text for answer in draft.answers)
    return Asked(record.place, draft.id, Question(draft.question, tuple(contexts)), references)
