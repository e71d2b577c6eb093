"""The application through ASGI: requests, answers, limits, keys, and that a text stays a text."""

import asyncio
import contextlib
import dataclasses
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from qa_dist.answering.records import Answer, Question
from qa_dist.answering.server.app import PATHS, Service, make_app
from qa_dist.answering.server.messages import AnswerResponse
from qa_dist.common.errors import UserError
from tests.unit.answering.fake_reader import BATCHING, FakeReader, make_service
from tests.unit.answering.xss import CORPUS

TEXT = "alpha beta gamma. alpha delta epsilon."
KEY = "correct-horse-battery"
Scenario = Callable[[httpx2.AsyncClient], Awaitable[Any]]


@pytest.fixture
def reader() -> FakeReader:
    return FakeReader()


@contextlib.contextmanager
def running(service: Service) -> Iterator[None]:
    service.worker.start()
    try:
        yield
    finally:
        assert service.worker.close(20)


def through(service: Service, scenario: Scenario, *, hosts: tuple[str, ...] = ()) -> Any:
    """What a scenario returns that talks to the application of a service."""

    async def run() -> Any:
        app = make_app(service, hosts=hosts, close_seconds=10)
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://qa.example") as client:
            return await scenario(client)

    with running(service):
        return asyncio.run(run())


def post(service: Service, value: Any = None, **options: Any) -> httpx2.Response:
    """The response to one request."""
    given = {"content": json.dumps(value), "headers": {"Content-Type": "application/json"}, **options}
    response: httpx2.Response = through(service, lambda client: client.post("/answer", **given))
    return response


def refused(response: httpx2.Response, status: int) -> str:
    """The sentence of an error."""
    assert response.status_code == status, response.text
    (sentence,) = response.json().values()
    assert response.headers["content-type"] == "application/json"
    assert 15 < len(sentence) < 300
    assert "\n" not in sentence
    return str(sentence)


# ----------------------------------------------------------------------------------------------------------- answers


def test_one_question_about_a_text(reader: FakeReader) -> None:
    response = post(make_service(reader), {"question": "after beta", "context": TEXT})
    assert response.status_code == 200
    found = {"text": "gamma. alpha", "start_char": 11, "end_char": 23, "score": 5.0, "probability": 0.5}
    found |= {"is_no_answer": False, "no_answer_odds": -2.5, "context_index": 0}
    assert response.json() == {"answers": [found]}
    assert list(response.json()["answers"][0]) == list(Answer.__slots__)
    AnswerResponse.model_validate(response.json(), strict=True)


def test_the_best_answers_are_in_nbest(reader: FakeReader) -> None:
    response = post(make_service(reader), {"question": "after alpha", "contexts": ["beta", TEXT], "top_k": 5})
    (answer,) = response.json()["answers"]
    assert [each["text"] for each in answer["nbest"]] == ["beta gamma.", "delta epsilon."]
    assert {name: answer[name] for name in answer["nbest"][0]} == answer["nbest"][0]
    assert answer["context_index"] == 1
    AnswerResponse.model_validate(response.json(), strict=True)


@pytest.mark.parametrize(
    ("value", "questions"),
    [
        ({"question": "a", "contexts": ["x", "y"]}, [Question("a", ("x", "y"))]),
        ({"questions": ["a", "b"], "context": "x"}, [Question("a", ("x",)), Question("b", ("x",))]),
        ({"questions": ["a", "b"], "contexts": ["x", "y"]}, [Question("a", ("x",)), Question("b", ("y",))]),
    ],
    ids=["passages", "one text", "pairs"],
)
def test_many_questions_and_texts(reader: FakeReader, value: Any, questions: list[Question]) -> None:
    response = post(make_service(reader), value)
    assert [question for chunk in reader.chunks for question in chunk] == questions
    assert [answer["is_no_answer"] for answer in response.json()["answers"]] == [True] * len(questions)


def test_requests_of_many_clients_share_a_batch(reader: FakeReader) -> None:
    batching = dataclasses.replace(BATCHING, batch_characters=40 * 19, batch_wait_seconds=60.0)

    async def scenario(client: httpx2.AsyncClient) -> list[str]:
        headers = {"Content-Type": "application/json"}
        bodies = [json.dumps({"question": "after a", "context": f"a b{number:02} cdefgh"}) for number in range(40)]
        responses = await asyncio.gather(*(client.post("/answer", content=body, headers=headers) for body in bodies))
        return [response.json()["answers"][0]["text"] for response in responses]

    assert through(make_service(reader, batching), scenario) == [f"b{number:02} cdefgh" for number in range(40)]
    # Nobody waited for a minute: the batch was full.
    assert sum(map(len, reader.chunks)) == 40
    assert len(reader.chunks) == 1


# ------------------------------------------------------------------------------------------------------------- limits

