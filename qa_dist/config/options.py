"""Every option of qa_dist: what it means, what it may be, and how a recipe and flags become one configuration.

Options live in four frozen dataclasses. A recipe (YAML, flat, the same names) overrides the defaults, flags override
the recipe, and every problem of all of them is reported at once. The same dataclasses print `--help`, the table in the
documentation and the `config.yaml` written beside results, which can be passed back with `--config`.

This module imports neither torch nor transformers, so that `--help` and mistakes answer at once.
"""

import argparse
import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from qa_dist.common.errors import ConfigError, UserError
from qa_dist.common.parsers import ParseError, read_yaml
from qa_dist.common.secrets import masked

T = TypeVar("T")

_NO_VALUE = object()
_EARLIER = "the earlier run's configuration"
_LARGEST_INTEGER = 2**63 - 1
_MOST_DIGITS = 20
_LONGEST_SHOWN = 80

_MOST_SYNTHETIC = 10_000_000

MODEL_TYPES_UNPADDED = ("bert", "distilbert", "electra", "modernbert", "roberta")
"""Architectures whose attention can run on one row of real tokens."""


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
) -> Any:
    """A dataclass field with its help and the range of its values (minimum, maximum inclusive; above, below not).

    `fixed` marks what decides the steps of a run: a run that is resumed must have the same value.
    """
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    return field(default=default, metadata={"help": help, "limits": limits, "required": required, "fixed": fixed})


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where examples come from and how they become features."""

    dataset_name: str | None = option(
        None,
        "a hub id (squad, squad_v2, or any data set of that schema), a local folder of that schema, "
        "`sample` (embedded in the package; used when no source is named) or `synthetic:N` (N generated examples)",
    )
    dataset_config_name: str | None = option(None, "configuration of the hub data set")
    train_file: str | None = option(None, "training data: SQuAD JSON, or JSONL, CSV or Parquet rows; .gz allowed")
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
        """Contradictions inside this group."""
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
                    f"--dataset_name {_shown(self.dataset_name)} is not synthetic:N with N from 1 to "
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
    use_rslora: bool = option(False, "rank-stabilised scale alpha/sqrt(r) (Kalajdzievski 2023)", fixed=True)
    use_dora: bool = option(False, "weight-decomposed adapters (Liu et al. 2024)", fixed=True)
    padding: Literal["auto", "unpadded", "sorted", "max_length"] = option(
        "auto",
        "unpadded computes real tokens only; sorted pads a micro-batch to its longest feature; max_length pads to "
        "--max_seq_length; auto is unpadded where the architecture allows it, else sorted",
    )
    show_structure: bool = option(False, "list every trainable tensor with its shape before training")

    def problems(self) -> Iterable[str]:
        """Contradictions inside this group."""
        if self.quantization != "no":
            if self.tuning == "full":
                yield f"--quantization {self.quantization} freezes what --tuning full trains; use --tuning lora"
            if self.model_config is not None:
                yield (
                    f"--quantization {self.quantization} quantises the weights of a checkpoint as it is read, and "
                    "--model_config has none; name a checkpoint with --model_name_or_path"
                )
        if self.tuning == "full":
            # Only what was set to something else than its default is a contradiction.
            for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora"):
                if getattr(self, name) != defaults(type(self))[name]:
                    yield f"--{name} sets up LoRA but --tuning is full; drop it or use --tuning lora"
        if not self.lora_target_modules:
            yield "--lora_target_modules is empty; use attention, all-linear or module names"
        if len(self.lora_target_modules) > 1 and {"attention", "all-linear"} & set(self.lora_target_modules):
            yield (
                f"--lora_target_modules {','.join(self.lora_target_modules)} mixes a keyword with names; "
                "give attention, all-linear or names alone"
            )


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
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = option(
        "linear", "shape of the decay after warm-up", fixed=True
    )
    warmup_ratio: float = option(
        0.1, "share of all steps over which the learning rate rises from 0", minimum=0, below=1, fixed=True
    )
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = option(
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
    tf32: bool = option(
        False, "let CUDA round the inputs of float32 matrix products to 10 bits of mantissa", fixed=True
    )
    cpu_offload: bool = option(
        False,
        "with ZeRO, keep the optimiser's state (and with ZeRO-3 the weights) in the memory of the host, as the offload "
        "files in ds_configs/ do",
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    torch_compile: bool = option(
        False, "compile the encoder: minutes at the start, for fused elementwise operations in every step"
    )
    eval_steps: str = option("epoch", "evaluate every N steps, every `epoch`, or `no` times during training")
    eval_on_start: bool = option(False, "evaluate before the first step too")
    metric_for_best_model: Literal["f1", "exact_match", "loss"] = option(
        "f1", "what makes an evaluation the best so far", fixed=True
    )
    keep: Literal["best", "last"] = option("best", "which weights the run ends with")
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
        """Contradictions inside this group."""
        if self.tf32 and self.mixed_precision != "no":
            yield f"--tf32 is about float32 products and --mixed_precision is {self.mixed_precision}; keep one of them"
        if self.eval_steps not in ("epoch", "no") and whole_number(self.eval_steps) < 1:
            yield f"--eval_steps {_shown(self.eval_steps)} is not a number of 1 or more, `epoch` or `no`"
        every = self.checkpointing_steps
        if every not in ("epoch", "no") and whole_number(every) < 1:
            yield f"--checkpointing_steps {_shown(every)} is not a number of 1 or more, `epoch` or `no`"
        if self.resume_from_checkpoint not in ("no", "auto") and self.overwrite_output_dir:
            yield (
                f"--overwrite_output_dir starts anew and --resume_from_checkpoint {self.resume_from_checkpoint} does "
                "not; keep one of them"
            )
        if self.early_stopping_patience is not None and self.eval_steps == "no":
            yield "--early_stopping_patience needs evaluations but --eval_steps is no; set it to epoch or a number"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """From logits to answers."""

    decoding: Literal["span", "n_best"] = option(
        "span",
        "span searches all spans; n_best pairs the best starts and ends as the Hugging Face examples do",
    )
    n_best_size: int = option(20, "candidates kept per feature and answers per example", minimum=1, maximum=1000)
    max_answer_length: int = option(30, "longest answer, in tokens", minimum=1)
    null_score_diff_threshold: float = option(
        0.0, "answer nothing when the null score beats the best span by more than this (with unanswerable questions)"
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
        """Contradictions inside this group."""
        if math.isnan(self.null_score_diff_threshold):
            yield "--null_score_diff_threshold is nan; give a number"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run, whole."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

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


def whole_number(text: str) -> int:
    """The number that up to 18 digits stand for; -1 for any other text."""
    return int(text) if text.isdecimal() and len(text) <= 18 else -1


def defaults(group: type[Any]) -> dict[str, Any]:
    """Default of each option of a group."""
    return {item.name: item.default for item in dataclasses.fields(group)}


def recipe_path(name: str) -> Path:
    """The YAML file that `--config NAME` means: a path, or the name of a recipe shipped with the package.

    Raises:
        ConfigError: There is neither.
    """
    path = Path(name)
    # Not Path.is_file, which raises for a name that no file can have.
    if os.path.isfile(path):
        return path
    recipes = Path(str(resources.files("qa_dist"))) / "recipes"
    shipped = recipes / f"{name}.yaml"
    if os.path.isfile(shipped):
        return shipped
    names = ", ".join(sorted(recipe.stem for recipe in recipes.glob("*.yaml")))
    raise ConfigError([f"--config {_shown(name)} is neither a file nor a recipe; recipes are: {names}"])


def read_recipe(name: str) -> dict[str, Any]:
    """Options of a recipe under their flag names.

    Raises:
        ConfigError: The file is missing, is not YAML, holds an option twice, or is not a mapping.
    """
    path = recipe_path(name)
    try:
        text = path.read_text(encoding="utf-8-sig")
        loaded = read_yaml(text)
    except OSError as error:
        raise ConfigError([f"--config {path} cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"--config {path} is not UTF-8 (byte {error.start:,}); convert the file"]) from error
    except ParseError as error:
        raise ConfigError([f"--config {path} cannot be used as YAML: {error}"]) from error
    if not text.strip():
        raise ConfigError([f"--config {path} is empty; write a line `name: value` for each option"])
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        found = "a list" if isinstance(loaded, list) else f"only {_shown(loaded)}"
        raise ConfigError([f"--config {path} holds {found}; write a line `name: value` for each option"])
    return loaded


def write_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as a recipe that `--config` reads back to the same configuration."""
    import yaml

    path.write_text(yaml.safe_dump(config.flat(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def parse(
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    groups: Sequence[str] = tuple(GROUPS),
    entry: type[T] | None = None,
    base: Mapping[str, Any] | None = None,
) -> tuple[RunConfig, T]:
    """The configuration that flags, the recipe they name and `base` describe.

    Args:
        argv: The command line without the program's name.
        prog: Name shown in help and errors.
        description: First lines of the help.
        groups: Option groups this entry takes as flags. A recipe may hold options of the other groups, so that one file
            serves every entry.
        entry: A dataclass of options that belong to this entry alone.
        base: Options that recipe and flags override, as from the `config.yaml` of an earlier run: those of the groups,
            not the entry's own, because such a file may come from somebody else.

    Returns:
        The run's configuration and the entry's own options.

    Raises:
        ConfigError: With every problem found: unknown options, wrong types, values out of range, contradictions.
    """
    own = [GROUPS[name] for name in groups] + ([entry] if entry else [])
    flags, problems = _read_flags(argv, own, prog, description)
    layers: list[tuple[str, Mapping[str, Any]]] = [(_EARLIER, base or {})]
    is_recipe_read = True
    if "config" in flags:
        name = str(flags.pop("config"))
        try:
            layers.append((f"--config {name}", read_recipe(name)))
        except ConfigError as error:
            problems.extend(error.problems)
            is_recipe_read = False
    layers.append(("", flags))
    known = [*GROUPS.values(), *([entry] if entry else [])]
    names = {item.name: item for group in known for item in dataclasses.fields(group)}
    common = {item.name for group in GROUPS.values() for item in dataclasses.fields(group)}
    hints = {name: hint for group in known for name, hint in typing.get_type_hints(group).items()}
    values: dict[str, Any] = {}
    for where, layer in layers:
        for name in _superseded(layer):
            values.pop(name, None)
        for name, raw in layer.items():
            if name not in names or (where == _EARLIER and name not in common):
                problems.append(_unknown(name, common if where == _EARLIER else names, where))
                continue
            try:
                values[name] = _limited(names[name], _convert(raw, hints[name]))
            except ValueError as error:
                problems.append(f"{where + ': ' if where else ''}--{name} {_shown(raw)} {error}")
    # What was given and refused is not missing, and what a recipe would have said that cannot be read is not known.
    given = {name for _, layer in layers for name, raw in layer.items() if raw is not None}
    given |= {word[2:] for word in argv if word.startswith("--")}
    for group in own:
        for item in dataclasses.fields(group):
            is_missing = values.get(item.name) is None and item.name not in given
            if item.metadata.get("required") and is_missing and is_recipe_read:
                problems.append(f"--{item.name} is missing; give the {item.metadata['help']}")
    built: dict[type[Any], Any] = {}
    for group in known:
        built[group] = group(
            **{item.name: values[item.name] for item in dataclasses.fields(group) if item.name in values}
        )
        if hasattr(group, "problems"):
            problems.extend(built[group].problems())
    if problems:
        raise ConfigError(problems)
    run = RunConfig(**{name: built[group] for name, group in GROUPS.items()})
    return run, (built[entry] if entry else None)  # type: ignore[return-value]


def _superseded(layer: Mapping[str, Any]) -> list[str]:
    """Options of lower layers that a choice in this one makes meaningless, so that they do not contradict it."""
    names: list[str] = []
    if layer.get("dataset_name") is not None:
        names += ["dataset_config_name", "train_file", "validation_file"]
    elif layer.get("train_file") is not None or layer.get("validation_file") is not None:
        names += ["dataset_name", "dataset_config_name"]
    if layer.get("tuning") == "full":
        names += [
            name for name in defaults(ModelConfig) if name.startswith("lora_") or name in ("use_rslora", "use_dora")
        ]
    return names


def peek(argv: Sequence[str], flag: str) -> str | None:
    """Value of one flag, before the command line is parsed as a whole; None if it is absent."""
    for position, word in enumerate(argv):
        if word == f"--{flag}" and position + 1 < len(argv):
            return argv[position + 1]
        if word.startswith(f"--{flag}="):
            return word.partition("=")[2]
    return None


def _read_flags(
    argv: Sequence[str], groups: Sequence[type[Any]], prog: str, description: str
) -> tuple[dict[str, Any], list[str]]:
    """Raw flag values by name, and complaints about words that are no flags of these groups."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        nargs="?",
        const=_NO_VALUE,
        default=argparse.SUPPRESS,
        help="a recipe: a YAML file, or the name of a shipped one",
    )
    for group in groups:
        section = parser.add_argument_group(f"{group.__name__.removesuffix('Config').lower()} options", group.__doc__)
        hints = typing.get_type_hints(group)
        for item in dataclasses.fields(group):
            boolean = bool in (hints[item.name], *typing.get_args(hints[item.name]))
            const = True if boolean else _NO_VALUE
            section.add_argument(
                f"--{item.name}",
                metavar=type_name(hints[item.name]),
                default=argparse.SUPPRESS,
                help=f"{item.metadata['help']} ({_default_text(item)})".replace("%", "%%"),
                nargs="?",
                const=const,
            )
    problems: list[str] = []
    namespace, rest = parser.parse_known_args(list(argv))
    flags = vars(namespace)
    for name in [name for name, value in flags.items() if value is _NO_VALUE]:
        problems.append(
            f"--{name} has no value; write it behind the option, as --{name}=VALUE if it begins with a dash"
        )
        del flags[name]
    if sum(word == "--config" or word.startswith("--config=") for word in argv) > 1:
        problems.append("--config is given more than once; give one recipe, and what differs from it as flags")
    names = {item.name: item for group in groups for item in dataclasses.fields(group)}
    for position, word in enumerate(rest):
        if word.startswith("--"):
            problems.append(_unknown(word[2:].partition("=")[0], names, ""))
        elif not (position and rest[position - 1].startswith("-")):
            problems.append(f"{_shown(word)} is not an option; every value follows the --name it belongs to")
    return flags, problems


def _unknown(name: str, names: Iterable[str], where: str) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    hint = f"did you mean --{close[0]}?" if close else "see --help for all options"
    return f"{where + ': ' if where else ''}--{_shown(name)} is no option here; {hint}"


def _convert(raw: Any, hint: Any) -> Any:
    """`raw`, a YAML value or the text of a flag, as the type of its option.

    Raises:
        ValueError: It is not of that type; the message continues "--name value ...".
    """
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        inner = next(part for part in typing.get_args(hint) if part is not type(None))
        if raw is None or (isinstance(raw, str) and raw.lower() in ("auto", "none", "null")):
            return None
        return _convert(raw, inner)
    if origin is Literal:
        choices = typing.get_args(hint)
        if raw not in choices:
            raise ValueError(f"is not one of {', '.join(choices)}")
        return raw
    if origin is tuple:
        if raw is None:
            return ()
        parts = raw if isinstance(raw, list | tuple) else raw.split(",") if isinstance(raw, str) else [raw]
        if not all(isinstance(part, str | int) and not isinstance(part, bool) for part in parts):
            raise ValueError("is not a list of names")
        return tuple(_text(str(part).strip()) for part in parts if str(part).strip())
    if hint is bool:
        if isinstance(raw, str) and raw.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0"):
            return raw.lower() in ("true", "yes", "on", "1")
        if not isinstance(raw, bool):
            raise ValueError("is not true or false")
        return raw
    if hint is str:
        if isinstance(raw, bool | float):
            raise ValueError("is not text; put it in quotes")
        if not isinstance(raw, str | int):
            raise ValueError("is not text")
        return _text(str(raw))
    if isinstance(raw, bool):
        raise ValueError(f"is not {'an integer' if hint is int else 'a number'}")
    if isinstance(raw, str) and raw.lstrip("+-").isdecimal() and len(raw) > _MOST_DIGITS:
        raise ValueError("has too many digits")
    try:
        number = float(raw)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"is not {'an integer' if hint is int else 'a number'}") from None
    if hint is int:
        if not number.is_integer():
            raise ValueError("is not an integer")
        return int(raw) if isinstance(raw, str) and raw.lstrip("+-").isdecimal() else int(number)
    return number


def _text(value: str) -> str:
    """`value`, or a ValueError if it is nothing, cannot be a name or path, or is what nobody else should read."""
    if not value:
        raise ValueError("is empty; give a value or leave the option out")
    if "\0" in value:
        raise ValueError("holds the character NUL, which no name or path can have")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8; rename what it names") from None
    if value.startswith("~") and os.path.expanduser(value) == value:
        raise ValueError("begins with the home folder of a user who does not exist; write ./~ for a name with a tilde")
    if masked(value) != value:
        raise ValueError(
            "holds what looks like an access token or password, which would be written into logs and results; give a "
            "token in the environment, as HF_TOKEN"
        )
    return value


def _limited(item: "dataclasses.Field[Any]", value: Any) -> Any:
    """`value`, or a ValueError that says which values the option allows."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return value
    limits = dict(item.metadata["limits"])
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        limits["maximum"] = limits["maximum"] or _LARGEST_INTEGER
    allowed = []
    fits = math.isfinite(value) if isinstance(value, float) else True
    tests: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
        ("minimum", "at least", lambda limit: value >= limit),
        ("above", "above", lambda limit: value > limit),
        ("maximum", "at most", lambda limit: value <= limit),
        ("below", "below", lambda limit: value < limit),
    )
    for name, text, test in tests:
        if limits[name] is not None:
            allowed.append(f"{text} {limits[name]}")
            fits = fits and test(limits[name])
    if not fits:
        raise ValueError(f"is out of range; it must be {' and '.join(allowed) or 'a finite number'}")
    return value


def _shown(raw: Any) -> str:
    """A value as messages show it: on one line, not too long, without secrets."""
    # As recipes and flags write them.
    text = {None: "null", True: "true", False: "false"}[raw] if raw is None or isinstance(raw, bool) else str(raw)
    text = masked(text)
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[:_LONGEST_SHOWN]}..."
    return repr(text) if not text or " " in text or not text.isprintable() else text


def type_name(hint: Any) -> str:
    """Short name of an option's type, for help and documentation."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return next(type_name(part) for part in typing.get_args(hint) if part is not type(None))
    if origin is Literal:
        return "|".join(typing.get_args(hint))
    if origin is tuple:
        return "NAME,..."
    return {"str": "TEXT", "int": "N", "float": "X", "bool": "true|false"}[hint.__name__]


def _default_text(item: "dataclasses.Field[Any]") -> str:
    if item.metadata["required"]:
        return "required"
    if item.default is None:
        return (
            "default: none"
            if "none:" in item.metadata["help"] or "auto:" not in item.metadata["help"]
            else "default: auto"
        )
    if isinstance(item.default, tuple):
        return f"default: {','.join(item.default) or 'none'}"
    return f"default: {str(item.default).lower() if isinstance(item.default, bool) else item.default}"


def option_table(groups: Mapping[str, type[Any]] = types.MappingProxyType(GROUPS)) -> str:
    """Every option as Markdown tables, one per group: the documentation's source."""
    lines: list[str] = []
    for name, group in groups.items():
        hints = typing.get_type_hints(group)
        lines += [f"**{name}** — {group.__doc__}", "", "| option | values | default | meaning |", "|---|---|---|---|"]
        for item in dataclasses.fields(group):
            values = type_name(hints[item.name]).replace("|", " \\| ")
            default = _default_text(item).removeprefix("default: ")
            lines.append(
                f"| `--{item.name}` | {values} | {default} | {item.metadata['help'].replace('|', chr(92) + '|')} |"
            )
        lines.append("")
    return "\n".join(lines)


__all__ = [
    "GROUPS",
    "MODEL_TYPES_UNPADDED",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "RunConfig",
    "TrainingConfig",
    "UserError",
    "defaults",
    "option",
    "option_table",
    "parse",
    "peek",
    "read_recipe",
    "recipe_path",
    "type_name",
    "whole_number",
    "write_config",
]
