"""The queue, and the worker that empties it: counted batches, of a reader without a model, by a clock of numbers."""

import dataclasses
import threading
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from qa_dist.answering.records import InvalidQuestionError, Question
from qa_dist.answering.server.batching import (
    QuestionError,
    QueueClosedError,
    QueueFullError,
    Worker,
)
from qa_dist.answering.server.queue import Queue, Request, num_characters
from tests.unit.answering.fake_reader import BATCHING, FakeReader


def request(*lengths: int, top_k: int = 1, arrived: float = 0.0) -> Request:
    """A request whose questions have so many characters."""
    return Request([Question("?", ("x" * (length - 1),)) for length in lengths], top_k, arrived)


def taken(queue: Queue, budget: int, requests: list[Request]) -> list[tuple[int, int]]:
    """Place of the request and of the question of each item of the next batch."""
    return [(requests.index(item.request), item.index) for item in queue.take(budget)]


def test_requests_take_turns_so_that_a_large_one_does_not_keep_a_small_one_waiting() -> None:
    requests = [request(10, 10, 10, 10), request(10), request(10, 10)]
    queue = Queue()
    for each in requests:
        queue.add(each)
    assert queue.num_characters == 70
    assert taken(queue, 30, requests) == [(0, 0), (1, 0), (2, 0)]
    assert queue.num_characters == 40
    assert taken(queue, 30, requests) == [(0, 1), (2, 1), (0, 2)]
    assert taken(queue, 30, requests) == [(0, 3)]
    assert (len(queue), queue.num_characters) == (0, 0)


def test_what_does_not_fit_begins_the_next_batch_and_is_not_passed_over() -> None:
    requests = [request(20), request(90), request(20), request(200), request(10)]
    queue = Queue()
    for each in requests:
        queue.add(each)
    batches = [taken(queue, 100, requests) for _ in range(4)]
    assert batches == [[(0, 0)], [(1, 0)], [(2, 0)], [(3, 0)]]
    assert taken(queue, 100, requests) == [(4, 0)]


def test_a_batch_has_one_top_k_and_others_keep_their_turn() -> None:
    requests = [request(10), request(10, top_k=5), request(10), request(10, top_k=5), request(10, top_k=2)]
    queue = Queue()
    for each in requests:
        queue.add(each)
    assert taken(queue, 100, requests) == [(0, 0), (2, 0)]
    assert taken(queue, 100, requests) == [(1, 0), (3, 0)]
    assert taken(queue, 100, requests) == [(4, 0)]


@given(
    st.lists(st.tuples(st.lists(st.integers(2, 60), min_size=1, max_size=5), st.integers(1, 3)), max_size=12),
    st.integers(1, 120),
)
def test_every_question_is_taken_once_within_the_budget(given_requests: Any, budget: int) -> None:
    requests = [request(*lengths, top_k=top_k) for lengths, top_k in given_requests]
    queue = Queue()
    for each in requests:
        queue.add(each)
    seen = []
    while batch := queue.take(budget):
        assert len({item.request.top_k for item in batch}) == 1
        assert len(batch) == 1 or sum(num_characters(item.question) for item in batch) <= budget
        seen += [(requests.index(item.request), item.index) for item in batch]
    assert sorted(seen) == [
        (place, index) for place, each in enumerate(requests) for index in range(len(each.questions))
    ]
    assert (queue.num_characters, queue.held_characters) == (0, 0)


def test_a_text_that_many_questions_are_about_is_held_once() -> None:
    text = "x" * 100
    several = Request([Question("??", (text,)) for _ in range(5)], 1, 0.0)
    queue = Queue()
    queue.add(several)
    assert (queue.num_characters, queue.held_characters) == (510, 110)
    queue.take(300)
    queue.remove(several)
    assert (len(queue), queue.num_characters, queue.held_characters) == (0, 0, 0)


def test_an_idle_device_waits_for_company_for_as_long_as_the_first_may_wait_and_not_when_a_batch_is_full() -> None:
    queue = Queue()
    options: dict[str, Any] = {"budget": 50, "batch_wait_seconds": 0.25}
    assert queue.seconds_until_ready(7.0, **options) is None
    queue.add(request(20, arrived=7.0))
    queue.add(request(20, arrived=7.125))
    assert queue.seconds_until_ready(7.125, **options) == 0.125
    assert queue.seconds_until_ready(9.0, **options) == 0.0
    queue.add(request(10, arrived=7.125))
    assert queue.seconds_until_ready(7.125, **options) == 0.0


