"""What a run leaves behind: its folder, its log, its best weights, its record.

Rank 0 writes; the other ranks follow the same calls and take part where a call needs all of them.
"""

import dataclasses
import datetime
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qa_dist import evaluation as evaluating
from qa_dist.checkpoint import Weights, restore, save_trained, snapshot
from qa_dist.config import ConfigError, RunConfig, write_config
from qa_dist.distributed import Ranks
from qa_dist.errors import DataError
from qa_dist.evaluation import Evaluation
from qa_dist.masking import masked
from qa_dist.modeling import ParameterReport, SpanModel
from qa_dist.pretrained import load_tokenizer
from qa_dist.squad import available_splits, subset
from qa_dist.store import FeatureStore, prepare_store
from qa_dist.tracking import (
    MetricsLog,
    Progress,
    StepResult,
    Stopwatch,
    evaluation_bar,
    git_commit,
    hardware,
    versions,
    write_json,
)

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


@dataclass(frozen=True, slots=True)
class RunData:
    """The features of a run.

    Attributes:
        train: features to train on.
        validation: features to evaluate on; None if the source has none.
        tokenizer: what made them.
        version_2: whether questions may have no answer.
    """

    train: FeatureStore
    validation: FeatureStore | None
    tokenizer: Any
    version_2: bool


