"""What a run leaves behind: its folder, its log, its best weights, its record.

Rank 0 writes; the other ranks follow the same calls and take part where a call needs all of them.
"""

import dataclasses
import datetime
import fcntl
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError

from qa_dist.common.errors import CheckpointError, ConfigError, LocalTrainingError
from qa_dist.common.files import make_writable, write_json
from qa_dist.common.secrets import masked
from qa_dist.common.signals import Stopped
from qa_dist.config.options import RunConfig
from qa_dist.config.parsing import write_config
from qa_dist.data.sources import subset
from qa_dist.distributed.ranks import Ranks
from qa_dist.distributed.rendezvous import launcher_name
from qa_dist.evaluation import loop as evaluating
from qa_dist.evaluation.loop import evaluation_bar
from qa_dist.evaluation.results import Evaluation, write_results
from qa_dist.features.store import FeatureStore
from qa_dist.machine.environment import git_commit, hardware, versions
from qa_dist.model.saved import save_trained
from qa_dist.model.span_model import SpanModel, Weights
from qa_dist.model.trainable import ParameterReport
from qa_dist.training.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    differences,
    discard_after,
    newest_checkpoint,
    read_checkpoint,
)
from qa_dist.training.inputs import RunData
from qa_dist.training.progress import MetricsLog, Progress, StepResult, Stopwatch
from qa_dist.training.trainer import Trainer

FILES = (
    "run.json",
    "metrics.json",
    "predictions.json",
    "nbest.json",
    "null_odds.json",
    "metrics.jsonl",
    "logits.npy",
    "adapter_model.safetensors",
    "adapter_config.json",
    "model.safetensors",
)
"""What marks a folder as holding results, and what an overwriting run removes first."""

FINAL_FILES = ("run.json", "adapter_model.safetensors", "model.safetensors")
"""What only a run that ended well leaves."""

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints inside a run's folder."""

LAUNCHERS = ".launchers"
"""The file in a run's folder that names the launchers of its ranks; only those go on with it unasked."""


