"""Methods, paths and names of hosts that a server of this machine has not, through a real socket."""

import http.client
import json
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from tests.unit.answering.fake_reader import FakeReader, make_service, served


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(make_service(FakeReader())) as address:
        yield address.removeprefix("http://").strip("/")


def said(address: str, method: str, path: str, **headers: str) -> tuple[int, bytes]:
    """Status and body of a response."""
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request(method, path, body="{}" if method == "POST" else None, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_a_slash_too_many_is_an_error_in_json(address: str) -> None:
    for path in ("/answer/", "/health/"):
        status, body = said(address, "POST" if "answer" in path else "GET", path)
        assert status == 404
        assert json.loads(body)["error"].startswith("there is nothing at this path; the paths are /, /answer,")


def test_what_watches_a_server_may_ask_for_the_head_alone(address: str) -> None:
    for path in ("/", "/health", "/docs"):
        assert said(address, "HEAD", path) == (200, b"")
        assert said(address, "GET", path)[0] == 200
    assert said(address, "HEAD", "/answer")[0] == 405
    paths = json.loads(said(address, "GET", "/openapi.json")[1])["paths"]
    assert list(paths["/health"]) == ["get"]


def test_who_calls_it_by_another_name_is_told_which(address: str) -> None:
    for host, told in (
        ("evil.example:81", "called evil.example, as the header"),
        ("x" * 999, f"called {'x' * 100}, as"),
    ):
        status, body = said(address, "GET", "/health", Host=host)
        assert status == 421
        assert told in json.loads(body)["error"]
    status, body = said(address, "GET", "/health", Host="")
    assert "called by an empty header Host" in json.loads(body)["error"]