REFUSED: list[tuple[Any, int, str]] = [
    (["q"], 422, "the body is a list"),
    ({"question": "a"}, 422, 'either "context"'),
    ({"context": "a"}, 422, 'either "question"'),
    ({"question": "a", "questions": ["a"], "context": "x"}, 422, 'either "question"'),
    ({"question": "a", "context": "x", "contexts": ["x"]}, 422, 'either "context"'),
    ({"question": 7, "context": "x"}, 422, '"question" is a number; "question" must be a string'),
    ({"question": "a", "context": ["x"]}, 422, '"context" is a list'),
    ({"questions": "a", "context": "x"}, 422, '"questions" is a string; "questions" must be a list of strings'),
    ({"questions": ["a", True], "context": "x"}, 422, 'item 1 of "questions" is true or false'),
    ({"questions": [], "context": "x"}, 422, '"questions" is empty'),
    ({"questions": ["a", "b", "c"], "contexts": ["x", "y"]}, 422, "3 items"),
    ({"question": "a", "context": "x", "topk": 3}, 422, '"topk" is no key of a request; the keys are question'),
    ({"question": "a", "context": "x", "<script>alert(1)</script>": 1}, 422, "is no key of a request"),
    ({"question": "a", "context": "x", "top_k": 0}, 422, '"top_k" is 0'),
    ({"question": "a", "context": "x", "top_k": 2.5}, 422, '"top_k" is 2.5; "top_k" must be a whole number'),
    ({"question": "a", "context": "x", "top_k": "3"}, 422, '"top_k" is a string'),
    ({"question": "a", "context": "x", "top_k": 21}, 422, "at most 20"),
    ({"question": "a", "context": " \n\t"}, 422, '"context" is nothing but blanks'),
    ({"question": "", "context": "x"}, 422, '"question" is empty'),
    ({"questions": ["a", " "], "context": "x"}, 422, 'item 1 of "questions" is nothing but blanks'),
    ({"question": "a", "context": "x\ud800y"}, 422, "half of a surrogate pair at character 1"),
    ({"question": "a", "context": "x" * 501}, 413, "501 characters; at most 500"),
    ({"question": "a", "contexts": ["x", "y" * 501]}, 413, 'item 1 of "contexts" has 501 characters'),
    ({"questions": ["a"] * 5, "context": "x"}, 413, "5 items; at most 4"),
    ({"questions": [1] * 100_000, "context": "x"}, 413, "100000 items; at most 4"),
    ({str(number): 1 for number in range(50_000)}, 422, '"0" is no key of a request'),
    ({"\ud800": 1}, 422, '"\\ud800" is no key of a request'),
    ({"question": "refuse me", "context": "x"}, 422, "one that this reader refuses"),
    ({"questions": ["after x", "refuse me"], "context": "x y"}, 422, 'item 1 of "questions": the question is one'),
]


@pytest.mark.parametrize(("value", "status", "part"), REFUSED, ids=[part for _, _, part in REFUSED])
def test_what_is_no_request_gets_a_sentence(reader: FakeReader, value: Any, status: int, part: str) -> None:
    service = make_service(reader, max_context_characters=500, max_questions=4)
    assert part in refused(post(service, value), status)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "not JSON"),
        (b'{"question": "a", ', "not JSON"),
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
        (b'{"question": "a", "question": "b", "context": "x"}', "more than once"),
        (b"[" * 9000, "nested too deeply"),
        (b"9" * 9000, "thousands of digits"),
    ],
)
def test_what_is_no_json_gets_a_sentence(reader: FakeReader, body: bytes, part: str) -> None:
    assert part in refused(post(make_service(reader), content=body), 400)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/jsonp"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
    ids=str,
)
def test_other_content_types_are_refused(reader: FakeReader, headers: dict[str, str]) -> None:
    content = json.dumps({"question": "a", "context": "x"})
    refused(post(make_service(reader), content=content, headers=headers), 415)
    assert reader.chunks == []


class Parts:
    """A body in parts without a length, as chunked requests are; counts how many were read."""

    def __init__(self, size: int, number: int, *, then_waits: bool = False) -> None:
        self.size, self.number, self.then_waits, self.num_read = size, number, then_waits, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self.number):
            self.num_read += 1
            yield b" " * self.size
        if self.then_waits:
            await asyncio.Event().wait()


def test_a_long_body_is_refused_with_and_without_a_length(reader: FakeReader) -> None:
    service = make_service(reader, max_body_bytes=1000, max_context_characters=100)
    assert "longer than 1,000 bytes" in refused(post(service, {"question": "a", "context": "x" * 1000}), 413)
    for number, at_most in ((11, 11), (1000, 82)):
        parts = Parts(100, number)
        refused(post(make_service(reader, max_body_bytes=1000), content=parts), 413)
        # What a little too long is read to its end, so that its client sees the response; what is endless is not.
        assert parts.num_read <= at_most
    assert reader.chunks == []