class Gate:
    """Holds a reader in its first call until it is opened."""

    def __init__(self, reader: FakeReader) -> None:
        self.is_reached, self._may_go = threading.Event(), threading.Event()
        reader.hook = self._wait

    def open(self) -> None:
        self._may_go.set()

    def _wait(self, questions: list[Question]) -> None:
        self.is_reached.set()
        assert self._may_go.wait(20)


@pytest.fixture
def reader() -> FakeReader:
    return FakeReader()


def started(reader: FakeReader, **changes: Any) -> tuple[Worker, Gate]:
    """A worker that is at work on a first question, until its gate is opened."""
    gate = Gate(reader)
    worker = Worker(reader, dataclasses.replace(BATCHING, **changes))
    worker.start()
    worker.submit([Question("after first", ("first one",))], 1)
    assert gate.is_reached.wait(20)
    return worker, gate


def asked(worker: Worker, *words: str, top_k: int = 1) -> "Future[Any]":
    return worker.submit([Question(f"after {word}", (f"{word} {word[::-1]}",)) for word in words], top_k).future


def test_what_gathers_while_the_device_is_busy_is_one_batch(reader: FakeReader) -> None:
    worker, gate = started(reader)
    futures = [asked(worker, f"word{number}") for number in range(20)]
    gate.open()
    assert [future.result(20)[0][0].text for future in futures] == [f"word{number}"[::-1] for number in range(20)]
    assert [len(chunk) for chunk in reader.chunks] == [1, 20]
    assert worker.close(20)


def test_a_question_that_fails_harms_no_other(reader: FakeReader) -> None:
    worker, gate = started(reader)
    good = [asked(worker, "left"), asked(worker, "right", "up")]
    bad = worker.submit([Question("after x", ("x y",)), Question("break", ("secret",))], 1).future
    gate.open()
    assert [[answers[0].text for answers in future.result(20)] for future in good] == [["tfel"], ["thgir", "pu"]]
    with pytest.raises(QuestionError) as error:
        bad.result(20)
    assert error.value.index == 1
    assert isinstance(error.value.__cause__, RuntimeError)
    assert worker.close(20)


def test_invalid_questions_are_found_before_anything_is_computed(reader: FakeReader) -> None:
    """However many: each of them is looked at once, and the others are one batch."""
    worker, gate = started(reader, max_queue_requests=5000)
    futures = [asked(worker, word) for word in ("one", "two")]
    bad = [worker.submit([Question("invalid", ("x",))], 1).future for _ in range(2000)]
    both = worker.submit([Question("after x", ("x y",)), Question("invalid", ("x",))], 1).future
    futures += [asked(worker, word) for word in ("three", "four")]
    gate.open()
    assert [future.result(60)[0][0].text for future in futures] == ["eno", "owt", "eerht", "ruof"]
    for future in (*bad, both):
        with pytest.raises(QuestionError) as error:
            future.result(20)
        assert isinstance(error.value.__cause__, InvalidQuestionError)
    assert error.value.index == 1
    assert "after x" not in [question.question for chunk in reader.chunks for question in chunk]
    assert worker.num_failed_in_a_row == 0
    assert worker.close(20)


def test_questions_that_fail_one_after_the_other_are_counted_until_one_is_answered(reader: FakeReader) -> None:
    worker, gate = started(reader)
    bad = [worker.submit([Question("break", ("x",))], 1).future for _ in range(3)]
    gate.open()
    for future in bad:
        with pytest.raises(QuestionError):
            future.result(20)
    assert worker.num_failed_in_a_row == 3
    asked(worker, "one").result(20)
    assert worker.num_failed_in_a_row == 0
    assert worker.close(20)


def test_what_nobody_waits_for_is_not_computed_and_frees_its_place(reader: FakeReader) -> None:
    worker, gate = started(reader, max_queue_requests=2)
    kept, given_up = asked(worker, "kept"), asked(worker, "gone")
    with pytest.raises(QueueFullError):
        asked(worker, "more")
    assert given_up.cancel()
    more = asked(worker, "more")
    gate.open()
    assert (kept.result(20)[0][0].text, more.result(20)[0][0].text) == ("tpek", "erom")
    assert "after gone" not in [question.question for chunk in reader.chunks for question in chunk]
    assert worker.close(20)


def sized(length: int, number: int = 1) -> list[Question]:
    return [Question("?", ("x" * (length - 1),))] * number


