"""Many clients at a server, and strange ones beside them: every request answered or refused, none lost.

    python -m tests.support.load_server outputs/mine --clients 64 --seconds 120

starts `qa-dist serve` on a free port of this machine, asks questions of the embedded sample, at first one after the
other and then by many clients at once, and prints what was measured as JSON: latencies, questions/s, and memory and
open files of the server before and after.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import psutil

from tests.distributed.launching import environment

ENOUGH_TO_START_SECONDS = 120
Pair = dict[str, str]


@contextlib.contextmanager
def serving(model: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its address; it gets SIGTERM at the end, if it still runs."""
    words = [sys.executable, "-m", "qa_dist.serve", model, "--port", "0", *options]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    try:
        said = ""
        for line in process.stderr:
            said += line
            if " answers at " in line:
                yield process, line.split()[-1]
                break
        else:
            raise RuntimeError(f"the server did not start: {said}")
    finally:
        process.terminate()
        process.wait(60)
        process.stderr.close()


def questions_of_sample(number: int) -> list[Pair]:
    """Questions of the sample that travels with the package, with their texts."""
    from qa_dist.config.options import DataConfig
    from qa_dist.data.sources import load_examples

    examples, _, _ = load_examples(DataConfig(dataset_name="sample", max_eval_samples=number), "validation")
    return [{"question": example.question, "context": example.context} for example in examples]


@dataclass(slots=True)
class Seen:
    """What clients saw.

    Attributes:
        statuses: number of responses by status.
        seconds: time of each answer that came, by the clock of its client.
        lost: requests that got no response, and why.
        wrong: answers that are not those of the question.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[Any] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """Seconds within which this share of the answers came."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def ask(client: httpx2.AsyncClient, pair: Pair, expected: float | None, seen: Seen) -> float | None:
    """Ask once; returns the score of the answer, None if there is none.

    Args:
        client: Asks.
        pair: Question and text.
        expected: The score that this question has had, if that is known; batches may move its last digits.
        seen: Gets what was seen.
    """
    began = time.perf_counter()
    try:
        response = await client.post("/answer", json=pair)
    except httpx2.HTTPError as error:
        seen.lost.append(repr(error))
        return None
    seen.statuses[response.status_code] += 1
    if response.status_code != 200:
        # What was refused for a while asks again a little later.
        await asyncio.sleep(min(1.0, float(response.headers.get("Retry-After", "0"))))
        return None
    seen.seconds.append(time.perf_counter() - began)
    (answer,) = response.json()["answers"]
    stands = answer["is_no_answer"] or answer["text"] == pair["context"][answer["start_char"] : answer["end_char"]]
    if not stands or (expected is not None and abs(answer["score"] - expected) > 1e-3 * max(1.0, abs(expected))):
        seen.wrong.append((pair, answer, expected))
    return float(answer["score"])


async def one_at_a_time(address: str, pairs: Sequence[Pair], seconds: float) -> tuple[Seen, list[float]]:
    """Ask every question once at least, and on until the time is over; the scores of the first round come with it."""
    seen, scores = Seen(), []
    end = time.perf_counter() + seconds
    async with httpx2.AsyncClient(base_url=address, timeout=60) as client:
        number = 0
        while number < len(pairs) or time.perf_counter() < end:
            score = await ask(client, pairs[number % len(pairs)], None, seen)
            if number < len(pairs):
                assert score is not None, seen
                scores.append(score)
            number += 1
    return seen, scores


async def many_at_once(
    address: str, pairs: Sequence[Pair], scores: Sequence[float], num_clients: int, seconds: float
) -> tuple[Seen, Counter[str]]:
    """What usual clients saw, who ask one question after the other, and how the strange ones beside them ended."""
    seen = Seen()
    strange: Counter[str] = Counter()
    end = time.perf_counter() + seconds

    async def usual(client: httpx2.AsyncClient, number: int) -> None:
        while time.perf_counter() < end:
            number = (number + 1) % len(pairs)
            await ask(client, pairs[number], scores[number], seen)

    async def odd(kind: str) -> None:
        while time.perf_counter() < end:
            strange[f"{kind}: {await _strange(address, kind)}"] += 1
            await asyncio.sleep(1)

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
        usual_ones = [usual(client, 7 * number) for number in range(num_clients)]
        await asyncio.gather(*usual_ones, *(odd(kind) for kind in STRANGE))
    return seen, strange


