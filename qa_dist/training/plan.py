"""What a run would do, and what would stop it at its start: everything that training does before its first step.

The ranks join, features are prepared, the model is loaded and held as the launcher wants it; nothing is trained, and
nothing is written to the output folder.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qa_dist.common.errors import ConfigError, UserError
from qa_dist.config.options import RunConfig, TrainingConfig
from qa_dist.data.sources import available_splits, open_source
from qa_dist.distributed.agreement import require_agreement
from qa_dist.distributed.launch_config import Strategy
from qa_dist.distributed.ranks import Ranks
from qa_dist.model.pretrained import load_tokenizer
from qa_dist.model.rehearsal import rehearse
from qa_dist.model.span_model import SpanModel
from qa_dist.model.trainable import ParameterReport
from qa_dist.training.checkpoints import CHECKPOINTS, Checkpoint, misfit
from qa_dist.training.identity import differences, require_resumable
from qa_dist.training.inputs import RunData, load_data
from qa_dist.training.output_folder import BEST, OutputFolder
from qa_dist.training.run import UNSCORED, UNTUNED
from qa_dist.training.start import build_trainable, join_ranks
from qa_dist.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do.

    Attributes:
        world_size: Number of ranks.
        device: Kind of their devices.
        strategy: How they hold the model.
        max_tokens: Tokens of a forward pass on one rank.
        sections: The whole of it for a person: lines by heading.
    """

    world_size: int
    device: Literal["cpu", "cuda"]
    strategy: Strategy
    max_tokens: int
    sections: dict[str, list[str]]


def plan_run(config: RunConfig) -> Plan | None:
    """What `train` would do with this configuration, on rank 0; None on the others. All ranks must call it.

    Feature stores that are not there are built, and kept.

    Raises:
        UserError: What would end the run before its first step: what is wrong with the output folder, the data and the
            model is said at once.
    """
    folder = OutputFolder(Path(config.training.output_dir or "outputs"))
    ranks = join_ranks(config, folder.directory)
    notices: list[str] = []
    checkpoint, data, model, report = _made(config, ranks, folder, notices.append)
    require_agreement(config, ranks, data.stores, None)
    trainer = Trainer(config, ranks, data.train, model)
    if checkpoint is not None:
        clauses = differences(checkpoint.identity, trainer.identity)
        require_resumable(clauses, misfit(checkpoint, trainer.shapes, trainer.num_steps))
    ranks.close()
    if not ranks.is_main:
        return None
    model_lines = [*report.lines(structure=config.model.show_structure), *(f"note: {note}" for note in model.notes)]
    return Plan(
        world_size=ranks.world_size,
        device="cuda" if ranks.device.type == "cuda" else "cpu",
        strategy=ranks.launch_config.strategy,
        max_tokens=trainer.max_tokens,
        sections={
            "data": [*_data_lines(data), *data.limit_lines(config)],
            "model": model_lines,
            "steps": _step_lines(
                config.training,
                ranks,
                trainer,
                checkpoint,
                can_evaluate=data.validation is None or data.is_validation_scored,
            ),
            "files": [*notices, *_file_lines(config, folder, data)],
        },
    )


def _made(
    config: RunConfig, ranks: Ranks, folder: OutputFolder, notice: Callable[[str], object]
) -> tuple[Checkpoint | None, RunData, SpanModel, ParameterReport]:
    """What a run starts from: its checkpoint, if any, its data, its model and what is trained of that.

    Raises:
        ConfigError: With every mistake in the folder, the data and the model.
    """
    problems: list[str] = []
    checkpoint, data, built = None, None, None
    if ranks.is_main:
        with _collecting(problems):
            checkpoint = folder.look(config, notice)
        with _collecting(problems):
            # Whether the data is there, even where model or tokenizer is not that it is read for.
            for split in available_splits(config.data):
                open_source(config.data, split)
        with _collecting(problems):
            load_tokenizer(config.model)
    with _collecting(problems):
        data = load_data(config, ranks)
    with _collecting(problems):
        built = build_trainable(config, ranks, data)
        # A whole model is as much to write as it is large, and this is not the disk that it would go to.
        if ranks.is_main and data is not None and config.model.tuning == "lora":
            with tempfile.TemporaryDirectory() as aside:
                rehearse(built[0], data.tokenizer, config.model, Path(aside))
    if problems or data is None or built is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    return checkpoint, data, *built


@contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    """Note a mistake of the user inside the block, and go on behind it."""
    try:
        yield
    except UserError as error:
        problems += error.problems if isinstance(error, ConfigError) else [str(error)]


def _data_lines(data: RunData) -> list[str]:
    lines = []
    for split, store in data.stores.items():
        lines += [
            f"{split}: {store.num_examples:,} examples, {store.num_unanswerable:,} of them unanswerable; "
            f"{store.num_features:,} features of {store.lengths.mean():.1f} tokens on average",
            f"  prepared in {store.path}",
        ]
    lines.append(f"questions may have no answer: {'yes' if data.version_2 else 'no'}")
    if data.validation is not None and not data.is_validation_scored:
        lines.append(UNSCORED)
    return lines


def _step_lines(
    training: TrainingConfig, ranks: Ranks, trainer: Trainer, checkpoint: Checkpoint | None, *, can_evaluate: bool
) -> list[str]:
    inputs, lengths = trainer.inputs, trainer.store.lengths
    tokens = int(lengths[inputs.features].sum())
    whole_epochs = trainer.num_steps // trainer.steps_per_epoch
    # The last epoch may end early; which features its steps hold is drawn.
    last_steps = range(whole_epochs * trainer.steps_per_epoch, trainer.num_steps)
    in_all = whole_epochs * tokens + sum(int(lengths[inputs.global_batch(step)].sum()) for step in last_steps)
    most_features = min(training.global_batch_size, len(inputs.features))
    processes = "1 process" if ranks.world_size == 1 else f"{ranks.world_size} processes"
    eval_steps = training.eval_steps if can_evaluate else "no"
    lines = [
        f"{trainer.num_steps:,} optimiser steps, {trainer.steps_per_epoch:,} per epoch; up to {most_features:,} "
        "features each",
        *inputs.shortfall,
        f"{tokens:,} tokens per epoch, {in_all / trainer.num_steps:,.0f} per step on average; {in_all:,} in all",
        f"{processes} on {ranks.device.type}, {ranks.launch_config.strategy}: up to {trainer.max_tokens:,} tokens at "
        "once on each",
        f"evaluation: {'before the first step; ' if training.eval_on_start else ''}{_when(eval_steps)}",
        f"checkpoints: {_when(training.checkpointing_steps)}",
    ]
    if checkpoint is not None:
        lines.append(f"goes on after step {checkpoint.step:,}")
    return lines


def _when(steps: str) -> str:
    return {"epoch": "after every epoch", "no": "none during training"}.get(steps, f"every {steps} steps")


def _file_lines(config: RunConfig, folder: OutputFolder, data: RunData) -> list[str]:
    training = config.training
    if folder.keeps_own:
        state = "keeps what is there"
    elif folder.results:
        state = "holds results of an earlier run, which are replaced"
    else:
        state = "holds no results" if folder.directory.exists() else "is made"
    lines = [f"{folder.directory} {state}"]
    weights = "adapter_model.safetensors, adapter_config.json" if config.model.tuning == "lora" else "model.safetensors"
    lines.append(f"  config.yaml, metrics.jsonl, timings.jsonl, run.json, the tokenizer, {weights}")
    problem = data.tuning_problem(config)
    if data.validation is not None:
        optional = (
            ("null_odds.json", data.version_2),
            ("calibration.json", training.tune_on != "no" and data.is_validation_scored and not problem),
            ("logits.npy", config.evaluation.gather == "logits"),
        )
        names = [
            "metrics.json",
            "predictions.json",
            "nbest.json",
            *(name for name, is_written in optional if is_written),
        ]
        lines.append(f"  {', '.join(names)}")
    if problem:
        lines.append(f"  {UNTUNED}: {problem}")
    if training.keep == "best" and training.eval_steps != "no" and data.is_validation_scored:
        lines.append(f"  {BEST}/ with the best weights so far")
    if training.checkpointing_steps != "no":
        kept = training.checkpoint_total_limit
        lines.append(f"  {CHECKPOINTS}/ with {f'the newest {kept}' if kept else 'all'} checkpoints")
    return lines