def clocked(reader: FakeReader, seconds: float, **changes: Any) -> tuple[Worker, list[float]]:
    """A worker that takes so many seconds of its clock for a batch; and that clock, whose time may be changed."""
    now = [0.0]
    worker = Worker(reader, dataclasses.replace(BATCHING, **changes), clock=lambda: now[0])
    reader.hook = lambda questions: now.__setitem__(0, now[0] + seconds)
    worker.start()
    return worker, now


def measured(reader: FakeReader, **changes: Any) -> Worker:
    """A worker that has read 20 characters in two seconds of its clock, and has begun with 30 more."""
    worker, _ = clocked(reader, 2.0, batch_characters=10, **changes)
    worker.submit(sized(20), 1).future.result(20)
    gate = Gate(reader)
    worker.submit(sized(30), 1)
    assert gate.is_reached.wait(20)
    reader.gate = gate  # type: ignore[attr-defined]
    return worker


def end(worker: Worker, reader: FakeReader) -> None:
    reader.gate.open()  # type: ignore[attr-defined]
    assert worker.close(20)


def test_more_than_may_wait_is_refused_with_a_time(reader: FakeReader) -> None:
    worker = measured(reader, max_queue_characters=100)
    # A first one waits, whatever its size.
    worker.submit(sized(90), 1)
    with pytest.raises(QueueFullError) as error:
        worker.submit(sized(90), 1)
    assert error.value.retry_seconds == 12
    end(worker, reader)


def test_who_would_wait_too_long_is_refused_at_once(reader: FakeReader) -> None:
    worker = measured(reader, max_wait_seconds=20.0)
    worker.submit(sized(50, number=9), 1)
    # One of those nine comes before a single question: 30 + 50 + 120 characters at 10 a second.
    worker.submit(sized(120), 1)
    with pytest.raises(QueueFullError) as error:
        worker.submit(sized(1), 1)
    assert error.value.retry_seconds == 60
    end(worker, reader)


def test_a_small_batch_does_not_make_the_device_seem_slow(reader: FakeReader) -> None:
    worker, _ = clocked(reader, 1.0, max_wait_seconds=30.0)
    worker.submit(sized(900), 1).future.result(20)
    for _ in range(50):
        worker.submit(sized(2), 1).future.result(20)
    gate = Gate(reader)
    worker.submit(sized(2), 1)
    assert gate.is_reached.wait(20)
    # 8,000 characters at 900 a second.
    for _ in range(8):
        worker.submit(sized(1000), 1)
    gate.open()
    assert worker.close(20)


def test_questions_that_are_refused_say_nothing_about_the_speed_of_the_device(reader: FakeReader) -> None:
    worker, now = clocked(reader, 1.0, max_wait_seconds=20.0)
    worker.submit(sized(100), 1).future.result(20)
    problem = reader.problem

    def refusing(question: Question) -> str | None:
        now[0] += 1e-6
        return "it is too long" if len(question.contexts[0]) == 998 else problem(question)

    reader.problem = refusing  # type: ignore[method-assign]
    with pytest.raises(QuestionError):
        worker.submit(sized(999), 1).future.result(20)
    gate = Gate(reader)
    worker.submit(sized(100), 1)
    assert gate.is_reached.wait(20)
    worker.submit(sized(2000), 1)
    # At 100 characters a second, and not at a thousand million.
    with pytest.raises(QueueFullError):
        worker.submit(sized(3000), 1)
    gate.open()
    assert worker.close(20)


def test_closing_answers_what_waits_and_takes_no_more(reader: FakeReader) -> None:
    # The first one is a full batch, the second would wait an hour for company.
    worker, gate = started(reader, batch_wait_seconds=3600.0, batch_characters=20)
    waiting = asked(worker, "one")
    closing = threading.Thread(target=worker.close, args=(20,))
    closing.start()
    while True:
        try:
            worker.submit([Question("late", ("x",))], 1).future.cancel()
        except QueueClosedError:
            break
    gate.open()
    closing.join(20)
    assert waiting.result(0)[0][0].text == "eno"
    assert not worker.is_alive


def test_a_reader_that_returns_too_few_answers_is_a_failure_and_not_the_end(reader: FakeReader) -> None:
    worker, gate = started(reader)
    gate.open()
    reader.answer_chunk = lambda questions, top_k=1: []  # type: ignore[method-assign]
    with pytest.raises(QuestionError):
        asked(worker, "one").result(20)
    assert worker.is_alive
    assert worker.close(20)
