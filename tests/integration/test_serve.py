"""`qa-dist serve` as a process, with a real model: under load, and at its end; and `qa-dist ask` with that model."""

import asyncio
import io
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

import httpx2

from qa_dist import ask
from tests.support.load_server import STRANGE, many_at_once, one_at_a_time, questions_of_sample, serving, used
from tests.tiny import tiny_config, tiny_tokenizer

pytestmark = [pytest.mark.integration]

CLIENTS = 16
SECONDS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a question-answering model of random weights."""
    import torch
    from transformers import AutoModelForQuestionAnswering

    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    AutoModelForQuestionAnswering.from_config(tiny_config("bert", len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[tuple[Any, str]]:
    options = ("--device", "cpu", "--receive_timeout", "2", "--max_queue_requests", "8")
    with serving(str(model), *options) as (process, address):
        yield process, address


def test_many_clients_and_strange_ones_beside_them(server: tuple[Any, str]) -> None:
    process, address = server
    pairs = questions_of_sample(24)
    alone, scores = asyncio.run(one_at_a_time(address, pairs, 0))
    assert (alone.statuses, alone.lost, alone.wrong) == ({200: len(pairs)}, [], [])
    before = used(psutil.Process(process.pid))
    seen, strange = asyncio.run(many_at_once(address, pairs, scores, CLIENTS, SECONDS))
    after = used(psutil.Process(process.pid))
    assert (seen.lost, seen.wrong) == ([], [])
    # A queue of eight is shorter than sixteen clients.
    assert set(seen.statuses) <= {200, 429}
    assert seen.statuses[200] > CLIENTS
    assert {kind.partition(":")[0] for kind in strange} == set(STRANGE)
    ends = {"no HTTP: 400", "no JSON: 400", "too long: 413", "slow head: closed", "slow body: 408", "gone: closed"}
    assert set(strange) == ends
    assert after["memory_mib"] < before["memory_mib"] + 64
    # Of the clients' connections some may not be closed yet.
    assert after["open_files"] <= before["open_files"] + CLIENTS + len(STRANGE)


def test_sigterm_answers_what_was_asked_and_ends(server: tuple[Any, str]) -> None:
    process, address = server
    # Each question is a batch of its own.
    pairs = questions_of_sample(24)
    context = "\n".join(dict.fromkeys(pair["context"] for pair in pairs)) * 4
    body = {"questions": [pair["question"] for pair in pairs], "context": context}

    async def end() -> httpx2.Response:
        async with httpx2.AsyncClient(base_url=address, timeout=60) as client:
            asked = asyncio.create_task(client.post("/answer", json=body))
            while "qa_dist_waiting_requests 1.0" not in (await client.get("/metrics")).text:
                assert not asked.done()
            # Some of its questions have not been begun.
            process.send_signal(signal.SIGTERM)
            return await asked

    response = asyncio.run(end())
    assert response.status_code == 200
    assert len(response.json()["answers"]) == len(pairs)
    assert process.wait(30) == 0
    assert process.stderr.read() == ""


def test_ask_in_a_pipe_gives_the_answers_of_the_reader(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import qa_dist

    pairs = questions_of_sample(3)
    context = pairs[0]["context"]
    (tmp_path / "page.txt").write_text(context, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{pair['question']}\n" for pair in pairs)))
    assert ask.main([str(model), "--context_file", str(tmp_path / "page.txt"), "--device", "cpu"]) == 0
    reader = qa_dist.Reader(model, device="cpu")
    expected = [reader.answer(pair["question"], context).text for pair in pairs]
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == expected