_POST = b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
STRANGE = {
    "no HTTP": b"\x00\xff" * 100 + b"\r\n\r\n",
    "no JSON": _POST + b"Content-Length: 9\r\nConnection: close\r\n\r\n{'a': 'b'",
    "too long": _POST + b"Content-Length: 2000000\r\n\r\n" + b" " * 2_000_000,
    "slow head": _POST,
    "slow body": _POST + b"Content-Length: 100\r\n\r\n{",
    "gone": _POST + b'Content-Length: 44\r\n\r\n{"question": "Who?", "context": "Ann and Bo."}',
}
"""What strange clients send, by kind."""


async def _strange(address: str, kind: str) -> str:
    """How a connection ends on which one of these is sent: with a status, or closed without one."""
    host, _, port = address.removeprefix("http://").strip("/").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(STRANGE[kind])
        await writer.drain()
        received = b"" if kind == "gone" else await reader.read(65536)
    except ConnectionError:
        received = b""
    finally:
        writer.close()
    return received.split(b" ")[1].decode() if received else "closed"


def latencies(seen: Seen) -> dict[str, float]:
    """Half of the answers came within `p50_ms` milliseconds, and so on."""
    return {f"p{share}_ms": round(1000 * seen.quantile(share / 100), 1) for share in (50, 90, 99)}


def cpu_seconds(process: psutil.Process) -> float:
    """Seconds of processors that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def used(process: psutil.Process) -> dict[str, float]:
    """Memory in MiB, and open files, of a process."""
    return {"memory_mib": round(process.memory_info().rss / 2**20, 1), "open_files": process.num_fds()}


@contextlib.contextmanager
def watched(process: psutil.Process) -> Iterator[list[float]]:
    """Memory of a process in MiB, every five seconds of the block."""
    seen: list[float] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(5):
            seen.append(used(process)["memory_mib"])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.support.load_server", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--alone_seconds", type=float, default=20)
    options = parser.parse_args(argv)
    pairs = questions_of_sample(200)
    with serving(options.model, "--device", "cpu", "--receive_timeout", "3") as (process, address):
        server = psutil.Process(process.pid)
        began, cpu = time.perf_counter(), cpu_seconds(server)
        alone, scores = asyncio.run(one_at_a_time(address, pairs, options.alone_seconds))
        alone_rate = len(alone.seconds) / (time.perf_counter() - began)
        alone_cost = {"cpu_ms_per_question": round(1000 * (cpu_seconds(server) - cpu) / len(alone.seconds), 1)}
        # The first seconds under load make room for batches of their size.
        asyncio.run(many_at_once(address, pairs, scores, options.clients, min(10.0, options.seconds)))
        before = used(server)
        began, cpu = time.perf_counter(), cpu_seconds(server)
        with watched(server) as memory:
            seen, strange = asyncio.run(many_at_once(address, pairs, scores, options.clients, options.seconds))
        rate = len(seen.seconds) / (time.perf_counter() - began)
        cost = {"cpu_ms_per_question": round(1000 * (cpu_seconds(server) - cpu) / len(seen.seconds), 1)}
        after = used(server)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    found = {
        "clients": options.clients,
        "seconds": options.seconds,
        "one_at_a_time": {"questions_per_second": round(alone_rate, 1), **latencies(alone), **alone_cost},
        "together": {"questions_per_second": round(rate, 1), **latencies(seen), **cost},
        "statuses": dict(seen.statuses),
        "lost": seen.lost,
        "wrong": seen.wrong[:5],
        "strange": dict(sorted(strange.items())),
        "before": before,
        "after": after,
        "memory_mib": memory,
        "exit_code": code,
    }
    print(json.dumps(found, indent=2))
    return int(bool(seen.lost or seen.wrong or code))


if __name__ == "__main__":
    sys.exit(main())