def load_data(config: RunConfig, ranks: Ranks) -> RunData:
    """The feature stores of both splits: built once on each machine, mapped by all its ranks.

    Raises:
        UserError: The data cannot be used.
    """
    with ranks.local_main_first():
        tokenizer = load_tokenizer(config.model)
        splits = available_splits(config.data)
        if "train" not in splits:
            raise DataError(
                "there is no training data; give --train_file, or --dataset_name of a set with a train split"
            )
        stores = {split: prepare_store(config, split, tokenizer=tokenizer, progress=ranks.is_main) for split in splits}
    train, validation = stores["train"], stores.get("validation")
    if validation is None and (config.training.eval_steps != "no" or config.training.eval_on_start):
        raise DataError(
            "there is no validation data to evaluate on during training; give --validation_file, or --eval_steps no"
        )
    unanswerable = train.num_unanswerable + (validation.num_unanswerable if validation else 0)
    wanted = config.data.version_2_with_negative
    return RunData(train, validation, tokenizer, bool(unanswerable) if wanted is None else wanted)


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
        self._best: tuple[float, int, Weights, Evaluation] | None = None
        self._latest: tuple[int, Evaluation] | None = None
        self._evaluations_without_best = 0
        if ranks.is_main:
            _require_usable(directory, overwrite=config.training.overwrite_output_dir)
        self._log = MetricsLog(directory / "metrics.jsonl" if ranks.is_main else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.close()
        self._log.close()
        if error is None:
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

        Call this when data and model are there, so that a mistake in the options costs nobody's results.
        """
        if self.ranks.is_main:
            _clear(self.directory)
            # With what `auto` came to, so that this file alone repeats the run.
            version_2 = data.version_2 or self.config.data.version_2_with_negative
            resolved = dataclasses.replace(self.config.data, version_2_with_negative=version_2)
            write_config(dataclasses.replace(self.config, data=resolved), self.directory / "config.yaml")
        if self.config.training.report_to:
            self.ranks.start_trackers("qa_dist", self.config.flat())

    def start(self, num_steps: int, steps_per_epoch: int) -> None:
        """Show the bar: training begins."""
        self._num_steps, self._steps_per_epoch = num_steps, steps_per_epoch
        shown = self.ranks.is_main and not self.config.training.disable_tqdm
        self._progress = Progress(num_steps, shown=shown)

    def record(self, step: int, done: StepResult, learning_rate: float) -> None:
        """Log optimiser step `step`, counted from 0 here and from 1 in everything written."""
        self._last_step = step + 1
        values = {
            "step": step + 1,
            "epoch": round((step + 1) / self._steps_per_epoch, 4),
            "loss": done.loss,
            "learning_rate": learning_rate,
            "grad_norm": done.grad_norm,
            "num_features": done.num_features,
            "num_tokens": done.num_tokens,
        }
        self._log.write(values)
        if self.config.training.report_to and (step + 1) % self.config.training.logging_steps == 0:
            self.ranks.track({f"train/{name}": value for name, value in values.items() if name != "step"}, step + 1)
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

    def evaluate(self, model: SpanModel, data: RunData, *, step: int) -> Evaluation:
        """Evaluate after `step` optimiser steps, log it, and keep the weights if they are the best so far."""
        if data.validation is None:
            raise ValueError("nothing to evaluate on")
        limit = self.config.data.max_eval_features
        with self.clock.phase("evaluate"), self._progress.paused():
            if limit is None:
                found = self._evaluate_whole(model, data, data.validation)
            else:
                chosen = subset(data.validation.num_features, limit, self.config.data.subset_seed)
                found = evaluating.evaluate_loss(model, data.validation, self.ranks, self.config.evaluation, chosen)
        self._latest = (step, found)
        values = {"eval_loss": found.loss, **{f"eval_{name}": value for name, value in found.metrics.items()}}
        epoch = round(step / self._steps_per_epoch, 4) if step else 0.0
        self._log.write({"step": step, "epoch": epoch, **values})
        if self.config.training.report_to:
            self.ranks.track({f"eval/{name.removeprefix('eval_')}": value for name, value in values.items()}, step)
        self.say(_summary(f"step {step}" if step else "before training", found))
        self._record.setdefault("evaluations", []).append({"step": step, "loss": found.loss, **found.metrics})
        if step:
            self._keep_if_best(model, data, step, found)
        return found

    @property
    def has_stopped_improving(self) -> bool:
        """Whether early stopping ends the run now; the same on all ranks."""
        patience = self.config.training.early_stopping_patience
        return patience is not None and self._evaluations_without_best >= patience

    def finish(self, model: SpanModel, data: RunData) -> Evaluation | None:
        """Evaluate the weights the run ends with, write everything, and say where it is."""
        ended_with, final = self._final_weights(model)
        if data.validation is not None and (final is None or not final.metrics):
            with self.clock.phase("evaluate"):
                final = self._evaluate_whole(model, data, data.validation)
            self.say(_summary("final", final))
        self._progress.close()
        memory = self.ranks.peak_memory_bytes()
        if self.ranks.is_main:
            with self.clock.phase("write"):
                written = save_trained(model, data.tokenizer, self.directory)
                if final is not None:
                    written += evaluating.write_results(final, self.directory)
            self._write_record(ended_with, memory, final)
            written += [self.directory / name for name in ("config.yaml", "metrics.jsonl", "run.json")]
            self.say(*self._closing_lines(final, written))
        self.ranks.barrier()
        return final

    def _evaluate_whole(self, model: SpanModel, data: RunData, store: FeatureStore) -> Evaluation:
        with evaluation_bar(shown=self.ranks.is_main and not self.config.training.disable_tqdm) as advance:
            return evaluating.evaluate(
                model,
                store,
                self.ranks,
                self.config.evaluation,
                version_2=data.version_2,
                logits_path=self.directory / "logits.npy",
                advance=advance,
            )

    def _keep_if_best(self, model: SpanModel, data: RunData, step: int, found: Evaluation) -> None:
        name = self.config.training.metric_for_best_model
        if name != "loss" and name not in found.metrics:
            name = "loss"
        value = -found.loss if name == "loss" else float(found.metrics[name])
        if self._best is not None and value <= self._best[0]:
            self._evaluations_without_best += 1
            return
        self._evaluations_without_best = 0
        self._best = (value, step, snapshot(model), found)
        if self.ranks.is_main and self.config.training.keep == "best":
            best = self.directory / "best"
            best.mkdir(exist_ok=True)
            save_trained(model, data.tokenizer, best)
            write_json(best / "metrics.json", {"step": step, "loss": found.loss, **found.metrics})

    def _final_weights(self, model: SpanModel) -> tuple[int, Evaluation | None]:
        """Put the weights that the run ends with in place; their step, and their evaluation if there is one."""
        if self.config.training.keep == "best" and self._best is not None:
            _, step, weights, found = self._best
            restore(model, weights)
            return step, found
        if self._latest is not None and self._latest[0] == self._last_step:
            return self._latest
        return self._last_step, None

    def _write_record(self, ended_with: int, memory: list[int], final: Evaluation | None) -> None:
        self._record = {
            "started": self._started.isoformat(timespec="seconds"),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": [masked(word) for word in sys.argv],
            "world_size": self.ranks.world_size,
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


def _require_usable(directory: Path, *, overwrite: bool) -> None:
    """Create the output folder, and make sure that results can be written there.

    Raises:
        ConfigError: It holds results and may not be overwritten, or it cannot be written to.
    """
    with _usable(directory):
        directory.mkdir(parents=True, exist_ok=True)
        found = [name for name in FILES if (directory / name).exists()]
        if found and not overwrite:
            raise ConfigError(
                [
                    f"--output_dir {directory} already holds results ({', '.join(found[:3])}); choose another folder "
                    "or pass --overwrite_output_dir"
                ]
            )
        probe = directory / ".writable"
        probe.write_text(str(time.time()), encoding="utf-8")
        probe.unlink()


def _clear(directory: Path) -> None:
    """Remove the results of an earlier run.

    Raises:
        ConfigError: They cannot be removed.
    """
    with _usable(directory):
        for name in FILES:
            (directory / name).unlink(missing_ok=True)
        if (directory / "best").exists():
            shutil.rmtree(directory / "best")


@contextmanager
def _usable(directory: Path) -> Iterator[None]:
    """Turn what the file system refuses into one sentence."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            [f"--output_dir {directory} cannot be used: {error.strerror}; choose another folder"]
        ) from error
