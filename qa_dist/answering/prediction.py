"""Answers to files of questions on any number of ranks: read, answered and written round by round.

Rank 0 reads the input and hands a chunk to each rank; every rank computes, decodes and scores its own; rank 0 appends
their lines in the order of the input. It never holds more than one round, which is a chunk for each rank. What a chunk
is depends on the input alone (`chunks`), and so do the bytes that are written.
"""

import gzip
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from qa_dist.answering.chunks import Asked, Chunk, chunks
from qa_dist.answering.journal import Sink
from qa_dist.answering.question_files import QuestionFiles, StoppedReadingError, Unit
from qa_dist.answering.question_records import Flaw
from qa_dist.answering.records import Answer, InvalidQuestionError, Question, record_of
from qa_dist.common.errors import DataError, UserError
from qa_dist.distributed.ranks import Ranks
from qa_dist.evaluation.normalization import Normalization
from qa_dist.evaluation.running_scores import QuestionScore, RunningScores, score_question

MAX_FLAWS_TOLD = 100
"""Questions that cannot be answered are named one by one up to this many, and counted beyond."""


class Answering(Protocol):
    """What answers a chunk: a `Reader`, or what stands for one."""

    def answer_chunk(
        self, questions: Sequence[Question], top_k: int = 1, *, overlap_threshold: float | None
    ) -> list[list[Answer]]:
        """The answers to each question, best first."""

    def problem(self, question: Question) -> str | None:
        """What keeps it from answering a question; None if nothing does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How questions become lines.

    Attributes:
        top_k: Answers to a question.
        overlap_threshold: As the reader has it.
        rules: What counts as the same answer as a reference.
        questions_per_chunk: Questions that make a chunk full.
        skips_flaws: Whether what cannot be answered is left out; if not, it ends the run.
        compresses: Whether the lines of a chunk are a gzip stream of their own.
    """

    top_k: int
    overlap_threshold: float | None
    rules: Normalization
    questions_per_chunk: int
    skips_flaws: bool
    compresses: bool = False


class Answered(NamedTuple):
    """What a rank made of its chunk.

    Attributes:
        lines: The lines of the file of answers.
        num_answered: How many.
        scores: Of those with references, in order.
        flaws: The questions that the reader cannot answer.
    """

    lines: bytes
    num_answered: int
    scores: list[QuestionScore]
    flaws: list[Flaw]


class Parcel(NamedTuple):
    """What rank 0 hands to a rank.

    Attributes:
        questions: The questions of its chunk; none if it has nothing to do in this round.
        is_end: Whether there are no more rounds.
        failure: Why, if the run has failed.
    """

    questions: list[Asked]
    is_end: bool = False
    failure: str | None = None


@dataclass
class Progress:
    """How far a run has come: what the journal keeps.

    Attributes:
        num_units: Units of the input that are done with.
        num_records: Records in them.
        sha256: Digest of the input up to there.
        is_short: Whether the input ended inside the last chunk.
        num_answered: Questions with a line in the file of answers.
        num_skipped: Records that could not be answered.
        scores: Of the questions with references.
    """

    num_units: int = 0
    num_records: int = 0
    sha256: str = ""
    is_short: bool = False
    num_answered: int = 0
    num_skipped: int = 0
    scores: RunningScores = field(default_factory=RunningScores)

    @classmethod
    def of(cls, state: dict[str, Any] | None) -> "Progress":
        """What `state` gave; the beginning for None."""
        return cls() if state is None else cls(**{**state, "scores": RunningScores(**state["scores"])})

    def state(self) -> dict[str, Any]:
        """This progress as a dictionary that JSON can hold."""
        return {**vars(self), "scores": self.scores.state()}

    def metrics(self) -> dict[str, float | int]:
        """Counts, and the official scores of the questions with references, if there are any."""
        scores = self.scores.scores()
        counts: dict[str, float | int] = {"num_answered": self.num_answered}
        if self.num_skipped:
            counts["num_skipped"] = self.num_skipped
        if not scores:
            return counts
        if (num_unlabelled := self.num_answered - self.scores.num_questions) > 0:
            counts["num_unlabelled"] = num_unlabelled
        exact = scores["exact" if "exact" in scores else "exact_match"]
        return {"exact_match": exact, "f1": scores["f1"], **counts, **scores}


