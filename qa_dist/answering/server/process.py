"""The server as a process: its socket, its keys, its start and its end."""

import math
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from qa_dist.answering.server.limits import Limits
from qa_dist.answering.server.protocol import limited_protocol
from qa_dist.common.errors import ConfigError
from qa_dist.common.reading import decoded, read_bytes

_MIN_KEY = 16
_BACKLOG = 256
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_LARGEST_HEAD = 16_384


def read_keys(path: str) -> list[bytes]:
    """The keys in a file, one a line: any of them opens the server, so that one can be replaced while both are used.

    Raises:
        UserError: The file cannot be read, is empty, or a line is no key. No message shows one.
    """
    lines = [line.strip() for line in decoded(read_bytes(Path(path)), Path(path)).splitlines()]
    keys = [line for line in lines if line]
    if not keys:
        raise ConfigError([f"--api_key_file {path} is empty; write a key into it, such as openssl rand -hex 32 makes"])
    for number, key in enumerate(lines, 1):
        if key and not (key.isascii() and key.isprintable() and " " not in key and len(key) >= _MIN_KEY):
            raise ConfigError(
                [
                    f"line {number} of --api_key_file {path} is no key: one has at least {_MIN_KEY} letters, digits "
                    "and signs of ASCII, without blanks; openssl rand -hex 32 makes one"
                ]
            )
    return [key.encode() for key in keys]


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; connections wait in it until the server runs.

    Raises:
        ConfigError: The address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError([f"--host {host} is no address of this machine: {said}"]) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(
            [f"--host {host} --port {port} cannot be used: {error.strerror}; choose another port, or 0 for a free one"]
        ) from error
    return listening


def address_of(listening: socket.socket) -> str:
    """The address of a server for a browser, such as http://127.0.0.1:8000/."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    host = str(listening.getsockname()[0])
    return host == "::1" or host.startswith("127.")


def host_names(listening: socket.socket, host: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Names by which clients may call the server; empty: by any.

    A server of this machine alone is called by this machine's names for itself. Of one that others reach nobody here
    knows the names.
    """
    if allowed:
        return (*_LOOPBACK, *allowed)
    return (*_LOOPBACK, host) if is_loopback(listening) else ()


def run(app: ASGIApp, listening: socket.socket, limits: Limits, announce: Callable[[], Any]) -> None:
    """Serve until SIGTERM or Ctrl-C; then take no more, answer what came, and return.

    Raises:
        KeyboardInterrupt: It was Ctrl-C.
    """
    with _sigterm_is_no_failure():
        make_server(app, limits, announce).run(sockets=[listening])


def make_server(app: ASGIApp, limits: Limits, announce: Callable[[], Any]) -> uvicorn.Server:
    """A server of the application; `announce` is called when it answers."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            announce()

    config = uvicorn.Config(
        app,
        http=limited_protocol(limits.receive_seconds, limits.max_connections),
        ws="none",
        lifespan="on",
        loop="asyncio",
        interface="asgi3",
        # Questions and texts are nobody's business but their askers': there is no log of requests.
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # uvicorn refuses the connection that reaches the limit.
        limit_concurrency=limits.max_connections + 1,
        timeout_graceful_shutdown=math.ceil(limits.request_seconds + limits.receive_seconds) + 1,
        h11_max_incomplete_event_size=_LARGEST_HEAD,
    )
    return Server(config)


@contextmanager
def _sigterm_is_no_failure() -> Iterator[None]:
    """After its end in order uvicorn sends SIGTERM again, to whoever handled it before: let that do nothing."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
