"""How a run starts: its ranks join, its model is built. Training does so, and what only says what a run would do."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from qa_dist.config.options import RunConfig
from qa_dist.distributed.launch_config import read_launch_config
from qa_dist.distributed.ranks import Ranks
from qa_dist.evaluation.normalization import normalization
from qa_dist.model.building import build_model
from qa_dist.model.initial import start_from_adapter
from qa_dist.model.precision import precision_notes
from qa_dist.model.rdrop import require_dropout
from qa_dist.model.residual_stream import set_residual_dtype
from qa_dist.model.span_model import SpanModel
from qa_dist.model.trainable import ParameterReport, check_vocabulary
from qa_dist.training.inputs import RunData
from qa_dist.training.optimizer import require_optimizer


def use_deterministic_algorithms() -> None:
    """Let torch choose operations whose results are the same bits in every run, and raise where it has none.

    What cuBLAS needs besides is in `qa_dist.machine.cuda_environment`.
    """
    torch.use_deterministic_algorithms(True)
    # It would fill tensors before they are written to, which finds mistakes in programs and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def join_ranks(
    config: RunConfig, output_dir: Path, asked_to_stop: Callable[[], signal.Signals | None] = lambda: None
) -> Ranks:
    """The ranks that the launcher started, able to do what the configuration asks of them.

    Raises:
        ConfigError: They are not, or cannot reach each other.
    """
    training = config.training
    ranks = Ranks(
        mixed_precision=training.mixed_precision,
        compiles=_may_compile(config),
        trackers=training.report_to,
        project_dir=output_dir,
        asked_to_stop=asked_to_stop,
        hang_timeout=training.hang_timeout,
        timeout_seconds=training.ddp_timeout,
        launch_config=read_launch_config(os.environ, config),
    )
    if training.tf32:
        ranks.use_tf32()
    if training.deterministic:
        use_deterministic_algorithms()
    require_optimizer(training.optim, ranks.device.type)
    normalization(config.evaluation.answer_normalization)
    return ranks


def _may_compile(config: RunConfig) -> bool:
    """Whether the options name something to compile; on a CPU, "auto" does not."""
    return config.training.torch_compile in ("layers", "model")


def build_trainable(
    config: RunConfig, ranks: Ranks, data: RunData | None, *, tokenizer_pads_left: bool = False
) -> tuple[SpanModel, ParameterReport]:
    """The model to train, on this rank's device, and what is trained of it.

    Args:
        config: The run's options.
        ranks: Where this rank computes.
        data: What the model must have embeddings for; None: not known, and not asked.
        tokenizer_pads_left: On which side the tokenizer pads, where there is no data with one.

    Raises:
        UserError: The model cannot be loaded, or an option or the data does not fit it.
    """
    model, report = build_model(
        config.model,
        seed=config.training.seed,
        max_seq_length=config.data.max_seq_length,
        gradient_checkpointing=config.training.gradient_checkpointing,
        torch_compile=config.training.torch_compile,
        tokenizer_pads_left=tokenizer_pads_left if data is None else data.tokenizer.padding_side == "left",
        device=ranks.device,
    )
    set_residual_dtype(model, config.training.residual_dtype)
    require_dropout(config.training.rdrop_alpha, model)
    notes = precision_notes(ranks.device.type, ranks.mixed_precision, compiles=_may_compile(config))
    model.notes = (*model.notes, *notes)
    if config.model.init_adapter is not None:
        start_from_adapter(model, config.model)
    for store in data.stores.values() if data else ():
        check_vocabulary(model, store.largest_token_id)
    return model, report