def test_a_body_that_does_not_end_is_refused(reader: FakeReader) -> None:
    service = make_service(reader, receive_seconds=0.05)
    assert "0.05 s" in refused(post(service, content=Parts(10, 2, then_waits=True)), 408)


def test_a_body_that_came_while_the_server_stood_still_is_read(reader: FakeReader) -> None:
    whole = json.dumps({"question": "after a", "context": "a b c"}).encode()

    async def parts() -> AsyncIterator[bytes]:
        """The second part is there when the loop goes on, later than the limit: a busy machine, not a slow client."""
        yield whole[:10]
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            arrived = asyncio.Event()
            loop.add_reader(ours, arrived.set)
            loop.call_soon(lambda: (time.sleep(0.2), theirs.send(b"!")))
            await arrived.wait()
            loop.remove_reader(ours)
        yield whole[10:]

    response = post(make_service(reader, receive_seconds=0.05), content=parts())
    assert response.status_code == 200
    assert response.json()["answers"][0]["text"] == "b c"


def test_a_full_queue_is_said_with_a_time(reader: FakeReader) -> None:
    batching = dataclasses.replace(BATCHING, batch_characters=10**6, batch_wait_seconds=3600, max_queue_requests=1)
    service = make_service(reader, batching, request_seconds=0.2)

    async def scenario(client: httpx2.AsyncClient) -> list[httpx2.Response]:
        given: Any = {"json": {"question": "a", "context": "x"}}
        return await asyncio.gather(*(client.post("/answer", **given) for _ in range(3)))

    responses = sorted(through(service, scenario), key=lambda response: int(response.status_code))
    assert [response.status_code for response in responses] == [429, 429, 503]
    assert all("too much waits" in refused(response, 429) for response in responses[:2])
    assert all(int(response.headers["retry-after"]) >= 1 for response in responses)
    # It was given up, and is not computed when the server ends.
    assert reader.chunks == []


def test_a_request_does_not_wait_for_ever_for_a_device_that_hangs(reader: FakeReader) -> None:
    import threading

    goes_on = threading.Event()
    reader.hook = lambda questions: goes_on.wait(20) and None
    service = make_service(reader, request_seconds=0.1)

    async def scenario(client: httpx2.AsyncClient) -> tuple[httpx2.Response, ...]:
        answer = await client.post("/answer", json={"question": "a", "context": "x"})
        await asyncio.sleep(0.4)
        health = await client.get("/health")
        goes_on.set()
        return answer, health

    answer, health = through(service, scenario)
    assert "longer than 0.1 s" in refused(answer, 504)
    assert (health.status_code, health.json()["status"]) == (503, "the device does not answer")


def test_a_server_of_which_every_question_fails_is_not_healthy(reader: FakeReader) -> None:
    async def scenario(client: httpx2.AsyncClient) -> list[int]:
        statuses = []
        for number in range(18):
            question = "break" if number < 17 else "after x"
            await client.post("/answer", json={"question": question, "context": "x y"})
            statuses.append((await client.get("/health")).status_code)
        return statuses

    assert through(make_service(reader), scenario) == [*[200] * 15, 503, 503, 200]


def test_a_failure_inside_is_an_error_without_details(reader: FakeReader, caplog: pytest.LogCaptureFixture) -> None:
    response = post(make_service(reader), {"question": "break", "context": "a private matter"})
    assert "its log says more" in refused(response, 500)
    assert "RuntimeError" in caplog.text
    assert "fake_reader.py" in caplog.text
    assert "private" not in caplog.text


# --------------------------------------------------------------------------------------------------------- other paths


