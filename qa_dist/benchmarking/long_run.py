"""What a long run on CPUs takes of the memory, with each allocator: the resident set after so many steps.

    python -m qa_dist.bench memory long docs/memory/long_cpu.json --train_file FILE --validation_file FILE

starts training with glibc's heap, with that without its cache of small blocks and with jemalloc, side by side, and
notes what Linux says of the processes as they pass the steps of `STEPS`. The file is written at each of them, so that a
measurement that is stopped has what it got to.
"""

import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qa_dist.common.columns import mib
from qa_dist.common.errors import UserError
from qa_dist.common.files import make_writable, write_json
from qa_dist.machine.allocator import find_jemalloc, without_cache
from qa_dist.machine.environment import git_commit, hardware, versions

STEPS = (5, 20, 50, 100, 200, 300, 500, 1000, 1500, 2000)
"""Steps after which memory is noted; a run ends with the last."""

RECIPE = ("--config", "squad_minilm_small", "--global_batch_size", "2", "--max_eval_samples", "1")
"""A quarter of the recipe's batch, so that 2,000 steps take a quarter of the time."""

_INTERVAL = 0.25
"""Seconds between two looks at the runs."""


def environments(base: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What a run starts with to have each allocator, by its name.

    Raises:
        UserError: There is no jemalloc.
    """
    library = find_jemalloc()
    if library is None:
        raise UserError("jemalloc is not installed, which is measured beside glibc's heap; install libjemalloc2")
    shared = {**base, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = {"glibc": {**shared, "LD_PRELOAD": ""}}
    if without := without_cache(found["glibc"]):
        found["glibc, no cache"] = without
    return {**found, "jemalloc": {**shared, "LD_PRELOAD": str(library)}}


def measure(path: Path, train_file: str, validation_file: str) -> None:
    """Run training with each allocator, and write the memory that it took.

    Raises:
        UserError: There is no jemalloc, this is not Linux, or a run failed.
    """
    if not sys.platform.startswith("linux"):
        raise UserError("what another process has resident is read from /proc, which only Linux has; measure there")
    by_name = environments(os.environ)
    make_writable(path.parent, "the folder of MEMORY.JSON")
    options = [*RECIPE, "--max_train_steps", str(STEPS[-1])]
    files = ["--train_file", train_file, "--validation_file", validation_file]
    noted: dict[str, list[dict[str, int]]] = {name: [] for name in by_name}
    machine = {name: value for name, value in hardware().items() if name != "allocator"}
    whole: dict[str, Any] = {"hardware": machine, "versions": versions(), "git_commit": git_commit()}
    whole["long_run"] = {"options": options, "allocators": noted}
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        try:
            for name, environment in by_name.items():
                output = Path(folder) / name
                command = [sys.executable, "-m", "qa_dist.train", *options, *files, "--disable_tqdm"]
                command += ["--store_dir", str(output / "store"), "--output_dir", str(output / "run")]
                log = (Path(folder) / f"{name}.log").open("w+", encoding="utf-8")
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                running[name] = (process, log, samples(process, output / "run" / "metrics.jsonl"))
            for name, sample in _in_turn({name: looked for name, (_, _, looked) in running.items()}):
                noted[name].append(sample)
                write_json(path, whole)
            for name, (process, log, _) in running.items():
                if process.wait():
                    log.seek(0)
                    raise UserError(f"the run with {name} ended with code {process.returncode}:\n{log.read()[-4000:]}")
        finally:
            for process, log, _ in running.values():
                process.kill()
                process.wait()
                log.close()


def samples(process: "subprocess.Popen[Any]", metrics: Path) -> Iterator[dict[str, int] | None]:
    """A run's memory as it passes each of `STEPS`; None at a look that finds it between them.

    Args:
        process: The run.
        metrics: Its metrics.jsonl, which has a line with a loss for each step.

    Yields:
        `step`, `resident_bytes` then and `peak_bytes` so far.
    """
    left = list(STEPS)
    while left and process.poll() is None:
        done = _num_steps(metrics)
        memory = _resident(process.pid) if done >= left[0] else None
        if memory is not None:
            left = [step for step in left if step > done]
            yield {"step": done, **memory}
        else:
            yield None


def _in_turn(runs: Mapping[str, Iterator[dict[str, int] | None]]) -> Iterator[tuple[str, dict[str, int]]]:
    """What runs that go on side by side have to say, until all have ended."""
    going = dict(runs)
    while going:
        for name in list(going):
            try:
                sample = next(going[name])
            except StopIteration:
                del going[name]
                continue
            if sample is not None:
                yield name, sample
        time.sleep(_INTERVAL)


def _num_steps(metrics: Path) -> int:
    try:
        return metrics.read_text(encoding="utf-8").count('"loss":')
    except OSError:
        return 0


def _resident(pid: int) -> dict[str, int] | None:
    """Bytes that a process has resident, and has had at most; None if it has ended. See proc(5)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in status.splitlines())
    if "VmRSS" not in sizes:
        return None
    return {
        name: 1024 * int(sizes[key].split()[0]) for name, key in (("resident_bytes", "VmRSS"), ("peak_bytes", "VmHWM"))
    }