class Rounds:
    """Rank 0's side of the work: reads the chunks of each round, and writes what came of them."""

    def __init__(
        self,
        files: QuestionFiles,
        sink: Sink,
        manner: Manner,
        *,
        notice: Callable[[str], object],
        advance: Callable[[Progress, QuestionFiles], object],
    ) -> None:
        """Go on from where the file of answers ends; nothing is read yet.

        Args:
            files: The input.
            sink: Where answers go.
            manner: How questions become lines.
            notice: Called with a sentence for each question that cannot be answered.
            advance: Called after each round.
        """
        self.progress = Progress.of(sink.state)
        self.failure: str | None = None
        self._files = files
        self._sink = sink
        self._manner = manner
        self._notice = notice
        self._advance = advance
        self._chunks = self._read()
        self._round: list[tuple[Chunk, str]] = []

    def parcels(self, num_ranks: int) -> list[Parcel]:
        """The parcels of the next round, one for each rank."""
        self._round = []
        while self.failure is None and len(self._round) < num_ranks:
            try:
                chunk = next(self._chunks, None)
            except StoppedReadingError:
                # All ranks agree to stop when this round is over, which may be an empty one.
                return self._parcels(num_ranks)
            except UserError as error:
                # What was read before the place of the mistake is still answered.
                self.failure = str(error)
                break
            if chunk is None:
                break
            self._round.append((chunk, self._files.sha256))
            if chunk.flaws and not self._manner.skips_flaws:
                break
        if not self._round:
            return [Parcel([], is_end=True, failure=self.failure)] * num_ranks
        return self._parcels(num_ranks)

    def _parcels(self, num_ranks: int) -> list[Parcel]:
        wanted = [[] if self._ends_run(chunk.flaws) else chunk.questions for chunk, _ in self._round]
        return [Parcel(questions) for questions in wanted] + [Parcel([])] * (num_ranks - len(wanted))

    def write(self, answered: Sequence[Answered]) -> None:
        """Append the lines of a round, as far as its first failure; that is kept in `failure`."""
        lines: list[bytes] = []
        progress = self.progress
        for (chunk, sha256), made in zip(self._round, answered, strict=False):
            flaws = [*chunk.flaws, *made.flaws]
            if self._ends_run(flaws):
                self.failure = (
                    f"{flaws[0].place}: {flaws[0].problem}; {progress.num_answered:,} answers are written: mend it and "
                    "run the same command to go on, or pass --on_invalid skip to leave out what cannot be answered"
                )
                break
            for flaw in flaws:
                progress.num_skipped += 1
                if progress.num_skipped <= MAX_FLAWS_TOLD:
                    self._notice(f"{flaw.place}: {flaw.problem}; left out")
                if progress.num_skipped == MAX_FLAWS_TOLD:
                    self._notice("more that cannot be answered is left out and counted without a line each")
            for score in made.scores:
                progress.scores.add(score)
            progress.num_answered += made.num_answered
            progress.num_units, progress.num_records = chunk.num_units, chunk.num_records
            progress.sha256, progress.is_short = sha256, chunk.is_short
            lines.append(made.lines)
        if not lines:
            return
        try:
            self._sink.add(b"".join(lines), progress.state())
        except UserError as error:
            self.failure = str(error)
        self._advance(progress, self._files)

    def finish(self) -> None:
        """Note that every question is answered.

        Raises:
            DataError: There was none, or the note cannot be written.
        """
        if not self.progress.num_records:
            raise DataError(f"{self._files.shown} holds no questions; give at least one")
        if not self._sink.is_finished:
            self._sink.finish(self.progress.state())

    def _ends_run(self, flaws: Sequence[Flaw]) -> bool:
        return bool(flaws) and not self._manner.skips_flaws

    def _read(self) -> Iterator[Chunk]:
        units = self._files.units()
        if problem := self._pass_over(units):
            again = self._files.again()
            if again is None or not self._sink.start_anew():
                raise DataError(problem)
            self._notice(f"{self.progress.num_answered:,} answers about another input are replaced")
            self._files, self.progress = again, Progress.of(None)
            units = again.units()
        yield from chunks(
            units,
            num_units=self.progress.num_units,
            num_records=self.progress.num_records,
            most_questions=self._manner.questions_per_chunk,
            ends_at_flaw=not self._manner.skips_flaws,
        )

    def _pass_over(self, units: Iterator[Unit]) -> str | None:
        """Read what is answered already; why it is not the same, if it is not."""
        done = self.progress
        if not done.num_units:
            return None
        num_units = sum(1 for _ in zip(range(done.num_units), units, strict=False))
        if num_units < done.num_units or self._files.sha256 != done.sha256:
            return (
                f"the input is not the one whose first {done.num_answered:,} questions are answered; give that one to "
                "go on, or name another --output_file, or pass --overwrite_output_file true with files to start anew"
            )
        if (done.is_short or self._sink.is_finished) and next(units, None) is not None:
            return (
                f"the input has grown since all of its {done.num_answered:,} questions were answered; put the new ones "
                "into a file of their own, or pass --overwrite_output_file true with files to start anew"
            )
        return None