def test_keys(reader: FakeReader, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(client: httpx2.AsyncClient) -> None:
        async def ask(path: str, header: str | None) -> int:
            headers = {} if header is None else {"Authorization": header.encode()}
            if path == "/answer":
                response = await client.post(path, json={"question": "a", "context": "x"}, headers=headers)
            else:
                response = await client.get(path, headers=headers)
            assert KEY not in response.text
            if response.status_code == 401:
                assert response.headers["www-authenticate"] == "Bearer"
                refused(response, 401)
            return int(response.status_code)

        wrong = (None, "", KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer kéy")
        for path in ("/answer", "/metrics"):
            assert [await ask(path, header) for header in wrong] == [401] * len(wrong)
            assert [await ask(path, f"{scheme} {KEY}") for scheme in ("Bearer", "bearer")] == [200, 200]
        assert [await ask(path, None) for path in ("/", "/health", "/docs")] == [200] * 3

    through(make_service(reader, keys=[b"another-key-of-old", KEY.encode()]), scenario)
    assert KEY not in caplog.text


def test_every_response_forbids_a_browser_what_it_does_not_need(reader: FakeReader) -> None:
    async def scenario(client: httpx2.AsyncClient) -> list[httpx2.Response]:
        return [await client.get(path) for path in (*PATHS, "/nothing", "/../../etc/passwd")]

    for response in through(make_service(reader), scenario):
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in response.headers
        if response.status_code in (404, 405):
            refused(response, response.status_code)
    # A form or script of another site cannot send JSON without being allowed to, and is not.
    preflight = through(make_service(reader), lambda client: client.options("/answer", headers={"Origin": "http://x"}))
    assert preflight.status_code == 405


def test_the_pages_load_nothing_from_elsewhere(reader: FakeReader) -> None:
    async def scenario(client: httpx2.AsyncClient) -> list[httpx2.Response]:
        return [await client.get(path) for path in ("/", "/docs")]

    for page in through(make_service(reader), scenario):
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        # Namespaces are names, not addresses.
        text = page.text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//\w", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\bstyle=|\son\w+=", text)


def test_names_of_hosts(reader: FakeReader) -> None:
    async def scenario(client: httpx2.AsyncClient) -> list[int]:
        names = (
            "localhost:8000",
            "LOCALHOST",
            "[::1]:80",
            "127.0.0.1:8000",
            "evil.example",
            "127.0.0.1.evil.example",
            "",
        )
        return [(await client.get("/health", headers={"Host": name})).status_code for name in names]

    hosts = ("localhost", "127.0.0.1", "[::1]")
    assert through(make_service(reader), scenario, hosts=hosts) == [200, 200, 200, 200, 421, 421, 421]


def test_health_names_the_limits(reader: FakeReader) -> None:
    response = through(make_service(reader, max_questions=7), lambda client: client.get("/health"))
    assert response.json()["status"] == "ok"
    assert response.json()["limits"]["max_questions"] == 7


def test_metrics(reader: FakeReader) -> None:
    async def scenario(client: httpx2.AsyncClient) -> str:
        for value in ({"questions": ["a", "b"], "context": "x"}, {"question": "a"}):
            await client.post("/answer", json=value)
        await client.get("/secret-path")
        return str((await client.get("/metrics")).text)

    families = {
        family.name: family for family in text_string_to_metric_families(through(make_service(reader), scenario))
    }
    counted = {
        (sample.labels["path"], sample.labels["status"]): sample.value
        for sample in families["qa_dist_requests"].samples
        if sample.name.endswith("_total")
    }
    assert counted == {("/answer", "200"): 1, ("/answer", "422"): 1, ("other", "404"): 1}
    questions = {sample.name: sample.value for sample in families["qa_dist_batch_questions"].samples}
    assert questions["qa_dist_batch_questions_sum"] == 2
    assert {"process_resident_memory_bytes", "process_open_fds", "qa_dist_waiting_requests"} <= set(families)


def test_openapi_describes_what_is_sent(reader: FakeReader) -> None:
    api = through(make_service(reader), lambda client: client.get("/openapi.json")).json()
    assert set(api["paths"]) == {"/answer", "/health", "/metrics"}
    body = api["paths"]["/answer"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {"question", "context", "questions", "contexts", "top_k"}
    assert set(api["components"]["schemas"]["AnswerRecord"]["required"]) == set(Answer.__slots__)
    assert {"413", "415", "429", "503"} <= set(api["paths"]["/answer"]["post"]["responses"])


# ------------------------------------------------------------------------------------------------------- text is text


@pytest.mark.parametrize("text", CORPUS)
def test_markup_in_texts_comes_back_as_json_and_nothing_else(reader: FakeReader, text: str) -> None:
    context = f"behold {text} end"
    response = post(make_service(reader), {"question": "after behold", "context": context, "top_k": 2})
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"
    (answer,) = response.json()["answers"]
    assert context[answer["start_char"] : answer["end_char"]] == answer["text"] != ""
    refusal = post(make_service(reader), {"question": "a", "context": "x", text: 1})
    assert refused(refusal, 422)


def test_a_key_file_is_checked_when_the_server_starts(tmp_path: Any) -> None:
    from qa_dist.answering.server.process import read_keys

    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n\n another-key-of-old \n")
    assert read_keys(str(path)) == [KEY.encode(), b"another-key-of-old"]
    wrong = {b"": "is empty", b" \n": "is empty", b"short": "line 1", KEY.encode() + b"\nwith a blank in it": "line 2"}
    wrong |= {"schlüssel-mit-umlaut".encode(): "line 1", b"\xff" * 20: "not UTF-8"}
    for content, part in wrong.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=part) as error:
            read_keys(str(path))
        assert "blank in it" not in str(error.value)
    for unreadable, part in ((tmp_path / "none", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=f"{re.escape(str(unreadable))} {part}"):
            read_keys(str(unreadable))
