"""Nothing grows over many kills and resumes: `python -m tests.distributed.soak --minutes 20 --output soak.json`.

A tiny model is trained on two CPU ranks, with an evaluation and a checkpoint again and again: first without an
interruption, then the same run once more, and once more, each of whose lives ends with SIGKILL of a random rank at a
random instant and goes on from its newest checkpoint in the next life. Through all lives the resident set, open file
handles, threads and child processes of every rank are sampled.

Exit code 1 if a run that was killed does not end with the files of the uninterrupted one, results bit for bit, or if
something grows: within lives of some length (the last quarter of the samples against the first, after a warm-up), or
from life to life (at one age, the last quarter of the lives against the first). The same if the soak was too short to
tell.
"""

import argparse
import json
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from qa_dist.common.files import write_json
from qa_dist.machine.environment import git_commit, hardware, versions
from tests.distributed.forking import Group, start
from tests.tiny import tiny_model, tiny_squad

WORLD_SIZE = 2
BATCH = 4
STEPS_PER_EPOCH = 40
OPTIONS = {
    "max_seq_length": 64,
    "doc_stride": 16,
    "max_tokens_per_device": 256,
    "global_batch_size": BATCH,
    "model_dropout": 0.1,
    "checkpointing_steps": 25,
    "eval_steps": 200,
}
RESULTS = ("adapter_model.safetensors", "metrics.json", "predictions.json", "nbest.json", "metrics.jsonl")
SHORTEST_LIFE, LONGEST_LIFE = 0.5, 120.0
"""Seconds after which a rank is killed; drawn so that 1 to 2 s are as likely as 50 to 100 s."""
SECONDS_BETWEEN_SAMPLES = 0.5
WARM_UP_SAMPLES = 20
"""What imports, caches and first allocations of every size take is there by then."""
MIN_SAMPLES = 40
"""Lives with fewer behind their warm-up tell nothing about growth."""
MIN_LIVES = 4
"""Fewer that got through their warm-up tell nothing about growth from life to life."""
ALLOWED_GROWTH = {"rss_bytes": 0.01, "handles": 0.0, "threads": 0.0, "children": 0.0}
"""As a share of what was there. A resident set goes up and down a little with the heap's pages."""


@dataclass(slots=True)
class Life:
    """One start of a run, up to its end or a kill.

    Attributes:
        exit_codes: Of the ranks.
        killed: Whether it was struck.
        steps: Optimiser steps done in it.
        samples: For each kind of figure, a list per rank, of the samples taken while it trained.
    """

    exit_codes: list[int | None] = field(default_factory=list)
    killed: bool = False
    steps: int = 0
    samples: dict[str, list[list[int]]] = field(
        default_factory=lambda: {kind: [[] for _ in range(WORLD_SIZE)] for kind in ALLOWED_GROWTH}
    )

    @property
    def num_samples(self) -> int:
        """Samples of each rank."""
        return len(self.samples["rss_bytes"][-1])


class Soak:
    """The runs of one configuration, and all their lives."""

    def __init__(self, folder: Path, *, steps: int, seed: int) -> None:
        self.folder = folder
        options = {
            "model_name_or_path": tiny_model("bert", folder / "bert"),
            "train_file": tiny_squad(folder / "train.json", BATCH * STEPS_PER_EPOCH, seed=1, longest=40),
            "validation_file": tiny_squad(folder / "dev.json", 40, seed=2, longest=40),
            "store_dir": folder / "store",
            "num_train_epochs": math.ceil(steps / STEPS_PER_EPOCH),
            "max_train_steps": steps,
            **OPTIONS,
        }
        self.words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self.random = random.Random(seed)
        self.lives: list[Life] = []
        (folder / "tmp").mkdir()

    def live(self, output: Path, *, seconds: float) -> Life:
        """Start the run, or go on with it, and kill a rank after so long if it has not ended.

        Raises:
            RuntimeError: It ended by itself, and not well.
        """
        words = [*self.words, "--disable_tqdm", "--resume_from_checkpoint", "auto", "--output_dir", str(output)]
        environment = {"TMPDIR": str(self.folder / "tmp")}
        group = start(words, output.with_suffix(".log"), num_processes=WORLD_SIZE, environment=environment)
        life = Life()
        steps = _LineCount(output.with_suffix(".features.jsonl"))
        until = time.monotonic() + seconds
        while any(rank.is_alive() for rank in group.ranks) and time.monotonic() < until:
            time.sleep(min(SECONDS_BETWEEN_SAMPLES, max(0.0, until - time.monotonic())))
            life.steps += steps.new()
            if life.steps:
                _sample(group, life)
        if all(rank.is_alive() for rank in group.ranks):
            group.ranks[self.random.randrange(WORLD_SIZE)].kill()
            life.killed = True
        life.exit_codes = group.end()
        life.steps += steps.new()
        if not life.killed and life.exit_codes != [0] * WORLD_SIZE:
            raise RuntimeError(f"a run that was not killed ended with {life.exit_codes}:\n{group.text()[-4000:]}")
        self.lives.append(life)
        return life

    def whole(self) -> Path:
        """Folder of the run without an interruption."""
        output = self.folder / "whole"
        self.live(output, seconds=math.inf)
        return output

    def killed_and_resumed(self, output: Path, *, until: float) -> None:
        """One run, killed again and again until it has ended, or until so late that it may end in peace."""
        ended = [0] * WORLD_SIZE
        longest = LONGEST_LIFE / SHORTEST_LIFE
        while True:
            seconds = SHORTEST_LIFE * longest ** self.random.random()
            life = self.live(output, seconds=seconds if time.monotonic() + seconds < until else math.inf)
            if life.exit_codes == ended:
                return


