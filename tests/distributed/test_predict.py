"""Files of answers are the same bytes at any number of ranks, and however often a run is killed or stopped.

The runs are real ones, of a tiny model, forked from a server (see `forking`). `QA_DIST_KILLS` sets how often the random
kills strike, and `QA_DIST_SEED` when.
"""

import json
import math
import os
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.distributed.forking import Group, call_main, start_ranks
from tests.tiny import tiny_config, tiny_squad, tiny_tokenizer

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3000)]

NUM_KILLS = int(os.environ.get("QA_DIST_KILLS", "3"))
SEED = int(os.environ.get("QA_DIST_SEED", "0"))
NUM_QUESTIONS = 90
PER_CHUNK = 3


class Predictions:
    """Starts runs of one command, and keeps the answers of the uninterrupted one."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForQuestionAnswering

        self.folder = folder
        tokenizer = tiny_tokenizer()
        torch.manual_seed(0)
        model = AutoModelForQuestionAnswering.from_config(tiny_config("bert", len(tokenizer), 1))
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        squad = json.loads(tiny_squad(folder / "squad.json", NUM_QUESTIONS, seed=1, longest=40).read_text())
        rows = [
            {"id": qa["id"], "question": qa["question"], "context": paragraph["context"], "answers": qa["answers"]}
            for article in squad["data"]
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
        # Several windows, and several passages.
        rows[7]["context"] = " ".join(row["context"] for row in rows[:30])
        rows[8]["context"] = [row["context"] for row in rows[:5]]
        self.questions = folder / "questions.jsonl"
        self.questions.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")

    def start(self, output: Path, num_processes: int, *more: str) -> Group:
        options = {
            "model": self.folder / "model",
            "input_file": self.questions,
            "output_file": output,
            "max_seq_length": 64,
            "doc_stride": 16,
            "questions_per_chunk": PER_CHUNK,
            "top_k": 2,
            "disable_tqdm": "true",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        body = partial(call_main, "qa_dist.predict", [*words, *more])
        return start_ranks(body, output.with_suffix(".log"), num_processes=num_processes)

    def finish(self, output: Path, num_processes: int, *more: str) -> bytes:
        group = self.start(output, num_processes, *more)
        assert group.wait() == [0] * num_processes, group.text()[-4000:]
        return output.read_bytes()


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: pytest.TempPathFactory) -> Predictions:
    return Predictions(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="module")
def whole(predictions: Predictions) -> bytes:
    """The answers of one uninterrupted process."""
    return predictions.finish(predictions.folder / "whole.jsonl", 1)


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_any_number_of_ranks_writes_the_same_bytes(
    predictions: Predictions, whole: bytes, tmp_path: Path, num_processes: int
) -> None:
    assert [json.loads(line)["id"] for line in whole.splitlines()] == [f"q{n}" for n in range(NUM_QUESTIONS)]
    output = tmp_path / "answers.jsonl"
    assert predictions.finish(output, num_processes) == whole
    rank_0, alone = output.with_suffix(".log").read_text(), (predictions.folder / "whole.log").read_text()
    assert rank_0[rank_0.index("{") :] == alone[alone.index("{") :], "the scores"


def until_some_is_written(output: Path, group: Group, least: int = 1) -> None:
    """Come back when there are answers."""
    end = time.monotonic() + 60
    while not output.exists() or output.stat().st_size < least:
        assert time.monotonic() < end, group.text()
        time.sleep(0.005)


def instants(num_processes: int) -> Iterator[tuple[float, float]]:
    """Share of the answers that is waited for, and seconds after it."""
    random_ = random.Random(1000 * SEED + num_processes)
    while True:
        if random_.random() < 0.3:
            yield 0, random_.uniform(0, 2)
        else:
            yield random_.uniform(0.05, 0.95), random_.uniform(0, 0.02)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_at_random_instants(predictions: Predictions, whole: bytes, tmp_path: Path, num_processes: int) -> None:
    """SIGKILL to a random rank, again and again; the last run is left alone, with another number of ranks."""
    random_ = random.Random(SEED)
    kills, inside, number = 0, 0, 0
    for share, seconds in instants(num_processes):
        output = tmp_path / f"answers-{number}.jsonl"
        if kills >= NUM_KILLS:
            break
        group = predictions.start(output, num_processes)
        if share:
            before = output.stat().st_size if output.exists() else 0
            until_some_is_written(output, group, before + math.ceil(share * (len(whole) - before)))
        time.sleep(seconds)
        victim = group.ranks[random_.randrange(num_processes)]
        if victim.is_alive():
            victim.kill()
            kills += 1
        # One that had not met the other yet would wait for it.
        group.end(grace_seconds=2)
        size = output.stat().st_size if output.exists() else 0
        inside += 0 < size < len(whole)
        if size == len(whole):
            assert output.read_bytes() == whole
            number += 1
    assert predictions.finish(output, 3 - num_processes) == whole
    assert inside, "no kill struck between the first answer and the last"


def test_stopped_in_order_by_one_rank_and_gone_on_with_by_others(
    predictions: Predictions, whole: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    group = predictions.start(output, 2)
    until_some_is_written(output, group)
    os.kill(group.ranks[1].pid or 0, signal.SIGUSR1)
    assert group.wait() == [85, 85], group.text()
    assert "stopped by SIGUSR1 after" in group.text()
    assert "run the same command to go on behind them" in group.text()
    kept = output.read_bytes()
    assert whole.startswith(kept)
    assert kept.endswith(b"\n")
    assert kept.count(b"\n") % PER_CHUNK == 0
    assert predictions.finish(output, 1) == whole
    assert "going on behind" in output.with_suffix(".log").read_text()


def test_a_mistake_in_the_input_ends_all_ranks_with_one_sentence(
    predictions: Predictions, whole: bytes, tmp_path: Path
) -> None:
    lines = predictions.questions.read_text(encoding="utf-8").splitlines()
    bad = tmp_path / "questions.jsonl"
    bad.write_text("\n".join([*lines[:20], '{"question": "what?"}', *lines[20:]]), encoding="utf-8")
    output = tmp_path / "answers.jsonl"
    group = predictions.start(output, 2, "--input_file", str(bad))
    assert group.wait() == [2, 2]
    assert group.text().count("error: ") == 1
    assert "questions.jsonl, line 21: it has no question or no context" in group.text()
    assert output.read_bytes() == b"".join(whole.splitlines(keepends=True)[:18])
    bad.write_text("\n".join(lines), encoding="utf-8")
    assert predictions.finish(output, 2, "--input_file", str(bad)) == whole
    group = predictions.start(tmp_path / "none.jsonl", 2, "--input_file", "nowhere.jsonl")
    assert group.wait() == [2, 2]
    assert group.text().endswith("error: nowhere.jsonl does not exist; check the path\n")
