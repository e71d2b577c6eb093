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
from qa_dist.model.trainable import check_vocabulary
from qa_dist.training.inputs import load_data
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
    with Run(config, ranks, output_dir) as run:
        with run.clock.phase("prepare"):
            data = load_data(config, ranks)
            run.say(*require_agreement(config, ranks, {"train": data.train, "validation": data.validation}, output_dir))
            run.describe_data(data)
        with run.clock.phase("model"):
            model, report = build_model(
                config.model,
                seed=training.seed,
                max_seq_length=config.data.max_seq_length,
                gradient_checkpointing=training.gradient_checkpointing,
                torch_compile=training.torch_compile,
                tokenizer_pads_left=data.tokenizer.padding_side == "left",
                device=ranks.device,
            )
            for store in (data.train, data.validation):
                if store is not None:
                    check_vocabulary(model, store.largest_token_id)
            trainer = Trainer(config, ranks, data.train, model, notice=run.say)
            run.describe_model(model, report)
            start = run.resume(trainer)
            run.claim(data)
        run.start(trainer.num_steps, trainer.steps_per_epoch, start)
        ranks.watchdog.start()
        with run.stoppable(trainer):
            ranks.stop_if_asked()
            if run.is_evaluation_pending:
                run.evaluate(trainer, data, step=start)
            for step in range(start, trainer.num_steps):
                if run.has_stopped_improving:
                    break
                with run.clock.phase("train"):
                    done = trainer.step(step)
                run.record(step, done, trainer.learning_rate(step))
                if run.is_evaluation_due(step):
                    run.evaluate(trainer, data, step=step + 1)
                run.checkpoint_if_due(trainer)
                if done.stop:
                    ranks.stop_if_asked()
            return run.finish(trainer, data)
