"""Answer questions over HTTP, with a page for people: `qa-dist serve MODEL --port 8000`.

It listens to this machine alone unless --host says otherwise. SIGTERM lets it finish what it was asked, and end.
"""

import contextlib
import importlib.util
import os
import re
import socket
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qa_dist.answering.options import ReaderConfig, read_options
from qa_dist.common.command import run_command
from qa_dist.common.errors import ConfigError
from qa_dist.config.options import option
from qa_dist.config.texts import shown
from qa_dist.machine.allocator import start_with_flat_heap

if TYPE_CHECKING:
    from qa_dist.answering.reader import Reader
    from qa_dist.answering.records import Question

PROG = "qa_dist.serve"

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")

_BATCH_CHARACTERS = {"cpu": 16_384, "cuda": 262_144}
"""About what one forward pass or two of these devices take."""

_HOST = re.compile(r"\[[0-9a-fA-F:.]+\]|[^:/*\s]+")
"""The name of a host as requests have it, without a port: [::1] with its brackets, or a name with neither : nor /."""

_IN_TIME = 0.8
"""Of the time limit of a request: who would have to wait for longer is better told at once."""

_LONGEST_TEXTS_WAITING = 64
"""Requests of more characters than so many of the longest texts do not wait together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig(ReaderConfig):
    """The model, where the server listens, and what it lets clients do."""

    host: str = option("127.0.0.1", "address that the server listens at; 0.0.0.0: all of this machine's")
    port: int = option(8000, "port that the server listens at; 0: a free one", minimum=0, maximum=65535)
    api_key_file: str | None = option(
        None, "file of keys, one a line; clients then send one, as Authorization: Bearer KEY"
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "names by which clients may call the server; auto: on 127.0.0.1 only this machine's own, else any",
    )
    max_body_bytes: int = option(2**20, "bytes of a request", minimum=1024)
    max_context_characters: int = option(100_000, "characters of one text", minimum=1)
    max_questions: int = option(64, "questions of a request, or texts of one question", minimum=1)
    max_queue_requests: int = option(
        256, "requests that may wait; more, or such as would wait too long, get the status 429 with a time", minimum=1
    )
    max_connections: int = option(512, "connections of all clients together", minimum=1)
    request_timeout: float = option(
        30.0, "seconds until a request without an answer gets the status 503 or 504", above=0, maximum=3600
    )
    receive_timeout: float = option(
        10.0, "seconds that a client may take to send a request, or to take its answer", above=0, maximum=3600
    )
    batch_characters: int | None = option(
        None, "characters that are read in one batch; auto: 16384 on CPU, 262144 on CUDA", minimum=1
    )
    batch_wait_ms: float = option(
        5.0, "milliseconds that an idle model waits for more questions", minimum=0, maximum=1000
    )

    def problems(self) -> Iterable[str]:
        yield from self.contradictions()
        if self.max_body_bytes < self.max_context_characters:
            yield (
                f"--max_body_bytes {self.max_body_bytes} cannot hold a text of --max_context_characters "
                f"{self.max_context_characters}; raise the one or lower the other"
            )
        for host in self.allowed_hosts:
            if not _HOST.fullmatch(host):
                yield (
                    f"--allowed_hosts {shown(host)} is no name of a host; give each name whole and alone, such as "
                    "qa.example or [::1], without http://, port and *"
                )


def main(argv: Sequence[str] | None = None) -> int:
    if argv is None:
        # Rows have another length in every batch, too.
        start_with_flat_heap(os.environ, sys.orig_argv)
    return run_command(PROG, lambda: _serve(sys.argv[1:] if argv is None else argv))


def _serve(argv: Sequence[str]) -> int:
    options = read_options(argv, prog=PROG, description=__doc__ or "", entry=ServeConfig)
    if missing := [package for package in PACKAGES if importlib.util.find_spec(package) is None]:
        raise ConfigError(
            [f"qa-dist serve needs {', '.join(missing)}; install what it needs with: pip install 'qa-dist[serve]'"]
        )
    from qa_dist.answering.server import process

    keys = process.read_keys(options.api_key_file) if options.api_key_file else []
    # Before the model is loaded: an address that is taken should be said at once.
    with contextlib.closing(process.listen(options.host, options.port)) as listening:
        if not keys and not process.is_loopback(listening):
            sys.stderr.write(f"{PROG}: note: whoever reaches {options.host} can ask; --api_key_file asks for a key\n")
        _run(options, listening, keys)
    return 0


class _Served:
    """A reader for strangers, of whom none may ask for the work of many."""

    def __init__(self, reader: "Reader") -> None:
        self._reader = reader
        self.answer_chunk = reader.answer_chunk

    def problem(self, question: "Question") -> str | None:
        # It says of what is too long, too, and names no option: clients have none.
        return self._reader.cost_problem(question)


def _run(options: ServeConfig, listening: socket.socket, keys: Sequence[bytes]) -> None:
    """Load the model and serve it until the process is asked to stop."""
    from qa_dist.answering.server import process
    from qa_dist.answering.server.app import Service, make_app
    from qa_dist.answering.server.batching import BatchingOptions, Worker
    from qa_dist.answering.server.limits import Limits
    from qa_dist.answering.server.metrics import Metrics

    # Rows have another length in every batch, and for each length oneDNN keeps what it has made for it: 1,024 of these
    # by default, which a server that runs for days would all come to hold. It reads this before its first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    # Libraries greet on standard output.
    with contextlib.redirect_stdout(sys.stderr):
        reader = options.open()
    sys.stderr.writelines(f"{PROG}: {note}\n" for note in reader.notes)
    limits = Limits(
        max_body_bytes=options.max_body_bytes,
        max_context_characters=options.max_context_characters,
        max_questions=options.max_questions,
        max_top_k=reader.config.evaluation.n_best_size,
        request_seconds=options.request_timeout,
        receive_seconds=options.receive_timeout,
        max_connections=options.max_connections,
    )
    batch_characters = (
        options.batch_characters or _BATCH_CHARACTERS["cuda" if reader.backend.device.startswith("cuda") else "cpu"]
    )
    batching = BatchingOptions(
        batch_characters=batch_characters,
        batch_wait_seconds=options.batch_wait_ms / 1000,
        max_queue_requests=options.max_queue_requests,
        max_wait_seconds=_IN_TIME * options.request_timeout,
        max_queue_characters=_LONGEST_TEXTS_WAITING * options.max_context_characters,
    )
    metrics = Metrics()
    worker = Worker(_Served(reader), batching, on_batch=metrics.count_batch)
    metrics.watch(worker)
    name = os.path.basename(os.path.normpath(str(options.model)))
    app = make_app(
        Service(worker=worker, limits=limits, model=name, keys=keys, metrics=metrics),
        hosts=process.host_names(listening, options.host, options.allowed_hosts),
        close_seconds=options.request_timeout,
    )
    address = process.address_of(listening)
    process.run(app, listening, limits, lambda: sys.stderr.write(f"{PROG}: {name} answers at {address}\n"))


if __name__ == "__main__":
    sys.exit(main())
