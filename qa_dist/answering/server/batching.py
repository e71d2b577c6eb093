"""One worker owns the device and answers what waits for it, the questions of many clients in one batch.

While a batch is computed the next one gathers, so that under load batches are large by themselves. Only when the device
is idle does a request wait for company, at most `batch_wait_seconds`.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qa_dist.answering.records import InvalidQuestionError
from qa_dist.answering.server.queue import Item, Queue, Request, num_characters

if TYPE_CHECKING:
    from qa_dist.answering.records import Answer, Question

_LONGEST_RETRY_SECONDS = 60
_MEMORY_OF_SPEED = 0.8
"""Share that the speed so far keeps when a batch was measured: the last five or so decide."""

_LARGE = 0.25
"""Share of the most characters from which on a batch is large enough to tell how fast large ones are."""


class Answerer(Protocol):
    """What answers a chunk of questions, and says before which it cannot: a `Reader`."""

    def problem(self, question: "Question") -> str | None: ...

    def answer_chunk(self, questions: "Sequence[Question]", top_k: int = 1) -> "list[list[Answer]]": ...


class QueueFullError(Exception):
    """More waits than may; `retry_seconds` from now it will probably be less."""

    def __init__(self, retry_seconds: int) -> None:
        self.retry_seconds = retry_seconds
        super().__init__(f"too much waits; try again in {retry_seconds} s")


class QueueClosedError(Exception):
    """The server is about to stop and takes no more."""


class QuestionError(Exception):
    """One question of a request could not be answered; its cause says why.

    Attributes:
        index: Which one.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        super().__init__(f"question {index} could not be answered")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingOptions:
    """How much is computed at once, and how much may wait.

    Attributes:
        batch_characters: Most characters of a batch; a longer question is a batch of its own.
        batch_wait_seconds: How long an idle device waits for company of the first request.
        max_queue_requests: Requests that may wait.
        max_wait_seconds: A request that would wait for longer, by the speed of the last batches, is refused at once.
        max_queue_characters: Characters that may be held for them; a request that finds none waiting is always taken.
    """

    batch_characters: int
    batch_wait_seconds: float
    max_queue_requests: int
    max_wait_seconds: float
    max_queue_characters: int