class _LineCount:
    """Lines that are appended to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = path.stat().st_size if path.exists() else 0

    def new(self) -> int:
        """How many since the last call."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            file.seek(self.place)
            data = file.read()
        self.place += len(data)
        return data.count(b"\n")


def _sample(group: Group, life: Life) -> None:
    """Look at all ranks, or at none if one has gone."""
    try:
        found = []
        for rank in group.ranks:
            process = psutil.Process(rank.pid)
            with process.oneshot():
                found.append(
                    {
                        "rss_bytes": process.memory_info().rss,
                        "handles": process.num_fds(),
                        "threads": process.num_threads(),
                        "children": len(process.children(recursive=True)),
                    }
                )
    except psutil.Error:
        return
    for rank, values in enumerate(found):
        for kind, value in values.items():
            life.samples[kind][rank].append(value)


def differing(output: Path, whole: Path) -> list[str]:
    """Results that are not those of the uninterrupted run, and files that only one of both has."""
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (output, whole)]
    changed = [name for name in RESULTS if (output / name).read_bytes() != (whole / name).read_bytes()]
    return sorted({*changed, *(names[0] ^ names[1])})


def quarters(values: Sequence[int], middle: Callable[[Sequence[int]], float]) -> tuple[float, float]:
    """The first and the last quarter."""
    quarter = max(1, len(values) // 4)
    return middle(values[:quarter]), middle(values[-quarter:])


def middle_of(kind: str) -> Callable[[Sequence[int]], float]:
    """What stands for a quarter: a handle or a thread that a save has for a moment is no growth, but a floor is."""
    return statistics.median if kind == "rss_bytes" else min


def within_lives(lives: Sequence[Life]) -> dict[str, Any]:
    """Each kind's change from the first to the last quarter in lives of some length: all of them, and their median."""
    found = {}
    for kind in ALLOWED_GROWTH:
        ends = [
            quarters(values[WARM_UP_SAMPLES:], middle_of(kind))
            for life in lives
            for values in life.samples[kind]
            if len(values) >= WARM_UP_SAMPLES + MIN_SAMPLES
        ]
        found[kind] = _growth(kind, ends)
    return found


def courses(lives: Sequence[Life]) -> list[dict[str, Any]]:
    """Steps of each such life, and the resident set of each rank in its four quarters: a leak follows the steps."""
    found = []
    for life in lives:
        series = [values[WARM_UP_SAMPLES:] for values in life.samples["rss_bytes"]]
        if min(map(len, series)) >= MIN_SAMPLES:
            quarter = len(series[0]) // 4
            cut = [[values[i * quarter : (i + 1) * quarter] for i in range(4)] for values in series]
            found.append({"steps": life.steps, "rss_bytes": [[statistics.median(part) for part in one] for one in cut]})
    return found


def across_lives(lives: Sequence[Life]) -> dict[str, Any]:
    """Each kind's change from the first to the last quarter of the lives, each at the end of its warm-up."""
    grown_up = [life for life in lives if life.num_samples >= WARM_UP_SAMPLES]
    found = {}
    for kind in ALLOWED_GROWTH:
        ends = []
        for rank in range(WORLD_SIZE if len(grown_up) >= MIN_LIVES else 0):
            series = [life.samples[kind][rank][WARM_UP_SAMPLES // 2 : WARM_UP_SAMPLES] for life in grown_up]
            ends.append(quarters([middle_of(kind)(values) for values in series], middle_of(kind)))
        found[kind] = _growth(kind, ends)
    return found


def _growth(kind: str, ends: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The change between both ends, of each series and in the middle; whether it is more than allowed, or unknown."""
    if not ends:
        return {"series": 0, "grows": None}
    changes = [last - first for first, last in ends]
    first, change = statistics.median(first for first, _ in ends), statistics.median(changes)
    return {
        "series": len(ends),
        "first": first,
        "median_change": change,
        "greatest_change": max(changes),
        "grows": change > ALLOWED_GROWTH[kind] * first,
    }


def main() -> int:
    """Run, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=4_000, help="optimiser steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the instants and ranks that are struck")
    parser.add_argument("--output", type=Path, default=Path("soak.json"))
    arguments = parser.parse_args()
    # For the server that ranks are forked from, which reads it once.
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()
    until = began + 60 * arguments.minutes
    differences: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        soak = Soak(Path(name), steps=arguments.steps, seed=arguments.seed)
        whole = soak.whole()
        while not differences or time.monotonic() < until:
            output = Path(name) / f"run-{len(differences)}"
            soak.killed_and_resumed(output, until=until)
            differences[output.name] = differing(output, whole)
            shutil.rmtree(output)
            print(f"{output.name}: {len(soak.lives)} lives so far, differences: {differences[output.name]}", flush=True)
        left = sorted(path.name for path in (Path(name) / "tmp").iterdir())
    lives = soak.lives
    found = {
        "seed": arguments.seed,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "steps_of_a_run": arguments.steps,
        "runs_compared": len(differences),
        "lives": len(lives),
        "kills": sum(life.killed for life in lives),
        "steps": sum(life.steps for life in lives),
        "steps_of_the_longest_lives": sorted((life.steps for life in lives), reverse=True)[:5],
        "differences": {name: found for name, found in differences.items() if found},
        "temporary_files_left": left,
        "within_lives": within_lives(lives),
        "across_lives": across_lives(lives),
        "courses": courses(lives),
        "hardware": hardware(),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    verdicts = [kind["grows"] for part in ("within_lives", "across_lives") for kind in found[part].values()]
    found["equal"] = not found["differences"] and found["kills"] > 0
    # Not known counts as not flat: the soak was too short.
    found["flat"] = not left and all(grows is False for grows in verdicts)
    write_json(arguments.output, found)
    print(json.dumps(found, indent=2))
    return 0 if found["equal"] and found["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
