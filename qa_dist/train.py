"""Train a question answerer: `accelerate launch -m qa_dist.train ...`, torchrun, or plain python."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qa_dist.common.command import note_exit, run_command
from qa_dist.common.signals import StopSignals
from qa_dist.config.options import RunConfig, option
from qa_dist.config.parsing import parse
from qa_dist.distributed.slurm_step import join_slurm_step
from qa_dist.machine.allocator import start_with_flat_heap
from qa_dist.machine.cuda_environment import prepare_cuda

if TYPE_CHECKING:
    from qa_dist.training.plan import Plan

PROG = "qa_dist.train"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Whether to train at all."""

    dry_run: bool = option(
        False,
        "print what the run would do (data, model, steps, memory, files) and every mistake that would stop it at its "
        "start; nothing is trained or written to --output_dir, but features are prepared and kept",
    )


def main(argv: Sequence[str] | None = None) -> int:
    if argv is None:
        start_with_flat_heap(os.environ, sys.orig_argv)
    join_slurm_step()
    return note_exit(run_command(PROG, lambda: _train(sys.argv[1:] if argv is None else argv)))


def _train(argv: Sequence[str]) -> int:
    config, options = parse(argv, prog=PROG, description=__doc__ or "", entry=TrainConfig)
    # Before torch is imported.
    prepare_cuda(os.environ, deterministic=config.training.deterministic)
    if options.dry_run:
        return _dry_run(config)
    with StopSignals() as stop:
        # Imported here, as these take seconds: mistakes in the options do not wait for them.
        from qa_dist.distributed.failures import failures_named
        from qa_dist.training.loop import train

        with failures_named():
            train(config, asked_to_stop=lambda: stop.received)
    return 0


def _dry_run(config: RunConfig) -> int:
    from qa_dist.distributed.failures import failures_named
    from qa_dist.training.plan import plan_run

    with failures_named():
        plan = plan_run(config)
    if plan is not None:
        sections = {**plan.sections, "memory": _memory_lines(config, plan)}
        for heading, lines in sections.items():
            sys.stdout.writelines([f"{heading}\n", *(f"  {line}\n" for line in lines)])
        sys.stdout.write("dry run: nothing was trained, and nothing was written to --output_dir\n")
    return 0


def _memory_lines(config: RunConfig, plan: "Plan") -> list[str]:
    """The estimate of what a rank of the run holds."""
    from qa_dist.memory.estimate import EstimateConfig, NotEstimatedError, estimate, table

    if config.training.torch_compile == "model":
        return ["not estimated: --torch_compile model keeps other tensors than those that the estimate knows"]
    training = dataclasses.replace(config.training, max_tokens_per_device=plan.max_tokens)
    options = EstimateConfig(strategy=plan.strategy, num_processes=plan.world_size, device=plan.device)
    try:
        estimates, notes = estimate(dataclasses.replace(config, training=training), options, [plan.strategy])
    except NotEstimatedError as error:
        return [f"not estimated: {error}"]
    return table(estimates, notes).splitlines()


if __name__ == "__main__":
    sys.exit(main())