class Worker:
    """Answers requests in a thread of its own, from `start` to `close`.

    Args:
        answerer: Is called by that thread alone.
        options: How much is computed at once, and how much may wait.
        on_batch: Is told the questions and seconds of each batch.
        clock: Seconds that only grow.

    Attributes:
        num_failed_in_a_row: Questions that failed one after the other, though nothing is wrong with them.
    """

    def __init__(
        self,
        answerer: Answerer,
        options: BatchingOptions,
        *,
        on_batch: Callable[[int, float], None] = lambda num_questions, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._answerer = answerer
        self.options = options
        self._on_batch = on_batch
        self._clock = clock
        self._queue = Queue()
        self._changed = threading.Condition()
        self._is_closed = False
        self.num_failed_in_a_row = 0
        self._busy_since: float | None = None
        self._characters_in_work = 0
        self._characters_per_second: float | None = None
        self._thread = threading.Thread(target=self._run, name="qa_dist device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_seconds: float) -> bool:
        """Take no more, answer what waits, and end; returns whether that was done in time."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    @property
    def num_waiting_requests(self) -> int:
        return len(self._queue)

    @property
    def num_waiting_characters(self) -> int:
        return self._queue.num_characters

    @property
    def busy_seconds(self) -> float:
        """How long the batch in work has taken so far; 0 if there is none."""
        since = self._busy_since
        return 0.0 if since is None else self._clock() - since

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, questions: "Sequence[Question]", top_k: int) -> Request:
        """Let questions wait for their answers, which the `future` of what is returned gets; to give up, cancel it.

        Raises:
            QueueFullError: Too much waits already.
            QueueClosedError: The server is about to stop.
        """
        request = Request(questions, top_k, self._clock())
        with self._changed:
            if self._is_closed:
                raise QueueClosedError
            # The first one is always taken: whatever its size, nobody knows better when it will be done.
            if len(self._queue) and self._is_too_much(request):
                raise QueueFullError(self._retry_seconds())
            self._queue.add(request)
            self._changed.notify_all()
        request.future.add_done_callback(lambda future: self._forget(request))
        return request

    def _forget(self, request: Request) -> None:
        """Let what nobody waits for any more not be computed."""
        with self._changed:
            self._queue.remove(request)

    def _is_too_much(self, request: Request) -> bool:
        options = self.options
        return (
            len(self._queue) >= options.max_queue_requests
            or self._queue.held_characters + request.held_characters > options.max_queue_characters
            or self._seconds(self._queue.characters_before(request)) > options.max_wait_seconds
        )

    def _seconds(self, num_characters: int) -> float:
        """How long so many characters and those in work will take; 0 where no batch has been measured yet."""
        if not self._characters_per_second:
            return 0.0
        return (num_characters + self._characters_in_work) / self._characters_per_second

    def _retry_seconds(self) -> int:
        """When what waits will be done."""
        return max(1, min(_LONGEST_RETRY_SECONDS, math.ceil(self._seconds(self._queue.num_characters))))

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            num_computed = self._answer(batch)
            with self._changed:
                seconds = self.busy_seconds
                self._measure(num_computed, seconds)
                self._characters_in_work = 0
                self._busy_since = None
            self._on_batch(len(batch), seconds)

    def _next_batch(self) -> list[Item] | None:
        """Wait for the next batch; None when the queue is closed and empty."""
        with self._changed:
            while True:
                seconds = self._queue.seconds_until_ready(
                    self._clock(),
                    budget=self.options.batch_characters,
                    batch_wait_seconds=0.0 if self._is_closed else self.options.batch_wait_seconds,
                )
                if seconds == 0.0:
                    batch = self._queue.take(self.options.batch_characters)
                    self._busy_since = self._clock()
                    self._characters_in_work = sum(num_characters(item.question) for item in batch)
                    return batch
                if seconds is None and self._is_closed:
                    return None
                self._changed.wait(seconds)

    def _measure(self, num_computed: int, seconds: float) -> None:
        """Note the speed at which characters of a batch were computed; those of questions that were not say nothing.

        A small number of them, which cost mostly their call, only says that the device is as fast.
        """
        if seconds > 0 and num_computed:
            speed = num_computed / seconds
            before = self._characters_per_second or speed
            if num_computed >= _LARGE * self.options.batch_characters:
                self._characters_per_second = _MEMORY_OF_SPEED * before + (1 - _MEMORY_OF_SPEED) * speed
            else:
                self._characters_per_second = max(before, speed)

    def _answer(self, batch: Sequence[Item]) -> int:
        """Compute what can be answered of a batch, and return the number of characters computed."""
        sound = []
        for item in batch:
            try:
                problem = self._answerer.problem(item.question)
            except Exception as error:
                _fail(item, error)
                continue
            if problem is None:
                sound.append(item)
            else:
                _fail(item, InvalidQuestionError(0, problem))
        return self._compute(sound)

    def _compute(self, batch: Sequence[Item]) -> int:
        """Compute what is still wanted of a batch, and return the number of characters computed.

        Where that fails, it is done with every question by itself.
        """
        wanted = [item for item in batch if not item.request.future.done()]
        if not wanted:
            return 0
        try:
            answers = self._answerer.answer_chunk([item.question for item in wanted], top_k=wanted[0].request.top_k)
            pairs = list(zip(wanted, answers, strict=True))
        # Whatever it is, it belongs to the request that caused it, and the others go on.
        except Exception as error:
            if len(wanted) > 1:
                return sum(self._compute([item]) for item in wanted)
            _fail(wanted[0], error)
            self.num_failed_in_a_row += not isinstance(error, InvalidQuestionError)
            return 0
        self.num_failed_in_a_row = 0
        for item, found in pairs:
            request = item.request
            request.answers[item.index] = found
            if len(request.answers) == len(request.questions) and not request.future.done():
                _set(request.future, [request.answers[index] for index in range(len(request.questions))])
        return sum(num_characters(item.question) for item in wanted)


def _set(future: "Future[list[list[Answer]]]", result: "list[list[Answer]]") -> None:
    # From here on nobody can cancel it; False: somebody has.
    if future.set_running_or_notify_cancel():
        future.set_result(result)


def _fail(item: Item, cause: Exception) -> None:
    future = item.request.future
    if future.done():
        return
    error = QuestionError(item.index)
    error.__cause__ = cause
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
