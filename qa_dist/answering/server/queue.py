"""What waits for the device, and what is to be computed next. No threads, no clock: times are given.

Each question is taken by itself, one per request in turn, so that a request of sixty-four long texts does not make one
of a single question wait for all of them.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qa_dist.answering.records import Answer, Question


@dataclass(slots=True, eq=False)
class Request:
    """The questions of one request, and what is known of their answers.

    Attributes:
        questions: What is asked.
        top_k: How many answers of each question are wanted.
        arrived: When it came, in seconds of the caller's clock.
        future: Gets a list of answers per question, or the exception that one of them raised.
        answers: What is known so far, by question.
        num_taken: Questions that were given to the device.
    """

    questions: "Sequence[Question]"
    top_k: int
    arrived: float
    future: "Future[list[list[Answer]]]" = field(default_factory=Future)
    answers: "dict[int, list[Answer]]" = field(default_factory=dict)
    num_taken: int = 0

    @property
    def waiting_characters(self) -> int:
        """Characters of the questions that were not taken yet."""
        return sum(map(num_characters, self.questions[self.num_taken :]))

    @property
    def held_characters(self) -> int:
        """Characters that are held for it; a text that several questions are about counts once."""
        contexts = {id(context): len(context) for question in self.questions for context in question.contexts}
        return sum(contexts.values()) + sum(len(question.question) for question in self.questions)


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a request: `request.questions[index]`."""

    request: Request
    index: int

    @property
    def question(self) -> "Question":
        return self.request.questions[self.index]


def num_characters(question: "Question") -> int:
    """What a question costs: the characters that are read for it, which grow as its tokens do."""
    return sum(map(len, question.contexts)) + len(question.question) * len(question.contexts)


class Queue:
    """Requests in the order of their turn.

    Attributes:
        num_characters: To be read for all questions that wait.
        held_characters: Of all requests that have questions that wait.
    """

    def __init__(self) -> None:
        self._turns: deque[Request] = deque()
        self.num_characters = 0
        self.held_characters = 0

    def __len__(self) -> int:
        """Number of requests of which a question waits."""
        return len(self._turns)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._turns)

    def add(self, request: Request) -> None:
        """Let a request wait; its turn comes last."""
        self._turns.append(request)
        self.num_characters += request.waiting_characters
        self.held_characters += request.held_characters

    def remove(self, request: Request) -> None:
        """Forget a request, if it is there."""
        if request in self._turns:
            self._turns.remove(request)
            self.num_characters -= request.waiting_characters
            self.held_characters -= request.held_characters

    def characters_before(self, request: Request) -> int:
        """What would be computed until a request that is added now has its last turn, its own questions included."""
        turns = len(request.questions)
        others = (
            num_characters(question)
            for other in self._turns
            for question in other.questions[other.num_taken : other.num_taken + turns]
        )
        return sum(others) + request.waiting_characters

    def seconds_until_ready(self, now: float, *, budget: int, batch_wait_seconds: float) -> float | None:
        """How long the device should still wait for company of what is there; None if nothing waits.

        It does not wait for more than the first request to come was to wait, nor when a batch is full.
        """
        if not self._turns:
            return None
        if self.num_characters >= budget:
            return 0.0
        return max(0.0, min(request.arrived for request in self._turns) + batch_wait_seconds - now)

    def take(self, budget: int) -> list[Item]:
        """The next batch: questions with one `top_k`, by turns, of at most `budget` characters; at least one question.

        Nothing is passed over because it is large: what does not fit begins the next batch.
        """
        batch: list[Item] = []
        left = budget
        others: deque[Request] = deque()
        while self._turns:
            request = self._turns.popleft()
            if batch and request.top_k != batch[0].request.top_k:
                others.append(request)
                continue
            item = Item(request, request.num_taken)
            cost = num_characters(item.question)
            if batch and cost > left:
                self._turns.appendleft(request)
                break
            batch.append(item)
            left -= cost
            self.num_characters -= cost
            request.num_taken += 1
            if request.num_taken < len(request.questions):
                self._turns.append(request)
            else:
                self.held_characters -= request.held_characters
        # Those with another top_k came first, and are the first of the next batch.
        self._turns.extendleft(reversed(others))
        return batch
