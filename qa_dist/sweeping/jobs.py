"""Trials as jobs of Slurm: each task is a job of launch/slurm.sh, which this process waits for.

A job is known by its name, which is made from the folder of its trial: a sweep that was killed finds those of its jobs
that are still in the queue, and waits for them instead of submitting them again.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from qa_dist.common.errors import ConfigError, UserError
from qa_dist.common.files import write_json
from qa_dist.common.shipped import find_shipped
from qa_dist.config.parsing import parse
from qa_dist.sweeping.plan import PROG, Trial
from qa_dist.sweeping.record import Record, compared, is_at, note_failure, read_record, read_versioned
from qa_dist.sweeping.running import NextTask, Task

TASK = "task.json"
"""The file in a trial's folder that says what its job has to do."""

LOG = "log.txt"
_FORMAT = 1
_COMMANDS = ("sbatch", "squeue", "scancel")
_OURS = ("--job-name", "-J", "--output", "-o", "--clusters", "-M", "--array", "-a", "--chdir", "-D", "--export")
"""Options of sbatch that say by what name, in what log and in which queue a job is found, where its paths begin, and
what it is to run."""

_SECONDS_TO_STOP = 120.0
_MAX_SILENCES = 60
"""Slurm's controller may be restarted, or busy for a while."""

Call = Callable[[Sequence[str], Mapping[str, str]], "subprocess.CompletedProcess[str]"]
"""Runs a command of Slurm's, with these variables on top of the environment's."""


def write_task(trial: Trial, pause_after: int | None) -> Path:
    """Write what a trial's job has to do, and return the file."""
    path = trial.folder / TASK
    path.parent.mkdir(parents=True, exist_ok=True)
    task = {"method": trial.method, "seed": trial.seed, "options": dict(trial.options), "pause_after": pause_after}
    write_json(path, {"format": _FORMAT, **task, "config": trial.config.flat()})
    return path


def read_task(path: Path) -> Task:
    """The trial of a file that `write_task` wrote, and after how many steps it pauses.

    Raises:
        UserError: The file cannot be read, or is none of them.
    """
    task = read_versioned(
        path,
        _FORMAT,
        if_damaged="start the sweep again, which writes it anew",
        if_other="is no task of this version of qa-dist sweep; start the sweep again",
    )
    config, _ = parse([], prog=PROG, description="", base=task["config"], base_name=str(path))
    return Trial(task["method"], task["seed"], task["options"], config), task["pause_after"]


def call_slurm(words: Sequence[str], variables: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run a command of Slurm's."""
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **variables}, check=False)


@dataclass
class _Job:
    trial: Trial
    step: int | None
    number: str
    log_before: int | None
    """When the trial's log was written last before this job was submitted, in nanoseconds; None: there was none."""
    starts_before: int
    """How often the trial had been started before this job was submitted, or found in the queue."""
    is_gone: bool = False
    """Whether it was not in the queue when that was last looked at."""


