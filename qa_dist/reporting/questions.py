"""The questions that predictions are held against: references as `qa-dist score` reads them, and contexts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qa_dist.common.arrays import Int64
from qa_dist.common.errors import DataError
from qa_dist.data.checking import validate
from qa_dist.data.records import Example
from qa_dist.data.rows import Reading
from qa_dist.data.sources import file_source
from qa_dist.evaluation.score_files import References, references_in
from qa_dist.evaluation.scoring import counted, unknown_predictions
from qa_dist.reporting.systems import System


@dataclass(frozen=True, slots=True, eq=False)
class Questions:
    """E questions with known answers, in the order of their file.

    Attributes:
        name: the file.
        references: the texts of their reference answers, and whether they are of version 2.
        examples: the questions with their contexts and the places of their answers, [E].
        context_E: the number of each question's context, int64; equal texts are one context.
    """

    name: str
    references: References
    examples: tuple[Example, ...]
    context_E: Int64

    @classmethod
    def of(cls, name: str, references: References, examples: Sequence[Example]) -> "Questions":
        """The questions, with their contexts numbered in order."""
        numbers: dict[str, int] = {}
        found = (numbers.setdefault(example.context, len(numbers)) for example in examples)
        return cls(name, references, tuple(examples), np.fromiter(found, np.int64, len(examples)))

    def __len__(self) -> int:
        return len(self.examples)

    def only(self, ids: Collection[str]) -> "Questions":
        """Those of some ids, in the same order."""
        kept = [example for example in self.examples if example.id in ids]
        answers = {example.id: self.references.answers[example.id] for example in kept}
        return Questions.of(self.name, replace(self.references, answers=answers), kept)

    def answered(self, ids: Collection[str], num_systems: int) -> tuple["Questions", str]:
        """Those of some ids, which all of so many systems answered, and a note on how many these are."""
        by = " by every run" if num_systems > 1 else ""
        note = (
            f"{len(ids):,} of the {len(self):,} questions of {self.name} are answered{by}; what is said about answers "
            "is about these"
        )
        return self.only(ids), note

    def unknown_in(self, predictions: Mapping[str, str]) -> str | None:
        """A note on predictions for questions that are not in the file, which count for nothing; None without any."""
        known = {**self.references.answers, **dict.fromkeys(self.references.unlabelled)}
        return unknown_predictions(known, predictions)

    @property
    def num_contexts(self) -> int:
        """How many different contexts there are."""
        return int(self.context_E.max()) + 1


def read_questions(path: str | Path) -> Questions:
    """The questions of a file, in any layout that training reads; those without known answers are left out.

    Raises:
        DataError: The file cannot be read, no answers are known, or a question that is scored has no usable context.
    """
    return questions_in(file_source(str(path), "validation").records(), str(path))


def questions_in(reading: Reading, name: str) -> Questions:
    """The questions among records that were read; those without known answers are left out.

    Raises:
        DataError: No answers are known, or a question that is scored has no usable context.
    """
    references = references_in(reading, name)
    examples, report = validate(reading, for_training=False, keep_scored=True)
    by_id = {example.id: example for example in examples}
    without = [key for key in references.answers if key not in by_id]
    if without:
        why = f": {'; '.join(problem.text() for problem in report.problems)}" if report.problems else ""
        raise DataError(
            f"{name}: {counted(without, 'question')} cannot be told with a context{why}; intervals and slices go by "
            "contexts, so give a file that has them."
        )
    return Questions.of(name, references, [by_id[key] for key in references.answers])


def evaluated_questions(questions: Questions, systems: Sequence[System]) -> tuple[Questions, list[str]]:
    """The questions without those that runs had no part in, as they were evaluated on some (`--max_eval_samples`).

    Returns:
        The questions that all such runs answered, all where there is no such run; what was left out, in sentences.

    Raises:
        DataError: Runs were evaluated on different questions, none of which all of them answered.
    """
    ids = set(questions.references.answers)
    partial = [
        system
        for system in systems
        # One that answers none is of other data, which is said where it is scored.
        if system.config.get("max_eval_samples") is not None and not ids.isdisjoint(system.texts)
    ]
    ids = ids.intersection(*(system.texts for system in partial))
    if not ids:
        listed = ", ".join(system.path for system in partial)
        raise DataError(
            f"{listed}: no question of {questions.name} is answered by each of these runs, which were evaluated on "
            "some (--max_eval_samples); analyze them one by one"
        )
    if len(ids) == len(questions):
        return questions, []
    kept, note = questions.answered(ids, len(systems))
    return kept, [note]