class Run:
    """The folder and the record of one training run; a context manager that closes both."""

    def __init__(self, config: RunConfig, ranks: Ranks, directory: Path) -> None:
        self.config = config
        self.ranks = ranks
        self.directory = directory
        self.clock = Stopwatch()
        self._started = datetime.datetime.now(datetime.UTC)
        self._record: dict[str, Any] = {}
        self._progress = Progress(0, shown=False)
        self._num_steps = 0
        self._steps_per_epoch = 1
        self._last_step = 0
        self._best: tuple[float, int, Weights, Evaluation | None] | None = None
        self._latest: tuple[int, Evaluation] | None = None
        self._evaluations_without_best = 0
        self.is_evaluation_pending = config.training.eval_on_start
        self._launchers = {name for name in ranks.gather(launcher_name()) if name is not None}
        self._found: Checkpoint | None = None
        self._resumes = self._is_going_on = False
        self._hold: int | None = None
        if ranks.is_main:
            wanted = config.training.resume_from_checkpoint
            # Ranks that their launcher starts again, after a failure or with other machines, go on by themselves.
            again = not self._launchers.isdisjoint(_launchers_of(directory))
            self._resumes = again or wanted == "auto"
            self._found, self._is_going_on = _find_checkpoint(
                wanted, directory / CHECKPOINTS, self.say, newest=self._resumes
            )
            _require_usable(
                directory,
                overwrite=config.training.overwrite_output_dir,
                resumes=self._resumes,
                found=self._is_going_on,
            )
            self._hold = _hold(directory)
        self._checkpoints = CheckpointWriter(directory / CHECKPOINTS, config.training.checkpoint_total_limit, self.say)
        self._saved_step: int | None = None
        self._log = MetricsLog(directory / "metrics.jsonl" if ranks.is_main else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Also when the run has failed: a watchdog left behind would end the process that caught the error.
        self.ranks.watchdog.stop()
        self._progress.close()
        self._log.close()
        self._checkpoints.wait()
        if self._hold is not None:
            os.close(self._hold)
        if error is None or isinstance(error, Stopped):
            self.ranks.close()

    def say(self, *lines: str) -> None:
        """Tell the user, once, above the progress bar."""
        if self.ranks.is_main:
            for line in lines:
                self._progress.say(line)

    def describe_data(self, data: RunData) -> None:
        """Note and show which data the run uses."""
        described = {}
        for name, store in (("train", data.train), ("validation", data.validation)):
            if store is not None:
                described[name] = {
                    "fingerprint": store.fingerprint,
                    "num_examples": store.num_examples,
                    "num_unanswerable": store.num_unanswerable,
                    "num_features": store.num_features,
                    "mean_tokens": round(float(store.lengths.mean()), 2),
                }
                self.say(
                    f"{name}: {store.num_examples:,} examples, {store.num_unanswerable:,} of them unanswerable; "
                    f"{store.num_features:,} features of {store.lengths.mean():.1f} tokens on average"
                )
        self._record["data"] = described

    def describe_model(self, model: SpanModel, report: ParameterReport) -> None:
        """Note and show what is trained."""
        self._record["parameters"] = {"trainable": report.trainable, "total": report.total, "before": report.before}
        self._record["padding"] = model.padding
        self.say(*report.lines(structure=self.config.model.show_structure), *(f"note: {note}" for note in model.notes))

    def claim(self, data: RunData) -> None:
        """Take the folder over: from here on it holds this run, and no longer an earlier one that may be overwritten.

        Call this when data and model are there and a checkpoint is restored, so that a mistake in the options costs
        nobody's results.
        """
        if self.ranks.is_main:
            if not self._is_going_on:
                _clear(self.directory)
            # With what `auto` came to, so that this file alone repeats the run.
            version_2 = data.version_2 or self.config.data.version_2_with_negative
            data_config = dataclasses.replace(self.config.data, version_2_with_negative=version_2)
            # Where this process came in is no part of what the run is.
            training = dataclasses.replace(self.config.training, resume_from_checkpoint="no")
            resolved = dataclasses.replace(self.config, data=data_config, training=training)
            with _usable(self.directory):
                write_config(resolved, self.directory / "config.yaml")
                if self._launchers:
                    (self.directory / LAUNCHERS).write_text("\n".join(sorted(self._launchers)), encoding="utf-8")
        if self.config.training.report_to:
            self.ranks.start_trackers("qa_dist", self.config.flat())

    def resume(self, trainer: Trainer) -> int:
        """Put the trainer where the checkpoint ends that the run goes on from, if any; returns the steps done.

        Raises:
            ConfigError: The checkpoint is of a run that differs from this one in what its steps compute; on all ranks.
        """
        problems: list[str] = []
        if self.ranks.is_main and self._found is not None:
            problems = differences(self._found.identity, trainer.identity)
        found, problems, self._is_going_on = self.ranks.broadcast((self._found, problems, self._is_going_on))
        if problems:
            raise ConfigError(
                [
                    f"the checkpoint belongs to another run: {'; '.join(problems)}; make them agree, or start anew "
                    "with --resume_from_checkpoint no and another --output_dir"
                ]
            )
        if found is None:
            if self._resumes:
                self.say(f"no checkpoint in {self.directory}: the run starts anew")
            return 0
        trainer.restore(found)
        progress = found.progress
        self._last_step = found.step
        self._saved_step = found.step if self._is_going_on else None
        self._evaluations_without_best = progress["evaluations_without_best"]
        self.is_evaluation_pending = progress["evaluation_pending"]
        if found.best is not None:
            self._best = (progress["best"]["value"], progress["best"]["step"], found.best, None)
        self._record["evaluations"] = progress["evaluations"]
        if progress["skipped_steps"]:
            self._record["skipped_steps"] = progress["skipped_steps"]
        self._record["resumed_at_steps"] = [*progress["resumed_at_steps"], found.step]
        self._log.go_on_after(found.step)
        if self.ranks.is_main:
            discard_after(self._checkpoints.directory, found.step)
        self.say(f"resumed after step {found.step} of {trainer.num_steps}")
        self._found = None
        return found.step

    def start(self, num_steps: int, steps_per_epoch: int, done: int = 0) -> None:
        """Show the bar: training begins, `done` steps of it behind."""
        self._num_steps, self._steps_per_epoch = num_steps, steps_per_epoch
        shown = self.ranks.is_main and not self.config.training.disable_tqdm
        self._progress = Progress(num_steps, start=done, shown=shown)

    @contextmanager
    def stoppable(self, trainer: Trainer) -> Iterator[None]:
        """When all ranks agree to stop inside the block, write a checkpoint before they do.

        Raises:
            Stopped: As inside the block, when the checkpoint is on the disk.
            CheckpointError: The checkpoint cannot be written.
        """
        try:
            yield
        except Stopped as stop:
            if self._saved_step != self._last_step:
                self._save(trainer)
            # The first process that ends makes its launcher end the others: all wait for the one that writes.
            if not self.ranks.broadcast(self._checkpoints.wait()):
                raise CheckpointError(
                    f"the run stopped after step {self._last_step} and its last checkpoint could not be written"
                ) from stop
            self.say(
                f"stopped by {stop.by.name} after step {self._last_step}; the same command with "
                "--resume_from_checkpoint auto goes on from there"
            )
            raise

    def checkpoint_if_due(self, trainer: Trainer) -> None:
        """Write a checkpoint, in the background, if one is due after the step just recorded."""
        wanted = self.config.training.checkpointing_steps
        if wanted == "no":
            return
        every = self._steps_per_epoch if wanted == "epoch" else int(wanted)
        if self._last_step % every == 0 or self._last_step == self._num_steps:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._saved_step = self._last_step
        if not self.ranks.is_main and not trainer.engine.holds_shards:
            return
        best = self._best
        progress = {
            "evaluation_pending": self.is_evaluation_pending,
            "evaluations_without_best": self._evaluations_without_best,
            "best": None if best is None else {"value": best[0], "step": best[1]},
            "evaluations": list(self._record.get("evaluations", [])),
            "resumed_at_steps": self._record.get("resumed_at_steps", []),
            "skipped_steps": self._record.get("skipped_steps", 0),
            "world_size": self.ranks.world_size,
        }
        with self.clock.phase("checkpoint"):
            checkpoint = trainer.checkpoint(self._last_step, best and best[2], progress)
            if self.ranks.is_main:
                self._checkpoints.save(checkpoint)

    def record(self, step: int, done: StepResult, learning_rate: float) -> None:
        """Log optimiser step `step`, counted from 0 here and from 1 in everything written."""
        self._last_step = step + 1
        values = {
            "step": step + 1,
            "epoch": round((step + 1) / self._steps_per_epoch, 4),
            "loss": done.loss,
            "learning_rate": learning_rate,
            # JSON has no infinity; a step that overflowed in float16 was skipped.
            "grad_norm": done.grad_norm if math.isfinite(done.grad_norm) else None,
            "num_features": done.num_features,
            "num_tokens": done.num_tokens,
        }
        if not math.isfinite(done.grad_norm):
            self._record["skipped_steps"] = self._record.get("skipped_steps", 0) + 1
        with self._writing():
            self._log.write(values)
        if self.config.training.report_to and (step + 1) % self.config.training.logging_steps == 0:
            self.ranks.track(
                {f"train/{name}": value for name, value in values.items() if name != "step" and value is not None},
                step + 1,
            )
        self._progress.step(
            loss=done.loss,
            learning_rate=learning_rate,
            num_features=done.num_features,
            num_tokens=done.num_tokens,
        )

    def is_evaluation_due(self, step: int) -> bool:
        """Whether the model is evaluated after this step (counted from 0); it is after the last, unless never."""
        wanted = self.config.training.eval_steps
        if wanted == "no":
            return False
        every = self._steps_per_epoch if wanted == "epoch" else int(wanted)
        return (step + 1) % every == 0 or step + 1 == self._num_steps

    def evaluate(self, trainer: Trainer, data: RunData, *, step: int) -> Evaluation:
        """Evaluate after `step` optimiser steps, log it, and keep the weights if they are the best so far."""
        if data.validation is None:
            raise ValueError("nothing to evaluate on")
        self.is_evaluation_pending = True
        limit = self.config.data.max_eval_features
        with self.clock.phase("evaluate"), self._progress.paused():
            if limit is None:
                found = self._evaluate_whole(trainer, data, data.validation)
            else:
                chosen = subset(data.validation.num_features, limit, self.config.data.subset_seed)
                found = evaluating.evaluate_loss(
                    trainer.model,
                    data.validation,
                    self.ranks,
                    self.config.evaluation,
                    chosen,
                    forward_needs_all_ranks=trainer.engine.forward_needs_all_ranks,
                )
        self._latest = (step, found)
        values = {"eval_loss": found.loss, **{f"eval_{name}": value for name, value in found.metrics.items()}}
        epoch = round(step / self._steps_per_epoch, 4) if step else 0.0
        with self._writing():
            self._log.write({"step": step, "epoch": epoch, **values})
        if self.config.training.report_to:
            self.ranks.track({f"eval/{name.removeprefix('eval_')}": value for name, value in values.items()}, step)
        self.say(_summary(f"step {step}" if step else "before training", found))
        self._record.setdefault("evaluations", []).append({"step": step, "loss": found.loss, **found.metrics})
        if step:
            self._keep_if_best(trainer, data, step, found)
        self.is_evaluation_pending = False
        return found

    @property
    def has_stopped_improving(self) -> bool:
        """Whether early stopping ends the run now; the same on all ranks."""
        patience = self.config.training.early_stopping_patience
        return patience is not None and self._evaluations_without_best >= patience

    def finish(self, trainer: Trainer, data: RunData) -> Evaluation | None:
        """Evaluate the weights the run ends with, write everything, and say where it is."""
        ended_with, final = self._final_weights(trainer)
        if data.validation is not None and (final is None or not final.metrics):
            with self.clock.phase("evaluate"):
                final = self._evaluate_whole(trainer, data, data.validation)
            self.say(_summary("final", final))
        self._progress.close()
        memory = self.ranks.peak_memory_bytes()
        weights = trainer.engine.weights()
        if self.ranks.is_main:
            with self.clock.phase("write"), self._writing():
                written = save_trained(trainer.model, weights, data.tokenizer, self.directory)
                if final is not None:
                    written += write_results(final, self.directory)
            with self._writing():
                self._write_record(ended_with, memory, final)
            written += [self.directory / name for name in ("config.yaml", "metrics.jsonl", "run.json")]
            written += [self.directory / name for name in ("best", CHECKPOINTS) if (self.directory / name).exists()]
            self.say(*self._closing_lines(final, written))
        self.ranks.barrier()
        return final

    def _evaluate_whole(self, trainer: Trainer, data: RunData, store: FeatureStore) -> Evaluation:
        with evaluation_bar(shown=self.ranks.is_main and not self.config.training.disable_tqdm) as advance:
            return evaluating.evaluate(
                trainer.model,
                store,
                self.ranks,
                self.config.evaluation,
                version_2=data.version_2,
                forward_needs_all_ranks=trainer.engine.forward_needs_all_ranks,
                logits_path=self.directory / "logits.npy",
                advance=advance,
            )

    def _keep_if_best(self, trainer: Trainer, data: RunData, step: int, found: Evaluation) -> None:
        name = self.config.training.metric_for_best_model
        if name != "loss" and name not in found.metrics:
            name = "loss"
        value = -found.loss if name == "loss" else float(found.metrics[name])
        if self._best is not None and value <= self._best[0]:
            self._evaluations_without_best += 1
            return
        self._evaluations_without_best = 0
        weights = trainer.engine.weights()
        self._best = (value, step, weights, found)
        if self.ranks.is_main and self.config.training.keep == "best":
            best = self.directory / "best"
            with self._writing():
                best.mkdir(exist_ok=True)
                save_trained(trainer.model, weights, data.tokenizer, best)
                write_json(best / "metrics.json", {"step": step, "loss": found.loss, **found.metrics})

    def _final_weights(self, trainer: Trainer) -> tuple[int, Evaluation | None]:
        """Put the weights that the run ends with in place; their step, and their evaluation if there is one."""
        if self.config.training.keep == "best" and self._best is not None:
            _, step, weights, found = self._best
            trainer.engine.restore(weights)
            # The file of logits is that of the latest evaluation, and must be of the weights that are kept.
            is_latest = self._latest is not None and self._latest[0] == step
            return step, found if is_latest or self.config.evaluation.gather == "candidates" else None
        if self._latest is not None and self._latest[0] == self._last_step:
            return self._latest
        return self._last_step, None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what the file system refuses inside the block into one sentence.

        Raises:
            LocalTrainingError: A result cannot be written.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise LocalTrainingError(
                f"what belongs to step {self._last_step} cannot be written to {self.directory}: {reason}; free some "
                "space or make the folder writable, and go on with --resume_from_checkpoint auto"
            ) from error

    def _write_record(self, ended_with: int, memory: list[int], final: Evaluation | None) -> None:
        self._record = {
            "started": self._started.isoformat(timespec="seconds"),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": [masked(word) for word in sys.argv],
            "world_size": self.ranks.world_size,
            "strategy": self.ranks.launch_config.strategy,
            "num_steps": self._last_step,
            "weights_of_step": ended_with,
            **self._record,
            "final": None if final is None else {"loss": final.loss, **final.metrics},
            "seconds": {name: round(seconds, 3) for name, seconds in self.clock.seconds.items()},
            "peak_memory_bytes_per_rank": memory,
            "hardware": hardware(),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        write_json(self.directory / "run.json", self._record)

    def _closing_lines(self, final: Evaluation | None, written: Iterable[Path]) -> list[str]:
        lines = []
        evaluations = self._record.get("evaluations", [])
        if final is not None and evaluations and evaluations[0]["step"] == 0 and "f1" in evaluations[0]:
            before = evaluations[0]
            lines = [
                f"{'':<16}{'EM':>8}{'F1':>8}",
                f"{'before training':<16}{before['exact_match']:>8.2f}{before['f1']:>8.2f}",
                f"{'after training':<16}{final.metrics['exact_match']:>8.2f}{final.metrics['f1']:>8.2f}",
            ]
        return [*lines, "written:", *(f"  {path}" for path in sorted(written))]


def _summary(when: str, found: Evaluation) -> str:
    scores = f", EM {found.metrics['exact_match']:.2f}, F1 {found.metrics['f1']:.2f}" if found.metrics else ""
    return f"{when}: validation loss {found.loss:.4f}{scores}"


def _find_checkpoint(
    wanted: str, own: Path, notice: Callable[[str], object], *, newest: bool
) -> tuple[Checkpoint | None, bool]:
    """The checkpoint that the run goes on from, and whether it is one of its own.

    Args:
        wanted: What `--resume_from_checkpoint` says.
        own: The run's folder of checkpoints.
        notice: Hears which were passed over.
        newest: Whether to look for the newest in that folder first.

    Raises:
        CheckpointError: It cannot be used.
    """
    if newest and (found := newest_checkpoint(own, notice)):
        return found, True
    if wanted in ("no", "auto"):
        return None, False
    # A checkpoint of another folder brings none of that folder's results along.
    return read_checkpoint(Path(wanted)), Path(wanted).resolve().parent == own.resolve()


def _launchers_of(directory: Path) -> list[str]:
    """Launchers of the ranks that last took the folder over; none if they had none, or the folder cannot be used."""
    try:
        return (directory / LAUNCHERS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _require_usable(directory: Path, *, overwrite: bool, resumes: bool, found: bool) -> None:
    """Create the output folder, and make sure that results can be written there.

    A run that goes on from a checkpoint keeps what is there. One that wants to and finds none may clear what a run left
    that ended before its first checkpoint, but not the results of a finished run.

    Raises:
        ConfigError: It holds results and may not be overwritten, or it cannot be written to.
    """
    make_writable(directory, "--output_dir")
    present = [name for name in (*FILES, CHECKPOINTS) if (directory / name).exists()]
    unfinished = resumes and not any((directory / name).exists() for name in FINAL_FILES)
    if present and not (overwrite or found or unfinished):
        raise ConfigError(
            [
                f"--output_dir {directory} already holds results ({', '.join(present[:3])}); choose another "
                "folder, pass --overwrite_output_dir, or go on with --resume_from_checkpoint auto"
            ]
        )


def _hold(directory: Path) -> int:
    """A descriptor of the output folder that keeps other runs of this machine out of it until it is closed.

    Like the process that has it: nothing is left behind, however that ends. Other machines do not see it.

    Raises:
        ConfigError: Another run has the folder.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(
            [f"another run is writing to --output_dir {directory}; wait until it has ended, or choose another folder"]
        ) from error
    except OSError:
        # A file system without locks.
        pass
    return descriptor


def _clear(directory: Path) -> None:
    """Remove the results of an earlier run.

    Raises:
        ConfigError: They cannot be removed.
    """
    with _usable(directory):
        for name in (*FILES, LAUNCHERS):
            (directory / name).unlink(missing_ok=True)
        for name in ("best", CHECKPOINTS):
            if (directory / name).exists():
                shutil.rmtree(directory / name)


@contextmanager
def _usable(directory: Path) -> Iterator[None]:
    """Turn what the file system refuses into one sentence."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            [f"--output_dir {directory} cannot be used: {error.strerror}; choose another folder"]
        ) from error