class SlurmJobs:
    """Runs tasks as jobs, so many at a time in Slurm's queue."""

    def __init__(
        self,
        most_at_once: int,
        options: Sequence[str] = (),
        *,
        call: Call = call_slurm,
        poll_seconds: float = 5.0,
    ) -> None:
        """Prepare to submit them.

        Args:
            most_at_once: How many jobs wait or run at once.
            options: What every job is submitted with, as words of sbatch's.
            call: Runs Slurm's commands.
            poll_seconds: How often the queue is looked at.

        Raises:
            ConfigError: Slurm's commands are missing, or an option is one that the sweep sets.
        """
        if ours := [word for word, value in zip_longest(options, options[1:], fillvalue="") if _is_ours(word, value)]:
            raise ConfigError(
                [
                    f"--sbatch_options has {', '.join(ours)}, but a sweep finds its jobs by their names, logs and "
                    "queue, and they need its folder and environment; leave it out"
                ]
            )
        if call is call_slurm and (missing := [name for name in _COMMANDS if shutil.which(name) is None]):
            raise ConfigError(
                [f"--launcher slurm needs {', '.join(missing)}, which are not here; run the sweep where sbatch works"]
            )
        self._most = most_at_once
        self._options = list(options)
        self._call = call
        self._poll_seconds = poll_seconds
        self._jobs: dict[str, _Job] = {}
        self._is_one_stopped = False

    def run(self, next_task: NextTask, *, is_over: Callable[[], bool], ended: Callable[[Trial], object]) -> bool:
        """Run tasks in their order, so many at once; whether none is left over (see `Runner`).

        A job that ends without having brought its trial where it was to go has failed; one that was stopped, and is not
        queued again by itself, is left over, and so is one that was cancelled before it began.

        Raises:
            UserError: Slurm takes no job, or does not answer.
        """
        self._is_one_stopped = False
        queue = self._queue()
        while True:
            if is_over():
                self._stop(ended)
                return False
            while len(self._jobs) < self._most and (task := next_task()):
                self._jobs[job_name(task[0])] = self._job(task, queue, is_over)
            if not self._jobs:
                return not self._is_one_stopped
            time.sleep(self._poll_seconds)
            queue = self._queue()
            self._collect(queue, ended)

    def _job(self, task: Task, queue: Mapping[str, str], is_over: Callable[[], bool]) -> _Job:
        """The job of a task: one that waits or runs for it already, or a new one.

        Raises:
            UserError: One that waits or runs has other options.
        """
        name = job_name(task[0])
        # A job that has brought its trial to the rung before may still be ending, under the same name.
        while name in queue and not _is_for(task, queue[name]) and not is_over():
            time.sleep(self._poll_seconds)
            queue = self._queue()
        log_before = _log_time(task[0])
        starts_before = _num_starts(read_record(task[0]))
        number = queue[name] if name in queue else self._submit(name, task)
        return _Job(*task, number, log_before, starts_before)

    def _submit(self, name: str, task: Task) -> str:
        """Number of the job that a task becomes."""
        trial, step = task
        path = write_task(trial, step)
        folder = path.parent.resolve()
        # In names of files Slurm fills in what stands behind a per cent sign.
        log = str(folder / LOG).replace("%", "%%")
        words = ["sbatch", "--parsable", "--export=ALL", "--job-name", name, "--output", log, *self._options]
        variables = {"MODULE": "qa_dist.sweep", "LOG_DIR": str(folder / "logs")}
        variables["PYTHON"] = os.environ.get("PYTHON", sys.executable)
        done = self._call([*words, str(find_shipped("launch/slurm.sh")[1]), str(folder / TASK)], variables)
        if done.returncode:
            raise UserError(f"sbatch took no job for {trial.name}: {_said(done)}; see --sbatch_options")
        # With several clusters: number;cluster.
        return done.stdout.strip().partition(";")[0]

    def _queue(self) -> dict[str, str]:
        """Numbers of this user's jobs that wait, run or are ending, by name."""
        words = ["squeue", "--noheader", "--me", "--format", "%i|%j"]
        for _ in range(_MAX_SILENCES):
            done = self._call(words, {})
            if not done.returncode:
                lines = [line.strip().partition("|") for line in done.stdout.splitlines() if line.strip()]
                return {name: number for number, _, name in lines}
            time.sleep(self._poll_seconds)
        raise UserError(f"squeue does not answer: {_said(done)}; the jobs go on, and so does the same command")

    def _collect(self, queue: Mapping[str, str], ended: Callable[[Trial], object]) -> None:
        """Take in the jobs that have left the queue."""
        for name, job in list(self._jobs.items()):
            was_gone, job.is_gone = job.is_gone, name not in queue
            record = read_record(job.trial) if job.is_gone else None
            # Folders that nodes share may be late with what the job wrote last.
            if not job.is_gone or not (was_gone or is_at(record, job.step)):
                continue
            del self._jobs[name]
            if not is_at(record, job.step):
                has_begun = _log_time(job.trial) != job.log_before
                is_stopped = record is not None and record["status"] == "stopped"
                # That an earlier job was stopped says nothing of this one.
                if not has_begun or (is_stopped and _num_starts(record) > job.starts_before):
                    self._is_one_stopped = True
                else:
                    log = job.trial.folder / LOG
                    note_failure(job.trial, f"its job {job.number} ended without a result; {log} has its last words")
            ended(job.trial)

    def _stop(self, ended: Callable[[Trial], object]) -> None:
        """Cancel the jobs: what runs writes a checkpoint first, in the time that Slurm leaves it (KillWait).

        Raises:
            UserError: They could not be cancelled.
        """
        done = self._call(["scancel", *(job.number for job in self._jobs.values())], {}) if self._jobs else None
        until = time.monotonic() + _SECONDS_TO_STOP
        while self._jobs.keys() & (queue := self._queue()).keys() and time.monotonic() < until:
            time.sleep(self._poll_seconds)
        for name, job in self._jobs.items():
            if name not in queue and read_record(job.trial) is not None:
                ended(job.trial)
        left = [job.number for name, job in self._jobs.items() if name in queue]
        self._jobs = {}
        # A job that had just ended makes it fail, too.
        if done is not None and done.returncode and left:
            raise UserError(f"scancel did not end {', '.join(left)}: {_said(done)}; cancel them by hand")


def _num_starts(record: Record | None) -> int:
    """How often a trial has been started."""
    return 0 if record is None else int(record["starts"])


def _log_time(trial: Trial) -> int | None:
    """When the log of a trial's jobs was written last, in nanoseconds; None if none of them has begun."""
    with suppress(OSError):
        return (trial.folder / LOG).stat().st_mtime_ns
    return None


def _is_for(task: Task, number: str) -> bool:
    """Whether the last job of a trial was to bring it where the task says; yes where its file cannot be read.

    Args:
        task: What is to be done.
        number: The job's.

    Raises:
        UserError: It was submitted with other options, which its trial would end with.
    """
    trial, step = task
    try:
        submitted, pause_after = read_task(trial.folder / TASK)
    except UserError:
        return True
    if compared(submitted) != compared(trial):
        raise UserError(
            f"job {number} in the queue is trial {trial.name} with other options than the sweep file says now; "
            f"scancel {number}, or change the file back"
        )
    return pause_after == step


def _is_ours(word: str, following: str) -> bool:
    """Whether a word of sbatch's is an option of `_OURS`; a short one may have its value right behind it.

    `--export` may add to what all jobs have: `--export=ALL,NAME=VALUE`.
    """
    if word.startswith("--"):
        name, equals, value = word.partition("=")
        if name == "--export" and (value if equals else following).split(",")[0] == "ALL":
            return False
        return name in _OURS
    return word[:2] in _OURS


def job_name(trial: Trial) -> str:
    """Name of the job of a trial: what a person knows it by, and what tells it from one in another folder."""
    digest = hashlib.sha256(str(trial.folder.resolve()).encode()).hexdigest()[:10]
    return f"{re.sub(r'[^A-Za-z0-9._=+-]', '_', trial.name)[:60]}-{digest}"


def _said(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [*done.stderr.strip().splitlines(), *done.stdout.strip().splitlines()]
    return lines[-1] if lines else f"it ended with code {done.returncode}"
