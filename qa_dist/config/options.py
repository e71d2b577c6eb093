"""Every option of a run: what it means, which values it may have, and which of them contradict each other.

Options live in four frozen dataclasses, which also print `--help` and the tables of the documentation. `problems` of a
group yields one sentence for each contradiction between its options, `option` holds the range of one. `parsing` reads
flags and a recipe into them.

This module imports neither torch nor transformers, so that `--help` and mistakes answer at once.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from qa_dist.common.notebook import ShownAsText
from qa_dist.config.answer_rules import AnswerNormalization
from qa_dist.config.contradictions import model_problems, run_problems, training_problems
from qa_dist.config.optimizers import OptimizerName
from qa_dist.config.texts import shown, whole_number

_MOST_SYNTHETIC = 10_000_000


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    required: bool = False,
    fixed: bool = False,
    booleans: tuple[str, str] | None = None,
) -> Any:
    """A dataclass field with its help and the range of its values (minimum, maximum inclusive; above, below not).

    `fixed` marks what decides the steps of a run: a run that is resumed must have the same value. `booleans` are the
    values that false and true stand for, in recipes from a time when the option was one or the other.
    """
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    metadata = {"help": help, "limits": limits, "required": required, "fixed": fixed, "booleans": booleans}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where examples come from and how they become features."""

    dataset_name: str | None = option(
        None,
        "a hub id (squad, squad_v2, or any data set of that schema), a local folder of files of that schema or saved "
        "with save_to_disk, `sample` (embedded in the package; used when no source is named) or `synthetic:N` (N "
        "generated examples)",
    )
    dataset_config_name: str | None = option(None, "configuration of the hub data set")
    train_file: str | None = option(
        None,
        "training data: SQuAD JSON, or JSONL, CSV, TSV or Parquet as in docs/data.md; .gz allowed; or a folder",
    )
    validation_file: str | None = option(None, "validation data, same formats as --train_file")
    version_2_with_negative: bool | None = option(
        None, "whether questions may have no answer; auto: true if the data has such questions"
    )
    max_seq_length: int = option(384, "tokens per feature, special tokens included", minimum=16)
    doc_stride: int = option(
        128, "tokens that consecutive windows of a context share (an overlap, not a step)", minimum=0
    )
    max_question_length: int | None = option(
        None,
        "questions longer than this many tokens are cut and counted; auto: as long as the window allows",
        minimum=1,
    )
    max_train_samples: int | None = option(None, "use this many training examples", minimum=1)
    max_eval_samples: int | None = option(None, "use this many validation examples", minimum=1)
    max_train_features: int | None = option(None, "use this many training features", minimum=1, fixed=True)
    max_eval_features: int | None = option(
        None,
        "evaluations during training compute only the loss, on this many features; the final evaluation stays whole",
        minimum=1,
    )
    subset_seed: int | None = option(
        None,
        "draw the --max_*_samples and --max_*_features at random with this seed, as `Dataset.shuffle(seed)` does; "
        "auto: take the first ones",
        minimum=0,
    )
    on_invalid: Literal["error", "drop"] = option("error", "what to do with records that fail validation")
    preprocessing_num_workers: int | None = option(
        None, "processes that tokenise; auto: one per core, at most 16", minimum=1
    )
    store_dir: str | None = option(
        None, "folder of prepared feature stores; auto: $QA_DIST_STORE, else qa_dist in the user's cache folder"
    )

    def problems(self) -> Iterable[str]:
        if self.dataset_name and (self.train_file or self.validation_file):
            yield (
                f"--dataset_name {self.dataset_name} and --train_file/--validation_file name two sources; "
                "keep one of them"
            )
        if self.dataset_config_name and not self.dataset_name:
            yield "--dataset_config_name needs --dataset_name; name the data set or leave it out"
        if self.dataset_name and self.dataset_name.startswith("synthetic"):
            count = self.dataset_name.removeprefix("synthetic:")
            if not 1 <= whole_number(count) <= _MOST_SYNTHETIC:
                yield (
                    f"--dataset_name {shown(self.dataset_name)} is not synthetic:N with N from 1 to "
                    f"{_MOST_SYNTHETIC:,}, as synthetic:10000"
                )
        # [CLS] question [SEP] context [SEP]; RoBERTa-like models spend four special tokens.
        longest_question = self.max_seq_length - 4 - self.doc_stride - 1
        if longest_question < 1:
            yield (
                f"--doc_stride {self.doc_stride} leaves no room in --max_seq_length {self.max_seq_length}: a window "
                f"must advance, so the stride may be at most {max(0, self.max_seq_length - 6)} here; lower the stride "
                "or raise the length"
            )
        elif self.max_question_length is not None and self.max_question_length > longest_question:
            yield (
                f"--max_question_length {self.max_question_length} with --max_seq_length {self.max_seq_length} and "
                f"--doc_stride {self.doc_stride} leaves no room for context; at most {longest_question} fits"
            )
        if self.subset_seed is not None and not any(
            (self.max_train_samples, self.max_eval_samples, self.max_train_features, self.max_eval_features)
        ):
            yield "--subset_seed draws a subset but no --max_*_samples or --max_*_features asks for one; add or drop it"

    @property
    def source(self) -> str:
        """The data set's name: `sample` where the user named none."""
        return self.dataset_name or "sample"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The encoder, and what is trained of it."""

    model_name_or_path: str = option(
        "google-bert/bert-base-uncased",
        "hub id or local folder of the encoder, or package:NAME/FOLDER for one shipped inside a Python package",
    )
    model_revision: str = option("main", "branch, tag or commit of the hub model")
    model_config: str | None = option(
        None,
        "random weights instead of a checkpoint's, to measure speed with: bert-base, bert-large, minilm-l6, or a "
        "folder with a config.json",
        fixed=True,
    )
    tokenizer_name: str | None = option(None, "tokenizer, if it is not the model's own")
    cache_dir: str | None = option(None, "folder for downloaded models; auto: the hub library's own")
    model_dropout: float | None = option(
        None,
        "all dropout probabilities of the encoder; auto: as in the model's configuration",
        minimum=0,
        below=1,
        fixed=True,
    )
    tuning: Literal["lora", "full"] = option("lora", "train LoRA adapters and the head, or everything", fixed=True)
    quantization: Literal["no", "8bit", "4bit"] = option(
        "no",
        "load the frozen linear layers in 8 bits (LLM.int8) or 4 bits (NF4), through bitsandbytes; head, adapters, "
        "embeddings and norms stay in float32",
        fixed=True,
    )
    init_adapter: str | None = option(
        None, "folder of an adapter on this model to go on from with new data, instead of new adapters and a new head"
    )
    lora_r: int = option(8, "rank of the adapters", minimum=1, fixed=True)
    lora_alpha: float = option(
        16, "numerator of the adapters' scale (alpha/r; alpha/sqrt(r) with --use_rslora)", above=0, fixed=True
    )
    lora_dropout: float = option(0.1, "dropout before the adapters", minimum=0, below=1, fixed=True)
    lora_target_modules: tuple[str, ...] = option(
        ("attention",),
        "layers that get adapters: `attention` (query and value projections, whatever the architecture calls them), "
        "`all-linear` (every linear layer of the encoder), or module names separated by commas",
        fixed=True,
    )
    init_lora_weights: Literal["default", "pissa", "olora"] = option(
        "default",
        "how adapters begin: default draws A and lets B be zero; pissa takes the largest singular vectors of the "
        "layer's weights (Meng et al. 2024), olora the first columns of their QR decomposition (Buyukakyuz 2024), and "
        "both take them off the frozen weights; what is saved has twice the rank and is for the weights as they were",
        fixed=True,
    )
    lora_bias: Literal["none", "all"] = option(
        "none", "biases of the encoder that are trained beside the adapters, those of its norms included", fixed=True
    )
    use_rslora: bool = option(False, "rank-stabilised scale alpha/sqrt(r) (Kalajdzievski 2023)", fixed=True)
    use_dora: bool = option(False, "weight-decomposed adapters (Liu et al. 2024)", fixed=True)
    lora_implementation: Literal["auto", "grouped", "peft"] = option(
        "auto",
        "`grouped` computes layers that read one input, and their adapters, as one product, in about half the "
        "launches; `peft` layer by layer, as peft does; auto: grouped on CUDA, if a check at the start finds it equal",
    )
    padding: Literal["auto", "unpadded", "sorted", "max_length"] = option(
        "auto",
        "unpadded computes real tokens only; sorted pads a micro-batch to its longest feature; max_length pads to "
        "--max_seq_length; auto is unpadded where the architecture allows it, else sorted",
    )
    show_structure: bool = option(False, "list every trainable tensor with its shape before training")

    def problems(self) -> Iterable[str]:
        return model_problems(self)


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
        None, "stop after this many optimiser steps, whatever the epochs", minimum=1, fixed=True
    )
    global_batch_size: int = option(16, "features per optimiser step, over all ranks", minimum=1, fixed=True)
    max_tokens_per_device: int | None = option(
        None,
        "tokens of one forward pass on one rank; auto: measured on CUDA, 1024 on CPU. Out of memory halves it, on all "
        "ranks, and repeats the step",
        minimum=16,
    )
    learning_rate: float = option(3e-4, "highest learning rate", above=0, fixed=True)
    loraplus_lr_ratio: float | None = option(
        None, "learning rate of the adapters' B over that of A (LoRA+, Hayou et al. 2024); none: 1", above=0, fixed=True
    )
    head_lr_ratio: float | None = option(
        None, "learning rate of the head over that of the rest; none: 1", above=0, fixed=True
    )
    layer_decay: float | None = option(
        None,
        "learning rate of a layer, or of its adapters, over that of the next one up, from the head down to the "
        "embeddings (Howard and Ruder 2018); none: 1",
        above=0,
        maximum=1,
        fixed=True,
    )
    ema_decay: float | None = option(
        None,
        "evaluate and save an exponential average of the weights: so much of it stays in each step, less in the first "
        "ones; none: the weights themselves",
        above=0,
        below=1,
        fixed=True,
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = option(
        "linear", "shape of the decay after warm-up", fixed=True
    )
    warmup_ratio: float = option(
        0.1, "share of all steps over which the learning rate rises from 0", minimum=0, below=1, fixed=True
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
        "type in which layers hand on to each other: float32, or with --mixed_precision bf16 and rows without "
        "padding bf16, in which residuals are added and norms are read and written; that halves what they move, and "
        "rounds it",
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

    def problems(self) -> Iterable[str]:
        return training_problems(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """From logits to answers."""

    decoding: Literal["span", "n_best"] = option(
        "span",
        "span searches all spans; n_best pairs the best starts and ends as the Hugging Face examples do",
    )
    n_best_size: int = option(20, "candidates kept per feature and answers per example", minimum=1, maximum=1000)
    max_answer_length: int = option(30, "longest answer, in tokens", minimum=1)
    answer_normalization: AnswerNormalization = option(  # noqa: RUF009 - a field, as `optim` is
        "squad",
        "whose rules say which answers are the same and what F1 counts: those of the official scripts of SQuAD, XQuAD "
        "(the same), MLQA for a language, KorQuAD or CMRC 2018; none compares texts as they are, by words between "
        "blanks",
        fixed=True,
    )
    null_score_diff_threshold: float | None = option(
        None,
        "answer nothing when the null score beats the best span by more than this (with unanswerable questions); auto: "
        "as tuned for the model, else 0",
    )
    gather: Literal["candidates", "logits"] = option(
        "candidates", "what rank 0 collects: the best spans of each feature, or all logits (kept in logits.npy)"
    )
    eval_tokens_per_device: int | None = option(
        None,
        "tokens of one forward pass in evaluation, the same at every world size, so that scores are too; auto: 2048 on "
        "CPU, 16384 on CUDA",
        minimum=16,
    )

    def problems(self) -> Iterable[str]:
        if self.null_score_diff_threshold is not None and math.isnan(self.null_score_diff_threshold):
            yield "--null_score_diff_threshold is nan; give a number"

    @property
    def null_threshold(self) -> float:
        """Null odds above which there is no answer: 0 where nothing was chosen or tuned."""
        return 0.0 if self.null_score_diff_threshold is None else self.null_score_diff_threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(ShownAsText):
    """One run, whole."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    def __repr__(self) -> str:
        # The call of `qa_dist.configure` that gives it.
        return f"configure({', '.join(f'{name}={value!r}' for name, value in self._chosen().items())})"

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self._chosen().items())

    def _chosen(self) -> dict[str, Any]:
        """The options that are not as their defaults."""
        usual = RunConfig().flat()
        return {name: value for name, value in self.flat().items() if value != usual[name]}

    def problems(self) -> Iterable[str]:
        return run_problems(self)

    def flat(self) -> dict[str, Any]:
        """All options under their flag names, as plain YAML and JSON types."""
        merged: dict[str, Any] = {}
        for group in dataclasses.fields(self):
            for name, value in dataclasses.asdict(getattr(self, group.name)).items():
                merged[name] = list(value) if isinstance(value, tuple) else value
        return merged

    def fixed(self) -> dict[str, Any]:
        """The options that decide what each step computes, by flag name: a resumed run must repeat them."""
        names = {item.name for group in GROUPS.values() for item in dataclasses.fields(group) if item.metadata["fixed"]}
        return {name: value for name, value in self.flat().items() if name in names}


GROUPS: dict[str, type[Any]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
}


def defaults(group: type[Any]) -> dict[str, Any]:
    """Default of each option of a group."""
    return {item.name: item.default for item in dataclasses.fields(group)}
