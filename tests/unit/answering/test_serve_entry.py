"""`qa-dist serve`: what is wrong is said at once, before the model is loaded."""

import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from qa_dist import serve
from qa_dist.answering.options import ReaderConfig
from qa_dist.answering.reader import Reader
from qa_dist.answering.records import Question
from qa_dist.answering.server import process
from tests.refusals import refusal


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: ReaderConfig) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(ReaderConfig, "open", load)


def test_a_port_in_use(capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = refusal(serve.main, ["any-model", "--port", port], capsys)
    assert message == (
        f"--host 127.0.0.1 --port {port} cannot be used: Address already in use; choose another port, or 0 for a "
        "free one"
    )


def test_a_second_server_that_starts_while_the_first_one_loads_is_refused(capsys: Any) -> None:
    with process.listen("127.0.0.1", 0) as listening:
        port = str(listening.getsockname()[1])
        assert "in use" in refusal(serve.main, ["any-model", "--port", port], capsys)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "--model is missing"),
        (["any-model", "--host", "203.0.113.7", "--port", "0"], "cannot be used: Cannot assign"),
        (["any-model", "--host", "no such host"], "--host no such host is no address of this machine"),
        (["any-model", "--host", "127..0.0.1"], "--host 127..0.0.1 is no address of this machine"),
        (["m", "--allow_no_answer", "false", "--null_score_diff_threshold", "2"], "and --allow_no_answer is false"),
        (["any-model", "--port", "70000"], "--port 70000"),
        (["any-model", "--api_key_file", "nothing"], "nothing does not exist"),
        (["any-model", "--max_body_bytes", "2000"], "cannot hold a text of"),
        (["any-model", "--request_timeout", "0"], "--request_timeout"),
        (["any-model", "--allowed_hosts", "example.com:8443"], "--allowed_hosts example.com:8443 is no name of a host"),
        (["any-model", "--allowed_hosts", "a.org,http://y.org"], "--allowed_hosts http://y.org is no name of a host"),
        (["any-model", "--allowed_hosts", "*.example.com"], "--allowed_hosts *.example.com is no name of a host"),
        (["any-model", "--allowed_hosts", "::1"], "--allowed_hosts ::1 is no name of a host"),
        (["any-model", "--prot", "1"], "did you mean --port"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(words: list[str], part: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert part in refusal(serve.main, words, capsys)


def test_of_a_question_that_is_too_long_clients_hear_of_no_option(trained: Path) -> None:
    served = serve._Served(Reader(trained / "adapter", device="cpu"))
    assert served.problem(Question.of("amber " * 50, "amber basin")) == (
        "the question has 50 tokens; at most 39 are allowed here"
    )
    assert served.problem(Question.of("amber " * 39, "amber basin")) is None


def test_names_of_hosts_that_are_taken() -> None:
    config = serve.ServeConfig(model="any-model", allowed_hosts=("qa.example", "localhost", "[::1]", "10.0.0.7"))
    assert list(config.problems()) == []


def test_a_package_that_is_missing(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PACKAGES", ("fastapi", "no_such_package"))
    message = refusal(serve.main, ["any-model", "--port", "0"], capsys)
    assert message == ("qa-dist serve needs no_such_package; install what it needs with: pip install 'qa-dist[serve]'")


def test_only_this_machine_is_listened_to_unless_said_otherwise() -> None:
    config = serve.ServeConfig(model="any-model")
    with process.listen(config.host, 0) as listening:
        assert process.is_loopback(listening)
        assert process.host_names(listening, config.host, ()) == ("localhost", "127.0.0.1", "[::1]", "127.0.0.1")
    with process.listen("0.0.0.0", 0) as listening:
        assert not process.is_loopback(listening)
        assert process.host_names(listening, "0.0.0.0", ()) == ()
        assert process.host_names(listening, "0.0.0.0", ("qa.example",))[-1] == "qa.example"
