"""The server on a real socket: clients that are slow, malformed, endless or gone do no harm to others."""

import contextlib
import dataclasses
import json
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from qa_dist.answering.records import Question
from tests.unit.answering.fake_reader import BATCHING, FakeReader, connection, make_service, served

BODY = json.dumps({"question": "after a", "context": "a b c"}).encode()
HEAD = b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n"
WHOLE = HEAD + LENGTH % len(BODY) + BODY
LAST = HEAD + b"Connection: close\r\n" + LENGTH % len(BODY) + BODY


@pytest.fixture(scope="module")
def reader() -> FakeReader:
    return FakeReader()


@pytest.fixture(scope="module")
def address(reader: FakeReader) -> Iterator[str]:
    """A server that waits for a slow client only for a moment."""
    with served(make_service(reader, receive_seconds=0.3, max_body_bytes=4096)) as address:
        yield address


def talk(address: str, *parts: bytes, pause: float = 0.0) -> bytes:
    """All that a server sends to a client that sends these parts, until it closes the connection."""
    with connection(address) as client:
        for part in parts:
            try:
                client.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
            threading.Event().wait(pause)
        return received_by(client)


def received_by(client: socket.socket) -> bytes:
    """All that comes until the server closes or drops the connection."""
    received = b""
    try:
        while data := client.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def statuses(received: bytes) -> list[int]:
    """Codes of the responses, in their order."""
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+)", received)]


def is_well(address: str) -> bool:
    """Whether the server answers a usual client."""
    request = urllib.request.Request(f"{address}answer", BODY, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return bool(json.load(response)["answers"][0]["text"] == "b c")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([b"GARBAGE\r\n\r\n"], [400]),
        ([bytes(range(256)) * 4], [400]),
        ([b"GET / HTTP/1.1\r\n" + b"X-Long: " + b"x" * 70_000], [400]),
        ([HEAD + b"Content-Length: -1\r\n\r\n"], [400]),
        # Chunks count, whatever length is said beside them: these never end.
        ([HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3"], [408]),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"], [400]),
        # Two requests at once, and one in pieces.
        ([WHOLE + LAST], [200, 200]),
        ([LAST[:30], LAST[30:]], [200]),
        (
            [
                HEAD
                + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
            ],
            [200],
        ),
        # Too long: a little, said beforehand, without end.
        ([HEAD + LENGTH % 5000 + b" " * 5000], [413]),
        ([HEAD + LENGTH % 10**12], [413]),
        ([HEAD + b"Expect: 100-continue\r\n" + LENGTH % 5000], [413]),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"400\r\n%b\r\n" % (b" " * 1024)] * 200], [413]),
        # A head and a body that do not come.
        ([], []),
        ([WHOLE[:30]], []),
        ([HEAD + LENGTH % len(BODY) + BODY[:10]], [408]),
    ],
    ids=str,
)
def test_a_strange_client_gets_what_is_right_and_its_connection_ends(
    address: str, parts: list[bytes], expected: list[int]
) -> None:
    assert statuses(talk(address, *parts)) == expected
    assert is_well(address)


def test_a_client_that_sends_a_byte_at_a_time_is_slow_too(address: str) -> None:
    # Each byte comes in time, the whole does not.
    assert talk(address, *(bytes([byte]) for byte in WHOLE[:40]), pause=0.02) == b""
    assert is_well(address)


def test_a_client_may_be_slow_only_once(address: str) -> None:
    with connection(address) as client:
        client.sendall(WHOLE)
        received = b""
        while not received.endswith(b"}]}"):
            received += client.recv(65536)
        client.sendall(WHOLE[:30])
        assert received_by(client) == b""


def test_many_slow_clients_keep_nobody_out(address: str) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connection(address)) for _ in range(60)]
        for client in slow:
            client.sendall(WHOLE[:50])
        assert is_well(address)
        assert [received_by(client) for client in slow] == [b""] * 60


def test_a_client_that_does_not_take_its_response_is_dropped(reader: FakeReader) -> None:
    batching = dataclasses.replace(BATCHING, max_queue_characters=10**7)
    service = make_service(reader, batching, receive_seconds=0.3, max_context_characters=400_000)
    context = "a " + "x" * 390_000
    body = json.dumps({"questions": ["after a"] * 20, "context": context}).encode()
    with served(service) as address, connection(address) as client:
        client.sendall(HEAD + LENGTH % len(body) + body)
        # 8 MB that nobody reads are more than the buffers of the connection take; when the server has dropped the
        # client, it answers and ends without it.
        assert is_well(address)
        _wait_until(lambda: _count(address) == 0)
        assert 0 < len(received_by(client)) < 7_800_000


def _count(address: str) -> int:
    """Connections that the server holds."""
    import psutil

    port = int(address.rstrip("/").rpartition(":")[2])
    found = psutil.Process().net_connections("tcp")
    return sum(each.laddr.port == port and each.status == "ESTABLISHED" for each in found)


def _wait_until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.02)
    pytest.fail("it did not come to this")


def test_what_a_client_asked_that_has_gone_is_not_computed(reader: FakeReader) -> None:
    reached, goes_on = threading.Event(), threading.Event()

    def wait(questions: list[Question]) -> None:
        reached.set()
        assert goes_on.wait(20)

    service = make_service(reader)
    with served(service) as address:
        reader.hook = wait
        with connection(address) as first, connection(address) as gone:
            first.sendall(WHOLE)
            assert reached.wait(20)
            reader.chunks.clear()
            gone.sendall(WHOLE.replace(b"after a", b"after z"))
            _wait_until(lambda: service.worker.num_waiting_requests == 1)
            gone.close()
            _wait_until(lambda: service.worker.num_waiting_requests == 0)
            reader.hook = lambda questions: None
            goes_on.set()
            assert statuses(first.recv(65536)) == [200]
    assert reader.chunks == []


def test_more_connections_than_allowed_are_refused(reader: FakeReader) -> None:
    with served(make_service(reader, max_connections=5)) as address:
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(connection(address))
            assert statuses(talk(address, LAST)) == [200], "the fifth of five"
            stack.enter_context(connection(address))
            _wait_until(lambda: statuses(talk(address, LAST)) == [503])
        _wait_until(lambda: statuses(talk(address, LAST)) == [200])
