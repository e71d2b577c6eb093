"""Train many ways side by side: `qa-dist sweep SWEEP.yaml --output_dir outputs/sweep`, with training's own options."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qa_dist.common.command import run_command
from qa_dist.common.errors import ConfigError
from qa_dist.common.parsers import read_json
from qa_dist.common.signals import EXIT_STOPPED, Stopped, StopSignals
from qa_dist.config.options import option
from qa_dist.config.parsing import parse

PROG = "qa_dist.sweep"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """How the trials are run."""

    jobs: int = option(1, "trials at once, a process each; on GPUs they share the device", minimum=1, maximum=256)
    seconds: float | None = option(
        None, "stop after so many seconds; the same command goes on from there; none: when all is done", above=0
    )
    results_file: str | None = option(None, "the file of results; auto: sweep.json in --output_dir")
    only: tuple[str, ...] = option((), "names of the trials to run, separated by commas, with all their seeds")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(PROG, lambda: _sweep(list(sys.argv[1:] if argv is None else argv)))


def _sweep(words: list[str]) -> int:
    description = f"{__doc__ or ''}\nThe first word is the sweep file; docs/sweeps.md says what it holds."
    if not words or words[0].startswith("-"):
        # For --help; without it, one thing is missing for certain.
        parse(words if {"-h", "--help"} & set(words) else [], prog=PROG, description=description, entry=SweepConfig)
        raise ConfigError(["the sweep file is missing; name it before the options: qa-dist sweep SWEEP.yaml ..."])
    begun = time.monotonic()
    path, flags = Path(os.path.expanduser(words[0])), words[1:]
    config, options = parse(flags, prog=PROG, description=description, entry=SweepConfig)
    from qa_dist.sweeping.plan import read_plan

    plan = read_plan(path, flags, SweepConfig, options.only)
    from qa_dist.sweeping.running import run_sweep
    from qa_dist.sweeping.table import text
    from qa_dist.sweeping.workers import Workers

    results = Path(options.results_file or Path(str(config.training.output_dir)) / "sweep.json")

    def notice(line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    with StopSignals() as stop, Workers(options.jobs) as workers:

        def is_over() -> bool:
            is_late = options.seconds is not None and time.monotonic() - begun > options.seconds
            return stop.received is not None or is_late

        is_whole = run_sweep(plan, workers, results, is_over=is_over, notice=notice)
        received = stop.received
    sys.stdout.write(f"{text(read_json(results.read_text(encoding='utf-8')))}\n{results}\n")
    if received is not None:
        raise Stopped(received)
    return 0 if is_whole else EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
