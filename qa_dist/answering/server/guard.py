"""What every request passes before the application sees it, and every response on its way out.

It says in a header of each response that a browser is to run and load nothing of another address, refuses names of
hosts that are not this server's, and turns what goes wrong inside into an error without details.
"""

import json
import logging
import time
import traceback
from collections.abc import Collection, MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qa_dist.answering.server.metrics import Metrics

_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}
"""Headers of every response that does not set its own."""

FAILED = "the server failed at this request; its log says more"
"""What a client is told of a mistake of ours."""

_LONGEST_HOST = 100
"""Characters of a host's name that an answer repeats."""

_logger = logging.getLogger("qa_dist.serve")


class Guard:
    """The application with these checks around it.

    Args:
        app: The application.
        hosts: Names by which the server may be called in the header `Host`, without a port; empty: any. A web page of
            somebody else can make a browser call this machine by a name of its own (DNS rebinding), but not by these.
        paths: Paths that the metrics tell apart.
        metrics: Count the responses.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], paths: Collection[str], metrics: Metrics) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._paths = frozenset(paths)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = 0

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _complete(message)
            await send(message)

        try:
            if self._hosts and (host := _host(scope)) not in self._hosts:
                await _send_error(send_counted, 421, _misdirected(host))
            else:
                await self._app(scope, receive, send_counted)
        except Exception as error:
            log_failure(error)
            if not status:
                await _send_error(send_counted, 500, FAILED)
        finally:
            if status:
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.count_response(path, status, time.monotonic() - began)


def log_failure(error: BaseException) -> None:
    """Log what failed and where in the code, without the message, in which there may be text of a request."""
    places = "".join(traceback.format_tb(error.__traceback__))
    _logger.error("a request failed with %s at\n%s", type(error).__name__, places)


def _host(scope: Scope) -> str:
    """The name in the header `Host`, without the port."""
    value = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1").lower()
    if value.startswith("["):
        return value.partition("]")[0] + "]"
    return value.partition(":")[0]


def _misdirected(host: str) -> str:
    """What a client is told that calls the server by a name that is not its own."""
    named = f"{host[:_LONGEST_HOST]}, as the header Host says" if host else "by an empty header Host"
    return f"this server is not called {named}; call it by its name, or start it with that one in --allowed_hosts"


def _complete(message: MutableMapping[str, Any]) -> None:
    headers = list(message.get("headers", ()))
    present = {name.lower() for name, _ in headers}
    message["headers"] = headers + [(name, value) for name, value in _HEADERS.items() if name not in present]


async def _send_error(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
