"""Options of the training: its steps, its precision, and what is evaluated, kept and written meanwhile."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from qa_dist.config.optimizers import OptimizerName
from qa_dist.config.option import option
from qa_dist.config.texts import shown, whole_number


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """The optimisation, and what is watched and written during it."""

    output_dir: str | None = option(None, "folder for the adapter, the metrics and everything else", required=True)
    overwrite_output_dir: bool = option(False, "replace the results of an earlier run in --output_dir")
    seed: int = option(
        42, "seed of the head and adapters, the order of the features and the dropout", minimum=0, fixed=True
    )
    num_train_epochs: float = option(
        3.0, "passes over the training features; fractions are allowed", above=0, fixed=True
    )
    max_train_steps: int | None = option(
        None, "stop after this many optimiser steps, where the epochs have more", minimum=1, fixed=True
    )
    global_batch_size: int = option(16, "features per optimiser step, over all ranks", minimum=1, fixed=True)
    max_tokens_per_device: int | None = option(
        None,
        "tokens of one forward pass on one rank; auto: measured on CUDA, 1024 on CPU. Out of memory halves it, on all "
        "ranks, and repeats the step",
        minimum=16,
    )
    learning_rate: float = option(3e-4, "highest learning rate", above=0, fixed=True)
    layer_decay: float | None = option(
        None,
        "learning rate of a layer, or of its adapters, over that of the next one up, from the head down to the "
        "embeddings (Howard and Ruder 2018); none: 1",
        above=0,
        maximum=1,
        fixed=True,
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = option(
        "linear", "shape of the decay after warm-up", fixed=True
    )
    warmup_ratio: float = option(
        0.1, "share of all steps over which the learning rate rises from 0", minimum=0, below=1, fixed=True
    )
    rdrop_alpha: float = option(
        0.0,
        "above 0: compute every feature twice in a pass, with other dropout, and add to the loss so many times a "
        "divergence between what both say (R-Drop, Liang et al. 2021); takes twice the time, and twice a pass's memory",
        minimum=0,
        fixed=True,
    )
    optim: OptimizerName = option(  # noqa: RUF009 - a field; ruff does not see that the type is a Literal
        "adamw",
        "AdamW with moments in float32, or through bitsandbytes in 8 bits (of tensors with 4,096 elements or more), "
        "which paged_ moves to the host's memory while the GPU's is full",
        fixed=True,
    )
    weight_decay: float = option(0.01, "decoupled weight decay; biases and norms are left out", minimum=0, fixed=True)
    adam_beta1: float = option(0.9, "first AdamW coefficient", minimum=0, below=1, fixed=True)
    adam_beta2: float = option(0.999, "second AdamW coefficient", minimum=0, below=1, fixed=True)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", above=0, fixed=True)
    max_grad_norm: float | None = option(
        1.0, "clip the gradient to this global norm; none: do not clip", above=0, fixed=True
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no",
        "precision of the matrix products, over float32 weights; fp16 scales the loss, and skips a step that overflows",
        fixed=True,
    )
    residual_dtype: Literal["float32", "bf16"] = option(
        "float32",
        "dtype of the residual stream, which layers pass to each other: float32, or with --mixed_precision bf16 and "
        "rows without padding bf16, in which residuals are added and norms are read and written; that halves what they "
        "move, and rounds it",
        fixed=True,
    )
    gradient_exchange_dtype: Literal["float32", "bf16"] = option(
        "float32", "type in which data-parallel ranks add up gradients; bf16 sends half the bytes, rounded", fixed=True
    )
    tf32: bool = option(False, "let CUDA round the inputs of float32 products to 10 bits of mantissa", fixed=True)
    deterministic: bool = option(
        False,
        "take only operations that give the same bits in every run, so that a resumed run ends as an uninterrupted one "
        "does on GPUs too; these are slower. CPUs do without it",
        fixed=True,
    )
    cpu_offload: bool = option(
        False,
        "with ZeRO, keep the optimiser's state (and with ZeRO-3 the weights) in the memory of the host, as the offload "
        "files in ds_configs/ do",
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    torch_compile: Literal["auto", "no", "layers", "model"] = option(
        "auto",
        "compile `layers` of the encoder, one graph for all of them, or the whole `model`, which takes minutes: fewer "
        "and faster operations in every step. auto: layers on CUDA, where rows are without padding, the run is long "
        "enough and they are found to compute the same",
        booleans=("no", "model"),
        fixed=True,
    )
    cuda_graphs: Literal["auto", "no"] = option(
        "auto",
        "on a GPU, replay the passes of training and evaluation as CUDA graphs where they can be recorded and give the "
        "same losses and gradients, and the same logits; no: launch every operation",
    )
    eval_steps: str = option("epoch", "evaluate every N steps, every `epoch`, or `no` times during training")
    eval_on_start: bool = option(False, "evaluate before the first step too")
    metric_for_best_model: Literal["f1", "exact_match", "loss"] = option(
        "f1", "what makes an evaluation the best so far", fixed=True
    )
    keep: Literal["best", "last"] = option("best", "which weights the run ends with")
    tune_on: Literal["all", "half", "no"] = option(
        "all",
        "at the end, fit the temperature of probabilities, and with unanswerable questions the null threshold unless "
        "--null_score_diff_threshold sets one, on all validation questions, on those about one half of the contexts "
        "(with a report on the other), or not; neither changes the results of the run",
    )
    early_stopping_patience: int | None = option(
        None, "stop after this many evaluations in a row without a new best; none: never", minimum=1
    )
    checkpointing_steps: str = option(
        "epoch",
        "write a checkpoint every N steps, every `epoch` and at the end, or `no` times; a signal writes one too",
    )
    checkpoint_total_limit: int | None = option(
        2, "keep this many of the newest checkpoints; each holds the best weights so far too; none: keep all", minimum=1
    )
    resume_from_checkpoint: str = option(
        "no",
        "go on where a checkpoint ends: `auto` takes the newest whole one in --output_dir and starts anew if there is "
        "none (--overwrite_output_dir counts only then); else the folder of a checkpoint; `no` starts anew",
    )
    hang_timeout: float | None = option(
        900.0,
        "end the run when a rank makes no progress for this many seconds, and say where it hangs; none: never",
        above=0,
    )
    report_to: tuple[str, ...] = option((), "trackers, separated by commas: tensorboard, wandb, ... (see accelerate)")
    logging_steps: int = option(1, "report to trackers every N steps (metrics.jsonl has every step)", minimum=1)
    ddp_timeout: int = option(
        1800,
        "seconds that a rank waits for the others before the run fails; ranks wait while one of each machine prepares "
        "the features",
        minimum=1,
    )
    disable_tqdm: bool = option(False, "no progress bar")

    @property
    def evaluates_before_end(self) -> bool:
        """Whether the run is evaluated before its end too, for which it needs validation data."""
        return self.eval_steps != "no" or self.eval_on_start

    def problems(self) -> Iterable[str]:
        if self.tf32 and self.mixed_precision != "no":
            yield f"--tf32 is about float32 products and --mixed_precision is {self.mixed_precision}; keep one of them"
        if self.residual_dtype == "bf16" and self.mixed_precision != "bf16":
            yield (
                f"--residual_dtype bf16 rounds what layers hand on and --mixed_precision is {self.mixed_precision}; "
                "use --mixed_precision bf16, or --residual_dtype float32"
            )
        if self.eval_steps not in ("epoch", "no") and whole_number(self.eval_steps) < 1:
            yield f"--eval_steps {shown(self.eval_steps)} is not a number of 1 or more, `epoch` or `no`"
        every = self.checkpointing_steps
        if every not in ("epoch", "no") and whole_number(every) < 1:
            yield f"--checkpointing_steps {shown(every)} is not a number of 1 or more, `epoch` or `no`"
        if self.resume_from_checkpoint not in ("no", "auto") and self.overwrite_output_dir:
            yield (
                f"--overwrite_output_dir starts anew and --resume_from_checkpoint {self.resume_from_checkpoint} does "
                "not; keep one of them"
            )
        if self.logging_steps != 1 and not self.report_to:
            yield (
                f"--logging_steps {self.logging_steps} is about trackers and --report_to names none; drop it, or name "
                "one (metrics.jsonl has every step)"
            )
        if self.early_stopping_patience is not None and self.eval_steps == "no":
            yield "--early_stopping_patience needs evaluations but --eval_steps is no; set it to epoch or a number"
