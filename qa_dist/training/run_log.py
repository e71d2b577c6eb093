"""What a run says and notes while it goes on: sentences, the bar, metrics.jsonl, trackers, and run.json at its end."""

import datetime
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from qa_dist.common.files import write_json
from qa_dist.common.secrets import masked
from qa_dist.evaluation.results import Evaluation
from qa_dist.features.store import FeatureStore
from qa_dist.machine.environment import git_commit, hardware, versions
from qa_dist.model.span_model import SpanModel
from qa_dist.model.trainable import ParameterReport
from qa_dist.training.metrics_log import MetricsLog
from qa_dist.training.output_folder import TIMINGS, OutputFolder
from qa_dist.training.progress import Progress
from qa_dist.training.run_state import Figures, RunState
from qa_dist.training.trainer import StepResult

Track = Callable[[Mapping[str, float], int], object]
"""Sends figures to the trackers: by name, and the step that they belong to."""


class RunLog:
    """The log of a run. Every rank keeps its figures, which are the same on all; rank 0 alone shows and writes them.

    Attributes:
        evaluations: every evaluation so far: `step`, `loss` and its metrics.
        resumed_at_steps: after which steps the run was resumed.
        skipped_steps: steps that changed nothing, as their float16 gradients had overflowed.
    """

    def __init__(
        self, folder: OutputFolder, *, is_main: bool = True, track: Track | None = None, logging_steps: int = 1
    ) -> None:
        """Log into a folder.

        Args:
            folder: The run's folder.
            is_main: Whether this is rank 0.
            track: Where figures go besides; None: nowhere.
            logging_steps: They go there every so many steps.
        """
        self.evaluations: list[Figures] = []
        self.resumed_at_steps: list[int] = []
        self.skipped_steps = 0
        self._folder = folder
        self._is_main = is_main
        self._track = track
        self._logging_steps = logging_steps
        self._started = datetime.datetime.now(datetime.UTC)
        self._described: dict[str, Any] = {}
        self._steps_per_epoch = 1
        self._metrics = MetricsLog(folder.directory / "metrics.jsonl" if is_main else None)
        self._timings = MetricsLog(folder.directory / TIMINGS if is_main else None)
        self._bar = Progress(0, shown=False)

    def notice(self, *lines: str) -> None:
        """Tell the user, once, above the bar."""
        if self._is_main:
            for line in lines:
                self._bar.notice(line)

    def describe_data(self, stores: Mapping[str, FeatureStore]) -> None:
        """Note and show the features of each split."""
        self._described["data"] = {}
        for split, store in stores.items():
            mean_tokens = float(store.lengths.mean())
            self._described["data"][split] = {
                "fingerprint": store.fingerprint,
                "num_examples": store.num_examples,
                "num_unanswerable": store.num_unanswerable,
                "num_features": store.num_features,
                "mean_tokens": round(mean_tokens, 2),
            }
            self.notice(
                f"{split}: {store.num_examples:,} examples, {store.num_unanswerable:,} of them unanswerable; "
                f"{store.num_features:,} features of {mean_tokens:.1f} tokens on average"
            )

    def describe_model(self, model: SpanModel, report: ParameterReport, *, structure: bool = False) -> None:
        """Note and show what is trained of the model; with `structure`, every tensor of it."""
        self._described["parameters"] = {"trainable": report.trainable, "total": report.total, "before": report.before}
        self._described["padding"] = model.padding
        self.notice(*report.lines(structure=structure), *(f"note: {note}" for note in model.notes))

    def go_on_after(self, step: int, state: RunState) -> None:
        """Go on with the log of the run whose checkpoint after `step` steps holds `state`."""
        self.evaluations = list(state.evaluations)
        self.skipped_steps = state.skipped_steps
        self.resumed_at_steps = [*state.resumed_at_steps, step]
        self._metrics.go_on_after(step, evaluates_again=state.evaluation_pending)
        self._timings.go_on_after(step)

    def synchronise(self, step: int) -> None:
        """Let no line be missing behind a checkpoint after so many steps, whatever happens to the machine.

        Raises:
            LocalTrainingError: metrics.jsonl or timings.jsonl cannot be written.
        """
        with self._folder.writing(step):
            self._metrics.synchronise()
            self._timings.synchronise()

    def start(self, num_steps: int, steps_per_epoch: int, *, done: int, shown: bool) -> None:
        """Training begins, `done` of its steps behind; the bar is there if it is to be `shown`."""
        self._steps_per_epoch = steps_per_epoch
        self._bar = Progress(num_steps, start=done, shown=shown and self._is_main)

    def paused(self) -> AbstractContextManager[None]:
        """Context whose time is left out of the throughput that the bar shows."""
        return self._bar.paused()

    def step(
        self, step: int, result: StepResult, learning_rate: float, *, seconds: float = 0.0, world_size: int = 1
    ) -> None:
        """Note optimiser step `step`, counted from 1, as in everything written.

        Args:
            step: Its number.
            result: What it did.
            learning_rate: Its learning rate.
            seconds: How long it took, on rank 0.
            world_size: How many ranks shared it.

        Raises:
            LocalTrainingError: metrics.jsonl or timings.jsonl cannot be written.
        """
        is_finite = math.isfinite(result.grad_norm)
        figures = {
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 4),
            "loss": result.loss,
            "learning_rate": learning_rate,
            # JSON has no infinity; a step that overflowed in float16 was skipped.
            "grad_norm": result.grad_norm if is_finite else None,
            "num_features": result.num_features,
            "num_tokens": result.num_tokens,
        }
        self.skipped_steps += not is_finite
        self._write(step, figures)
        # In a file of their own: what was measured is another number in every run, and what a rank has depends on how
        # many there are, while metrics.jsonl of a run that was killed and resumed is that of the whole run to the byte.
        with self._folder.writing(step):
            self._timings.write(
                {
                    "step": step,
                    "step_seconds": round(seconds, 6),
                    "most_tokens": result.most_tokens,
                    "world_size": world_size,
                }
            )
        if self._track and step % self._logging_steps == 0:
            self._track(
                {f"train/{name}": value for name, value in figures.items() if name != "step" and value is not None},
                step,
            )
        self._bar.step(
            loss=result.loss,
            learning_rate=learning_rate,
            num_features=result.num_features,
            num_tokens=result.num_tokens,
        )

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Note and show an evaluation after `step` steps.

        Raises:
            LocalTrainingError: metrics.jsonl cannot be written.
        """
        figures = {"loss": evaluation.loss, **evaluation.metrics}
        known = {name: value for name, value in figures.items() if value is not None}
        epoch = round(step / self._steps_per_epoch, 4) if step else 0.0
        self._write(step, {"step": step, "epoch": epoch, **{f"eval_{name}": figures[name] for name in figures}})
        if self._track:
            self._track({f"eval/{name}": value for name, value in known.items()}, step)
        self.notice(summary(f"step {step}" if step else "before training", evaluation))
        self.evaluations.append({"step": step, **known})

    def write_record(
        self,
        *,
        world_size: int,
        strategy: str,
        num_steps: int,
        weights_of_step: int,
        final: Evaluation | None,
        seconds: Mapping[str, float],
        peak_memory_bytes_per_rank: Sequence[int],
        passes_per_rank: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write run.json, on rank 0, when the run has ended.

        Args:
            world_size: Number of ranks.
            strategy: How they held the model.
            num_steps: Optimiser steps of the run.
            weights_of_step: After how many of them it had the weights that it ends with.
            final: Evaluation of these weights; None without validation data.
            seconds: Time of each phase.
            peak_memory_bytes_per_rank: Most memory that each rank used.
            passes_per_rank: How each rank computed its passes, where there was a choice.

        Raises:
            LocalTrainingError: It cannot be written.
        """
        noted = dict(self._described)
        if self.skipped_steps:
            noted["skipped_steps"] = self.skipped_steps
        if self.evaluations or self.resumed_at_steps:
            noted["evaluations"] = self.evaluations
        if self.resumed_at_steps:
            noted["resumed_at_steps"] = self.resumed_at_steps
        if any(passes_per_rank):
            noted["passes_per_rank"] = list(passes_per_rank)
        record = {
            "started": self._started.isoformat(timespec="seconds"),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": [masked(word) for word in sys.argv],
            "world_size": world_size,
            "strategy": strategy,
            "num_steps": num_steps,
            "weights_of_step": weights_of_step,
            **noted,
            "final": None if final is None else {"loss": final.loss, **final.named_metrics},
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "peak_memory_bytes_per_rank": list(peak_memory_bytes_per_rank),
            "hardware": hardware(),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        with self._folder.writing(num_steps):
            write_json(self._folder.directory / "run.json", record)

    def conclude(self, final: Evaluation | None, written: Iterable[Path]) -> None:
        """Say what training brought, if the model was evaluated before it, and where the results are."""
        before = self.evaluations[0] if self.evaluations else {}
        if final is not None and final.is_scored and before.get("step") == 0 and "f1" in before:
            self.notice(
                f"{'':<16}{'EM':>8}{'F1':>8}",
                f"{'before training':<16}{before['exact_match']:>8.2f}{before['f1']:>8.2f}",
                f"{'after training':<16}{final.metrics['exact_match']:>8.2f}{final.metrics['f1']:>8.2f}",
            )
        self.notice("written:", *(f"  {path}" for path in sorted(written)))

    def close_bar(self) -> None:
        """Leave the bar as it stands; notices may follow."""
        self._bar.close()

    def close(self) -> None:
        """Close the bar and metrics.jsonl."""
        self._bar.close()
        self._metrics.close()
        self._timings.close()

    def _write(self, step: int, figures: Mapping[str, float | None]) -> None:
        with self._folder.writing(step):
            self._metrics.write(figures)


def summary(when: str, evaluation: Evaluation) -> str:
    """One line about an evaluation."""
    metrics = evaluation.metrics
    if evaluation.loss is None and not evaluation.is_scored:
        return f"{when}: {metrics.get('num_unlabelled', 0):,} questions without known answers are predicted, not scored"
    loss = "" if evaluation.loss is None else f" loss {evaluation.loss:.4f}"
    scores = f" EM {metrics['exact_match']:.2f}, F1 {metrics['f1']:.2f}" if evaluation.is_scored else ""
    return f"{when}: validation{','.join(part for part in (loss, scores) if part)}"
