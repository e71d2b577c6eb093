"""The training loop: the same optimiser steps at any number of ranks, micro-batches and processes.

A position in a run is a step number. What a step does - which features, in which order, with which dropout and learning
rate - is a function of the configuration and that number alone. What the loop carries from step to step is the weights,
the optimiser's moments, the loss scale of float16, and a token budget that was halved for want of memory; beside them,
the best weights so far. A checkpoint has all of these.
"""

import signal
from collections.abc import Callable
from pathlib import Path

from qa_dist.config.options import RunConfig
from qa_dist.distributed.agreement import require_agreement
from qa_dist.evaluation.results import Evaluation
from qa_dist.training.inputs import load_data
from qa_dist.training.run import Run
from qa_dist.training.start import build_trainable, join_ranks
from qa_dist.training.trainer import Trainer


def train(
    config: RunConfig,
    *,
    asked_to_stop: Callable[[], signal.Signals | None] = lambda: None,
    pause_after: int | None = None,
) -> Evaluation | None:
    """The whole run: prepare, train, evaluate, write. Returns the final evaluation, None without validation data.

    With `pause_after`, a run of more steps than that writes a checkpoint after so many and returns what it last
    evaluated, without results; called again, with `--resume_from_checkpoint auto`, it goes on as if it had not paused.

    Raises:
        UserError: The configuration, the data or the checkpoint cannot be used.
        Stopped: `asked_to_stop` returned a signal on some rank; a checkpoint was written.
    """
    output_dir = Path(config.training.output_dir or "outputs")

    # ----------------------------------------------------------------------------------------------- join the ranks
    ranks = join_ranks(config, output_dir, asked_to_stop)

    # ---------------------------------------------------------------------------------------------- open the folder
    with Run(config, ranks, output_dir) as run:
        # --------------------------------------------------------------------------------------- prepare the inputs
        with run.clock.phase("prepare"):
            data = load_data(config, ranks)
            run.log.notice(*require_agreement(config, ranks, data.stores, output_dir))
            run.describe_data(data)

        # ------------------------------------------------------------------------- build the model, and restore it
        with run.clock.phase("model"):
            model, report = build_trainable(config, ranks, data)
            run.rehearse(model, data)
            trainer = Trainer(config, ranks, data.train, model, notice=run.log.notice)
            run.log.describe_model(model, report, structure=config.model.show_structure)
            start = run.resume(trainer)
            run.claim(data, trainer.num_steps)

        # ---------------------------------------------------------------------------------------------------- steps
        run.start(trainer, start)
        with run.stoppable(trainer):
            ranks.stop_if_asked()
            if run.is_evaluation_pending:
                run.evaluate(trainer, data)
            for step in range(start, trainer.num_steps):
                if run.best.has_stopped_improving:
                    break
                if run.is_pause_due(pause_after):
                    return run.pause(trainer)
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
