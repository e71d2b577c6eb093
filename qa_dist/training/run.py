"""One training run: what is done around the steps, by all ranks together."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from qa_dist.common.errors import CheckpointError
from qa_dist.common.signals import Stopped
from qa_dist.config.options import RunConfig
from qa_dist.distributed.ranks import Ranks
from qa_dist.distributed.rendezvous import launcher_name
from qa_dist.evaluation.results import Evaluation, write_results
from qa_dist.evaluation.tuning import tuned
from qa_dist.model.rehearsal import rehearse
from qa_dist.model.saved import save_trained
from qa_dist.model.span_model import SpanModel
from qa_dist.training.best_weights import BestWeights, measure_of
from qa_dist.training.checkpoints import CheckpointWriter, discard_after, misfit
from qa_dist.training.evaluator import Evaluator
from qa_dist.training.identity import differences, require_resumable
from qa_dist.training.inputs import RunData
from qa_dist.training.output_folder import BEST, TIMINGS, OutputFolder
from qa_dist.training.progress import Stopwatch
from qa_dist.training.run_log import RunLog, summary
from qa_dist.training.run_state import RunState
from qa_dist.training.trainer import StepResult, Trainer

UNSCORED = (
    "no answers of the validation data are known: they are predicted at the end and not scored, and the run keeps its "
    "last weights"
)

UNCOMPARED = (
    "the best weights so far cannot be compared with later ones, as these are not evaluated: the run keeps its last "
    "weights; to keep the best, resume with the evaluations that the run had"
)

UNTUNED = "probabilities and threshold stay untuned"


class Run:
    """Ties a run's folder, its log and its best weights to the steps of a trainer; a context manager that closes them.

    Rank 0 writes; the other ranks make the same calls and take part where a call needs all of them.

    Attributes:
        folder: where results go.
        log: what is said and noted.
        best: the best weights so far.
        clock: the time that each phase takes.
        is_evaluation_pending: whether an evaluation is due before the next step.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, directory: Path) -> None:
        """Open the folder, and find the checkpoint to go on from.

        Raises:
            UserError: On rank 0: the folder or the checkpoint cannot be used.
        """
        training = config.training
        self.config = config
        self.ranks = ranks
        self.clock = Stopwatch()
        self.folder = OutputFolder(directory, [name for name in ranks.gather(launcher_name()) if name is not None])
        self.log = RunLog(
            self.folder,
            is_main=ranks.is_main,
            track=ranks.track if training.report_to else None,
            logging_steps=training.logging_steps,
        )
        self.best = BestWeights(training.metric_for_best_model, patience=training.early_stopping_patience)
        self._evaluator = Evaluator(config, ranks, directory / "logits.npy")
        self.is_evaluation_pending = training.eval_on_start
        self._can_evaluate = True
        self._num_steps = 0
        self._steps_per_epoch = 1
        self._last_step = 0
        # After which step the latest checkpoint was begun; rank 0 writes it in the background.
        self._saved_step: int | None = None
        self._latest: tuple[int, Evaluation] | None = None
        self._can_tune = training.tune_on != "no"
        self._checkpoint = None
        if ranks.is_main:
            self._checkpoint = self.folder.open(config, self.log.notice)
        self._writer = CheckpointWriter(self.folder.checkpoints, training.checkpoint_total_limit, self.log.notice)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Also when the run has failed: a watchdog left behind would end the process that caught the error.
        self.ranks.watchdog.stop()
        self.log.close()
        self._writer.wait()
        self.folder.close()
        if error is None or isinstance(error, Stopped):
            self.ranks.close()

    def resume(self, trainer: Trainer) -> int:
        """Put the trainer where the checkpoint ends that the run goes on from, if any; returns the steps done.

        Raises:
            ConfigError: The checkpoint is of a run that differs from this one in what its steps compute; on all ranks.
            CheckpointError: It holds something else than this run's weights and moments; on all ranks.
        """
        problems: list[str] = []
        fault = None
        if self._checkpoint is not None:
            problems = differences(self._checkpoint.identity, trainer.identity)
            fault = misfit(self._checkpoint, trainer.shapes, trainer.num_steps)
        checkpoint, problems, fault, keeps_own = self.ranks.broadcast(
            (self._checkpoint, problems, fault, self.folder.keeps_own)
        )
        # It holds copies of the weights and the moments.
        self._checkpoint = None
        require_resumable(problems, fault)
        if checkpoint is None:
            if self.folder.looks_for_own:
                self.log.notice(f"no checkpoint in {self.folder.directory}: the run starts anew")
            return 0
        state = checkpoint.state
        trainer.restore(checkpoint)
        self.best.go_on_from(state.best, checkpoint.best, state.evaluations_without_best)
        self.log.go_on_after(checkpoint.step, state)
        self.is_evaluation_pending = state.evaluation_pending
        self._last_step = checkpoint.step
        self._saved_step = checkpoint.step if keeps_own else None
        if self.ranks.is_main:
            discard_after(self.folder.checkpoints, checkpoint.step, self.log.notice)
        self.log.notice(f"resumed after step {checkpoint.step} of {trainer.num_steps}")
        return checkpoint.step

    def describe_data(self, data: RunData) -> None:
        """Note and show the features, and what scores they allow at best, which rank 0 finds out."""
        self.log.describe_data(data.stores)
        if self.ranks.is_main:
            self.log.notice(*data.limit_lines(self.config))

    def rehearse(self, model: SpanModel, data: RunData) -> None:
        """Save the untrained model beside the results and read it back, so that no run fails only at its end.

        Raises:
            UserError: On rank 0: the model cannot be saved, or would not load.
        """
        if self.ranks.is_main:
            rehearse(model, data.tokenizer, self.config.model, self.folder.directory)

    def claim(self, data: RunData, num_steps: int) -> None:
        """Take the folder over, and open the trackers; before that, settle what is evaluated, kept and tuned.

        Call this when data and model are there and a checkpoint is restored, so that a mistake in the options costs
        nobody's results.

        Args:
            data: What is trained and evaluated on.
            num_steps: Optimiser steps of the whole run.

        Raises:
            ConfigError: On rank 0: the folder cannot be taken over.
        """
        self._settle_evaluations(data, num_steps)
        if self.ranks.is_main:
            self.folder.claim(self.config, version_2=data.version_2)
        if self.config.training.report_to:
            self.ranks.start_trackers("qa_dist", self.config.flat())

    def _settle_evaluations(self, data: RunData, num_steps: int) -> None:
        """Decide, from the data and the steps done, whether the run evaluates and tunes, and which weights it keeps."""
        if data.validation is None or not data.is_validation_scored:
            self._can_evaluate = self.is_evaluation_pending = self._can_tune = False
            if data.validation is not None:
                self.log.notice(UNSCORED)
        elif dropped := self.best.measure_by(
            measure_of(self.config, data.validation.fingerprint, version_2=data.version_2)
        ):
            self.log.notice(dropped)
        is_trained = self._last_step >= num_steps or self.best.has_stopped_improving
        is_compared = self._can_evaluate and self.config.training.eval_steps != "no"
        if self._last_step and not is_trained and not is_compared:
            # It would be the only one, and so the best.
            self.is_evaluation_pending = False
            if self.best.score is not None and self.config.training.keep == "best":
                self.log.notice(UNCOMPARED)
            self.best.forget()
        if problem := data.tuning_problem(self.config):
            self._can_tune = False
            self.log.notice(f"{UNTUNED}: {problem}")

    def start(self, trainer: Trainer, done: int) -> None:
        """Training begins, `done` of its steps behind."""
        self._num_steps, self._steps_per_epoch = trainer.num_steps, trainer.steps_per_epoch
        shown = not self.config.training.disable_tqdm
        self.log.notice(*trainer.inputs.shortfall)
        self.log.start(trainer.num_steps, trainer.steps_per_epoch, done=done, shown=shown)
        self.ranks.watchdog.start()

    def record(self, step: int, result: StepResult, learning_rate: float) -> None:
        """Log optimiser step `step`, counted from 0 here and from 1 in everything written."""
        self._last_step = step + 1
        # A step ends with the one read that waits for the device, so that the host's time is the step's.
        self.log.step(step + 1, result, learning_rate, seconds=self.clock.latest, world_size=self.ranks.world_size)

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the model is evaluated after the step just recorded; it is after the last, unless never."""
        return self._can_evaluate and self._is_due(self.config.training.eval_steps)

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether a checkpoint is written after the step just recorded; it is after the last, unless never."""
        wanted = self.config.training.checkpointing_steps
        return self._is_due(wanted) or (wanted != "no" and self.best.has_stopped_improving)

    def is_pause_due(self, after: int | None) -> bool:
        """Whether the run pauses here, `after` so many steps; it does not after its last, nor where that is None.

        Asked before each step, and so of a run that was stopped at the very step, too: its checkpoint is there.
        """
        return after is not None and after <= self._last_step < self._num_steps

    def _is_due(self, wanted: str) -> bool:
        """Whether "epoch", or a number of steps, comes round with the last step."""
        if wanted == "no":
            return False
        every = self._steps_per_epoch if wanted == "epoch" else int(wanted)
        return self._last_step % every == 0 or self._last_step == self._num_steps

    def evaluate(self, trainer: Trainer, data: RunData) -> None:
        """Evaluate the model as it is, log that, and keep its weights if they are the best so far."""
        step = self._last_step
        self.is_evaluation_pending = True
        with self.clock.phase("evaluate"), self.log.paused():
            evaluation = self._evaluator.during_training(trainer, data)
        self._latest = (step, evaluation)
        self.log.evaluation(step, evaluation)
        # The model is no candidate before it has been trained.
        is_best = step > 0 and self.best.offer(step, evaluation, trainer.engine.weights)
        if is_best and self.ranks.is_main and self.config.training.keep == "best":
            with self.folder.writing(step):
                self.best.write(trainer.model, data.tokenizer, self.folder.directory / BEST)
        self.is_evaluation_pending = False

    def save_checkpoint(self, trainer: Trainer) -> None:
        """Write a checkpoint of the run after the step just recorded, in the background."""
        self._saved_step = self._last_step
        if not self.ranks.is_main and not trainer.engine.holds_shards:
            return
        state = RunState(
            evaluation_pending=self.is_evaluation_pending,
            evaluations_without_best=self.best.evaluations_without_best,
            best=self.best.score,
            evaluations=tuple(self.log.evaluations),
            resumed_at_steps=tuple(self.log.resumed_at_steps),
            skipped_steps=self.log.skipped_steps,
            world_size=self.ranks.world_size,
            max_tokens_per_device=trainer.max_tokens,
            wanted_tokens_per_device=self.config.training.max_tokens_per_device,
            gradient_scaler=trainer.engine.scaler_state(),
        )
        with self.clock.phase("checkpoint"):
            self.log.synchronise(self._last_step)
            checkpoint = trainer.checkpoint(self._last_step, self.best.weights, state)
            if self.ranks.is_main:
                self._writer.save(checkpoint)

    def pause(self, trainer: Trainer) -> Evaluation | None:
        """Write a checkpoint, unless the step just recorded has one, and wait for it; the latest evaluation, if any.

        Raises:
            CheckpointError: It cannot be written.
        """
        if self._saved_step != self._last_step:
            self.save_checkpoint(trainer)
        if not self.ranks.broadcast(self._writer.wait()):
            raise CheckpointError(f"the run paused after step {self._last_step} and its checkpoint cannot be written")
        self.log.notice(f"paused after step {self._last_step} of {self._num_steps}")
        return None if self._latest is None else self._latest[1]

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
                self.save_checkpoint(trainer)
            # The first process that ends makes its launcher end the others: all wait for the one that writes.
            if not self.ranks.broadcast(self._writer.wait()):
                raise CheckpointError(
                    f"the run stopped after step {self._last_step} and its last checkpoint could not be written"
                ) from stop
            self.log.notice(
                f"stopped by {stop.by.name} after step {self._last_step}; the same command with "
                "--resume_from_checkpoint auto goes on from there"
            )
            raise

    def finish(self, trainer: Trainer, data: RunData) -> Evaluation | None:
        """Evaluate the weights the run ends with, write everything, and say where it is."""
        # Should the run be stopped in its last evaluation, these are what a checkpoint of this step holds.
        own = None if self._saved_step == self._last_step else trainer.engine.weights()
        weights_of_step, final = self._take_final_weights(trainer)
        if data.validation is not None and (final is None or not final.metrics):
            try:
                with self.clock.phase("evaluate"):
                    final = self._evaluator.whole(trainer, data)
            except Stopped:
                if own is not None:
                    trainer.engine.restore(own)
                raise
            self.log.notice(summary("final", final))
        self.log.close_bar()
        memory = self.ranks.peak_memory_bytes()
        passes = self.ranks.gather(trainer.describe_passes())
        weights = trainer.engine.weights()
        if self.ranks.is_main:
            directory = self.folder.directory
            with self.clock.phase("write"), self.folder.writing(self._last_step):
                keeps_logits = final is not None and self.config.evaluation.gather == "logits"
                self.folder.clear_results(keeps_logits=keeps_logits)
                written = save_trained(trainer.model, weights, data.tokenizer, directory)
                if final is not None:
                    written += write_results(final, directory)
                    written += self._calibrate(final, data)
            self.log.write_record(
                world_size=self.ranks.world_size,
                strategy=self.ranks.launch_config.strategy,
                num_steps=self._last_step,
                weights_of_step=weights_of_step,
                final=final,
                seconds=self.clock.seconds,
                peak_memory_bytes_per_rank=memory,
                passes_per_rank=passes,
            )
            written += [directory / name for name in ("config.yaml", "metrics.jsonl", "run.json")]
            written += [
                path for path in (directory / TIMINGS, directory / BEST, self.folder.checkpoints) if path.exists()
            ]
            self.log.conclude(final, written)
        self.ranks.barrier()
        return final

    def _calibrate(self, final: Evaluation, data: RunData) -> list[Path]:
        """Write what suits the model into its folder, if it is to be tuned; the results of the run stay as they are."""
        part = self.config.training.tune_on
        if part == "no" or not self._can_tune or final.answers is None or data.validation is None:
            return []
        found = tuned(
            final.answers,
            data.validation,
            self.config.data,
            self.config.evaluation,
            part=part,
            version_2=data.version_2,
            keeps_threshold=self.config.evaluation.null_score_diff_threshold is not None,
        )
        self.log.notice(*found.lines())
        return [found.write(self.folder.directory)]

    def _take_final_weights(self, trainer: Trainer) -> tuple[int, Evaluation | None]:
        """Give the model the weights that the run ends with; their step, and their evaluation if there is one."""
        best = self.best
        if self.config.training.keep == "best" and best.score is not None and best.weights is not None:
            trainer.engine.restore(best.weights)
            # The file of logits is that of the latest evaluation, and must be of the weights that are kept.
            is_latest = self._latest is not None and self._latest[0] == best.score.step
            is_usable = is_latest or self.config.evaluation.gather == "candidates"
            return best.score.step, best.evaluation if is_usable else None
        if self._latest is not None and self._latest[0] == self._last_step:
            return self._latest
        return self._last_step, None
