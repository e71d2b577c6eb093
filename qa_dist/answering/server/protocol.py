"""Connections: how long a client may take to say what it wants, and to take what it gets.

uvicorn closes connections that are idle between two requests. It waits for ever for the rest of a request's head, and
for a client that does not read its response.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def limited_protocol(receive_seconds: float, max_connections: int) -> type[H11Protocol]:
    """The protocol of uvicorn with limits: seconds for a request's head and for taking a response, and connections."""

    class LimitedProtocol(H11Protocol):
        """A connection that is closed when its client is too slow."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._head_timer: asyncio.TimerHandle | None = None
            self._write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > 2 * max_connections:
                transport.abort()
                return
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._await_head()
            else:
                self._head_came()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self.cycle.response_complete:
                # The next request came with the one that was answered.
                self._head_came()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self._write_timer or self.loop.call_later(receive_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_came()
            # Also lets whoever waits for the client to take its response go on.
            super().connection_lost(exc)
            self.resume_writing()

        def _await_head(self) -> None:
            # Not set anew by each byte that comes: a client that sends one a second is as slow as one that sends none.
            self._head_timer = self._head_timer or self.loop.call_later(receive_seconds, self.transport.abort)

        def _head_came(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return LimitedProtocol
