"""Train many ways side by side: `qa-dist sweep SWEEP.yaml --output_dir outputs/sweep`, with training's own options."""

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qa_dist.common.command import EXIT_FAILURE, note_exit, run_command
from qa_dist.common.errors import ConfigError
from qa_dist.common.files import hold, make_writable
from qa_dist.common.parsers import read_json
from qa_dist.common.signals import EXIT_STOPPED, Stopped, StopSignals
from qa_dist.config.given import asks_for_help
from qa_dist.config.options import option
from qa_dist.config.parsing import parse
from qa_dist.distributed.slurm_step import own_slurm_environment
from qa_dist.machine.allocator import start_with_flat_heap
from qa_dist.machine.cuda_environment import prepare_cuda

if TYPE_CHECKING:
    from qa_dist.sweeping.plan import Plan
    from qa_dist.sweeping.running import Runner

PROG = "qa_dist.sweep"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """How the trials are run."""

    jobs: int = option(1, "trials at once, a process or a job each; processes share the GPU", minimum=1, maximum=256)
    seconds: float | None = option(
        None, "stop after so many seconds; the same command goes on from there; none: when all is done", above=0
    )
    results_file: str | None = option(None, "the file of results; auto: sweep.json in --output_dir")
    only: tuple[str, ...] = option((), "names of the trials to run, separated by commas, with all their seeds")
    launcher: Literal["local", "slurm"] = option(
        "local", "where trials run: in processes of this machine, or each as a job of launch/slurm.sh"
    )
    sbatch_options: str | None = option(
        None,
        "what every job is submitted with, in one text, such as '--gpus-per-node 1 --time 60'; needs --launcher slurm",
    )

    def problems(self) -> Iterator[str]:
        """What cannot be done."""
        if self.sbatch_options is not None and self.launcher != "slurm":
            yield "--sbatch_options are for jobs, and trials run in processes here; add --launcher slurm, or drop them"
        try:
            shlex.split(self.sbatch_options or "")
        except ValueError as error:
            yield f"--sbatch_options {self.sbatch_options}: {error}; write them as in a shell"


def main(argv: Sequence[str] | None = None) -> int:
    if argv is None:
        # Its processes, or this one as a job, train.
        start_with_flat_heap(os.environ, sys.orig_argv)
    words = list(sys.argv[1:] if argv is None else argv)
    if words and Path(words[0]).name == "task.json":
        return note_exit(run_command(PROG, lambda: _task(words)))
    return run_command(PROG, lambda: _sweep(words))


def _task(words: list[str]) -> int:
    """One trial of a sweep whose trials are jobs; this process is the run, or a rank of it."""
    from qa_dist.sweeping.jobs import read_task

    if words[1:]:
        raise ConfigError([f"{words[0]} is one trial with all its options; drop {words[1]}"])
    trial, pause_after = read_task(Path(words[0]))
    # Before torch is imported.
    prepare_cuda(os.environ, deterministic=trial.config.training.deterministic)
    with StopSignals() as stop:
        from qa_dist.distributed.failures import failures_named
        from qa_dist.sweeping.trials import run_trial

        with failures_named():
            status = run_trial(trial, pause_after, asked_to_stop=lambda: stop.received)["status"]
    return EXIT_STOPPED if status == "stopped" else 0 if status in ("done", "paused") else EXIT_FAILURE


def _sweep(words: list[str]) -> int:
    description = f"{__doc__ or ''}\nThe first word is the sweep file; docs/sweeps.md says what it holds."
    if not words or words[0].startswith("-"):
        if asks_for_help(words):
            parse(words, prog=PROG, description=description, entry=SweepConfig)
        raise ConfigError(["the sweep file is missing; name it before the options: qa-dist sweep SWEEP.yaml ..."])
    if "RANK" in os.environ or own_slurm_environment():
        raise ConfigError(["a sweep starts its trials itself; call it without a launcher, or with --launcher slurm"])
    begun = time.monotonic()
    path, flags = Path(os.path.expanduser(words[0])), words[1:]
    config, options = parse(flags, prog=PROG, description=description, entry=SweepConfig)
    from qa_dist.sweeping.plan import read_plan
    from qa_dist.sweeping.record import require_results_file

    plan = read_plan(path, flags, SweepConfig, options.only)
    if plan.search:
        from qa_dist.sweeping.searching import run_search as run
    else:
        from qa_dist.sweeping.running import run_sweep as run
    from qa_dist.sweeping.table import text

    folder = Path(str(config.training.output_dir))
    results = Path(options.results_file or folder / "sweep.json")
    require_results_file(results, plan, is_own=options.results_file is None)
    _require_data(plan)
    _require_adapters(plan)
    make_writable(folder, "--output_dir")

    def notice(line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    with StopSignals() as stop, _alone_in(folder), _runner(options) as runner:

        def is_over() -> bool:
            is_late = options.seconds is not None and time.monotonic() - begun > options.seconds
            return stop.received is not None or is_late

        is_whole = run(plan, runner, results, is_over=is_over, notice=notice)
        received = stop.received
    found = read_json(results.read_text(encoding="utf-8"))
    sys.stdout.write(f"{text(found)}\n{results}\n")
    if received is not None:
        raise Stopped(received)
    if not is_whole:
        return EXIT_STOPPED
    if any(trial["status"] in ("done", "paused") for trial in found["trials"]):
        return 0
    sys.stderr.write(f"{PROG}: error: no trial came to its end; what happened to each is above and in {results}\n")
    return EXIT_FAILURE


def _require_data(plan: "Plan") -> None:
    """Make sure that the data of all trials is there, before the first of them is started.

    Raises:
        DataError: It is not.
    """
    from qa_dist.data.sources import training_splits

    needed = ((config.data, config.training.evaluates_before_end) for config in plan.configs)
    for data, evaluates in dict.fromkeys(needed):
        training_splits(data, evaluates=evaluates)


def _require_adapters(plan: "Plan") -> None:
    """Make sure that every trial can go on from its `--init_adapter`, before the first of them is started.

    Raises:
        ConfigError: One cannot.
    """
    from qa_dist.model.initial import require_fitting_adapter

    for model in dict.fromkeys(config.model for config in plan.configs if config.model.init_adapter):
        require_fitting_adapter(model)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Context in which no other sweep of this machine runs in the folder, where both would record the same trials."""
    problem = f"another sweep is running in --output_dir {folder}; wait until it has ended, or choose another"
    held = hold(folder, problem)
    try:
        yield
    finally:
        os.close(held)


def _runner(options: SweepConfig) -> "AbstractContextManager[Runner]":
    if options.launcher == "slurm":
        from qa_dist.sweeping.jobs import SlurmJobs

        return nullcontext(SlurmJobs(options.jobs, shlex.split(options.sbatch_options or "")))
    from qa_dist.sweeping.workers import Workers

    return Workers(options.jobs)


if __name__ == "__main__":
    sys.exit(main())
