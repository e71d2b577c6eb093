"""A reader without a model, for tests of what stands around one, and a server with it."""

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

from qa_dist.answering.records import Answer, Question
from qa_dist.answering.server import process
from qa_dist.answering.server.app import Service, make_app
from qa_dist.answering.server.batching import BatchingOptions, Worker
from qa_dist.answering.server.limits import Limits
from qa_dist.answering.server.metrics import Metrics
from qa_dist.common.errors import DataError

BATCHING = BatchingOptions(
    batch_characters=1000,
    batch_wait_seconds=0.0,
    max_queue_requests=100,
    max_wait_seconds=1000.0,
    max_queue_characters=100_000,
)


class FakeReader:
    """Answers "after X" with the words behind each X in the texts, and else with no answer.

    Attributes:
        chunks: what each call asked for.
    """

    def __init__(self) -> None:
        self.chunks: list[list[Question]] = []
        self.hook: Callable[[list[Question]], None] = lambda questions: None

    def problem(self, question: Question) -> str | None:
        return "it is invalid" if question.question == "invalid" else None

    def answer_chunk(self, questions: Sequence[Question], top_k: int = 1) -> list[list[Answer]]:
        self.chunks.append(list(questions))
        self.hook(list(questions))
        return [self._answers(question, top_k) for question in questions]

    def _answers(self, question: Question, top_k: int) -> list[Answer]:
        if question.question == "refuse me":
            raise DataError("the question is one that this reader refuses")
        if question.question == "break":
            raise RuntimeError(f"a library quotes {question.contexts[0]}")
        word = question.question.removeprefix("after ")
        found = [
            (index, match)
            for index, context in enumerate(question.contexts)
            for match in re.finditer(rf"(?<={re.escape(word)} )[^ ]+(?: [^ ]+)?", context)
        ]
        share = 1.0
        answers = []
        for index, match in found[:top_k]:
            share /= 2
            answers.append(Answer(match[0], match.start(), match.end(), 10 * share, share, False, -2.5, index))
        return answers or [Answer("", -1, -1, 3.5, 0.75, True, 1.5, -1)]


def make_service(
    reader: FakeReader, batching: BatchingOptions = BATCHING, *, keys: Sequence[bytes] = (), **limits: float
) -> Service:
    """A service whose worker has not been started."""
    metrics = Metrics()
    worker = Worker(reader, batching, on_batch=metrics.count_batch)
    metrics.watch(worker)
    return Service(worker=worker, limits=Limits(**limits), model="fake", keys=keys, metrics=metrics)


@contextlib.contextmanager
def served(service: Service, port: int = 0) -> Iterator[str]:
    """The address of a real server, in a thread of this process, while the block runs."""
    listening = process.listen("127.0.0.1", port)
    ready = threading.Event()
    app = make_app(service, hosts=process.host_names(listening, "127.0.0.1", ()), close_seconds=10)
    server = process.make_server(app, service.limits, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    address = process.address_of(listening)
    thread.start()
    try:
        assert ready.wait(30)
        yield address
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def connection(address: str) -> socket.socket:
    """A bare connection to a server."""
    host, _, port = address.removeprefix("http://").strip("/").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)