def section(files: Iterable[Mapping[str, Any]]) -> list[str]:
    """The part of docs/memory.md about long runs."""
    lines = list(_INTRODUCTION)
    whole, said = None, ""
    for whole in files:
        allocators: Mapping[str, Sequence[Mapping[str, int]]] = whole["long_run"]["allocators"]
        machine, used = whole["hardware"], whole["versions"]
        what = _what_ran(whole["long_run"])
        lines += [
            *_paragraph("" if what == said else what),
            *_paragraph(_how_far(whole["long_run"])),
            f"**{machine['cpu_count']} cores of {machine['processor']}**, shared with other programs, "
            f"torch {used['torch']}, transformers {used['transformers']}, commit {str(whole['git_commit'])[:12]}",
            "",
            f"| steps | {' | '.join(allocators)} |",
            f"| ---: |{' ---: |' * len(allocators)}",
        ]
        for wanted in STEPS:
            # A look now and then comes a step late.
            after = [next((each for each in run if each["step"] >= wanted), None) for run in allocators.values()]
            cells = [f"{mib(each['resident_bytes'])} ({mib(each['peak_bytes'])})" if each else "" for each in after]
            if any(cells):
                lines.append(f"| {wanted:,} | {' | '.join(cells)} |")
        lines.append("")
        said = what
    if whole is None:
        return [*lines, "How much the two take over 2,000 steps: not yet measured.", ""]
    return [*lines, "To measure again:", "", "```bash", _COMMAND, "```", ""]


def _paragraph(text: str) -> list[str]:
    """The lines of a paragraph and an empty one; none without a text."""
    return [*textwrap.wrap(text, 118, break_on_hyphens=False), ""] if text else []


def _what_ran(runs: Mapping[str, Any]) -> str:
    return (
        f"One process with one thread each, side by side, of `{' '.join(runs['options'])}`, which is a quarter of the "
        "recipe's batch, on SQuAD v1.1: resident memory after so many steps, and in brackets its peak so far, in MiB."
    )


def _how_far(runs: Mapping[str, Any]) -> str:
    """How far the runs came, if that was not to the last of `STEPS`."""
    last = {name: run[-1]["step"] if run else 0 for name, run in runs["allocators"].items()}
    if min(last.values()) >= STEPS[-1]:
        return ""
    reached = " and ".join(f"{step:,} with {name}" for name, step in last.items())
    if len(set(last.values())) == 1:
        reached = f"{min(last.values()):,} steps"
    return f"These runs were stopped after {reached}: of more, nothing is measured yet."


_COMMAND = (
    "python -m qa_dist.bench memory long docs/memory/long_cpu.json --train_file train-v1.1.json.gz "
    "--validation_file dev-v1.1.json.gz"
)

_INTRODUCTION = (
    "## A long run on CPUs",
    "",
    "A row of tokens has another length in every step, and glibc's heap grows with the holes for as long as a run",
    "lasts; jemalloc's does not. So `qa_dist.train`, however it is started, takes jemalloc where it is installed",
    "(Debian's and Ubuntu's `libjemalloc2`, Fedora's `jemalloc`): it starts itself anew with LD_PRELOAD, once, before",
    "it has imported anything, as `qa_dist.sweep`, `qa_dist.serve` and `qa_dist.predict` do. Where LD_PRELOAD is set",
    "already, be it to nothing, it does not, nor where there is a GPU. `qa-dist doctor` says whether it will,",
    "`run.json` which allocator it was.",
    "",
    "Without jemalloc, and with a glibc of before 2.39, these commands start themselves anew without glibc's cache of",
    "small blocks (`GLIBC_TUNABLES=glibc.malloc.tcache_count=0`, unless another size is set there), which keeps many",
    "of the holes apart. A program of your own that opens a `qa_dist.Reader` takes less with either in its variables.",
    "",
)
