"""The training loop: the same optimiser steps at any number of ranks, micro-batches and processes.

A position in a run is a step number. What a step does - which features, in which order, with which dropout and learning
rate - is a function of the configuration and that number alone; the loop carries no other state than the weights and
the optimiser's moments.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from qa_dist.config.options import RunConfig
from qa_dist.distributed.agreement import require_agreement
from qa_dist.distributed.launch_config import read_launch_config
from qa_dist.distributed.ranks import Ranks
from qa_dist.evaluation.results import Evaluation
from qa_dist.model.building import build_model
from qa_dist.model.span_model import SpanModel
from qa_dist.model.trainable import ParameterReport, check_vocabulary
from qa_dist.training.inputs import RunData, load_data
from qa_dist.training.optimizer import require_optimizer
from qa_dist.training.run import Run
from qa_dist.training.trainer import Trainer


def train(config: RunConfig, *, asked_to_stop: Callable[[], signal.Signals | None] = lambda: None) -> Evaluation | None:
    """The whole run: prepare, train, evaluate, write. Returns the final evaluation, None without validation data.

    Raises:
        UserError: The configuration, the data or the checkpoint cannot be used.
        Stopped: `asked_to_stop` returned a signal on some rank; a checkpoint was written.
    """
    training = config.training
    output_dir = Path(training.output_dir or "outputs")

    # ----------------------------------------------------------------------------------------------- join the ranks
    ranks = _join_ranks(config, output_dir, asked_to_stop)

    # ---------------------------------------------------------------------------------------------- open the folder
    with Run(config, ranks, output_dir) as run:
        # --------------------------------------------------------------------------------------- prepare the inputs
        with run.clock.phase("prepare"):
            data = load_data(config, ranks)
            run.log.notice(*require_agreement(config, ranks, data.stores, output_dir))
            run.log.describe_data(data.stores)

        # ------------------------------------------------------------------------------------------ build the model
        with run.clock.phase("model"):
            model, report = _build_model(config, data, ranks)
            trainer = Trainer(config, ranks, data.train, model, notice=run.log.notice)
            run.log.describe_model(model, report, structure=config.model.show_structure)

            # ------------------------------------------------------------------------------------------- restore it
            start = run.resume(trainer)
            run.claim(data)

        # ---------------------------------------------------------------------------------------------------- steps
        run.start(trainer, start)
        with run.stoppable(trainer):
            ranks.stop_if_asked()
            if run.is_evaluation_pending:
                run.evaluate(trainer, data)
            for step in range(start, trainer.num_steps):
                if run.best.has_stopped_improving:
                    break
                with run.clock.phase("train"):
                    result = trainer.step(step)
                run.record(step, result, trainer.learning_rate(step))
                if run.is_evaluation_due:
                    run.evaluate(trainer, data)
                if run.is_checkpoint_due:
                    run.save_checkpoint(trainer)
                if result.stop:
                    ranks.stop_if_asked()

            # ----------------------------------------------------------------------------------------------- finish
            return run.finish(trainer, data)


def _join_ranks(config: RunConfig, output_dir: Path, asked_to_stop: Callable[[], signal.Signals | None]) -> Ranks:
    """The ranks that the launcher started, able to do what the configuration asks of them."""
    training = config.training
    ranks = Ranks(
        mixed_precision=training.mixed_precision,
        trackers=training.report_to,
        project_dir=output_dir,
        asked_to_stop=asked_to_stop,
        hang_timeout=training.hang_timeout,
        timeout_seconds=training.ddp_timeout,
        launch_config=read_launch_config(os.environ, config),
    )
    if training.tf32:
        ranks.use_tf32()
    require_optimizer(training.optim, ranks.device.type)
    return ranks


def _build_model(config: RunConfig, data: RunData, ranks: Ranks) -> tuple[SpanModel, ParameterReport]:
    """The model to train, which has an embedding for every token of the data, and what is trained of it."""
    model, report = build_model(
        config.model,
        seed=config.training.seed,
        max_seq_length=config.data.max_seq_length,
        gradient_checkpointing=config.training.gradient_checkpointing,
        torch_compile=config.training.torch_compile,
        tokenizer_pads_left=data.tokenizer.padding_side == "left",
        device=ranks.device,
    )
    for store in data.stores.values():
        check_vocabulary(model, store.largest_token_id)
    return model, report