def predict(reader: Answering, ranks: Ranks, rounds: Rounds | None, manner: Manner) -> None:
    """Answer all that is left; every rank must call this.

    Args:
        reader: Answers on this rank.
        ranks: The processes that share the work.
        rounds: On rank 0, the work; None elsewhere.
        manner: How questions become lines.

    Raises:
        DataError: On every rank alike: the input or the file of answers cannot be used further. What is written stays,
            and the same command goes on from there.
        Stopped: On every rank, if any of them was asked to stop; likewise.
    """
    while True:
        ranks.stop_if_asked()
        parcel = ranks.scatter(None if rounds is None else rounds.parcels(ranks.world_size))
        if parcel.failure is not None:
            error = DataError(parcel.failure)
            error.on_all_ranks = True
            raise error
        if parcel.is_end:
            break
        answered = ranks.gather(answer(parcel.questions, reader, manner))
        if rounds is not None:
            rounds.write(answered)
    if rounds is not None:
        rounds.finish()


def answer(questions: Sequence[Asked], reader: Answering, manner: Manner) -> Answered:
    """The lines of a chunk. Questions that the reader refuses are left out; they do not keep the others from it."""
    kept, flaws = list(questions), []
    try:
        found = _found(kept, reader, manner)
    except InvalidQuestionError:
        # Not by question: the same line of two files may hold the same one.
        problems = [(asked, reader.problem(asked.question)) for asked in questions]
        flaws = [Flaw(asked.place, problem) for asked, problem in problems if problem is not None]
        if not manner.skips_flaws:
            return Answered(b"", 0, [], flaws)
        kept = [asked for asked, problem in problems if problem is None]
        found = _found(kept, reader, manner)
    lines, scores = [], []
    for asked, answers in zip(kept, found, strict=True):
        lines.append(_line(asked, answers, with_nbest=manner.top_k > 1))
        if asked.references is not None:
            scores.append(score_question(asked.references, answers[0].text, manner.rules))
    content = "".join(lines).encode()
    if manner.compresses and content:
        content = gzip.compress(content, mtime=0)
    return Answered(content, len(lines), scores, flaws)


def _found(questions: Sequence[Asked], reader: Answering, manner: Manner) -> list[list[Answer]]:
    if not questions:
        return []
    asked = [each.question for each in questions]
    return reader.answer_chunk(asked, manner.top_k, overlap_threshold=manner.overlap_threshold)


def _line(asked: Asked, answers: Sequence[Answer], *, with_nbest: bool) -> str:
    return json.dumps({"id": asked.id, **record_of(answers, with_nbest=with_nbest)}, ensure_ascii=False) + "\n"


@contextmanager
def prediction_bar(
    num_before: int, *, shown: bool
) -> Iterator[tuple[Callable[[Progress, QuestionFiles], None], Callable[[str], None]]]:
    """A bar with questions per second and, where the size of the input is known, the time left.

    Gives what to call after each round, and what writes a line above the bar.

    Args:
        num_before: Questions that an earlier run has answered.
        shown: Whether there is a bar at all.
    """
    from tqdm import tqdm

    known = "{desc} {percentage:3.0f}% |{bar}| [{elapsed}<{remaining}]"
    with tqdm(desc="answering", disable=not shown, file=sys.stderr, bar_format="{desc} [{elapsed}]") as bar:
        started = time.perf_counter()

        def advance(progress: Progress, files: QuestionFiles) -> None:
            rate = (progress.num_answered - num_before) / max(time.perf_counter() - started, 1e-9)
            text = f"answering: {progress.num_answered:,} questions, {rate:,.1f} questions/s"
            bar.set_description_str(text, refresh=False)
            if files.num_bytes:
                bar.total, bar.bar_format = files.num_bytes, known
                bar.update(files.num_bytes_read - bar.n)
            else:
                bar.update()

        yield advance, lambda text: bar.write(text, file=sys.stderr)
