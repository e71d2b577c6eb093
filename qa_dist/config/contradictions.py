"""Which options of the model, of the training, and of both contradict each other."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from qa_dist.config.texts import shown, whole_number

_OF_LORA = ("lora_", "use_rslora", "use_dora")


def model_problems(model: Any) -> Iterable[str]:
    """What contradicts what in a `ModelConfig`, a sentence each."""
    if model.quantization != "no":
        if model.tuning == "full":
            yield f"--quantization {model.quantization} freezes what --tuning full trains; use --tuning lora"
        if model.model_config is not None:
            yield (
                f"--quantization {model.quantization} quantises the weights of a checkpoint as it is read, and "
                "--model_config has none; name a checkpoint with --model_name_or_path"
            )
    if model.init_adapter is not None and model.tuning == "full":
        yield f"--init_adapter {model.init_adapter} goes on from LoRA adapters but --tuning is full; drop one"
    if model.init_adapter is not None and model.model_config is not None:
        yield f"--init_adapter {model.init_adapter} is on a checkpoint and --model_config has none; drop one"
    if model.tuning == "full":
        # Only what was set to something else than its default is a contradiction.
        for item in dataclasses.fields(model):
            name = item.name
            if (name.startswith(_OF_LORA) or name == "init_lora_weights") and getattr(model, name) != item.default:
                yield f"--{name} sets up LoRA but --tuning is full; drop it or use --tuning lora"
    if model.lora_implementation == "grouped":
        others = {
            "--use_dora": model.use_dora,
            f"--quantization {model.quantization}": model.quantization != "no",
        }
        for other in (name for name, is_given in others.items() if is_given):
            yield f"--lora_implementation grouped does not work with {other}; drop it: auto leaves such layers to peft"
    if not model.lora_target_modules:
        yield "--lora_target_modules is empty; use attention, all-linear or module names"
    if len(model.lora_target_modules) > 1 and {"attention", "all-linear"} & set(model.lora_target_modules):
        yield (
            f"--lora_target_modules {','.join(model.lora_target_modules)} mixes a keyword with names; "
            "give attention, all-linear or names alone"
        )
    if model.init_lora_weights != "default":
        wanted = f"--init_lora_weights {model.init_lora_weights}"
        if model.use_dora:
            yield f"{wanted} does not go with --use_dora, whose magnitudes are not a product; drop one"
        if model.use_rslora:
            yield f"{wanted} is saved with twice the rank, for which --use_rslora has another scale; drop one"
        if model.quantization != "no":
            yield f"{wanted} changes the frozen weights and --quantization {model.quantization} packs them; drop one"
        if model.init_adapter is not None:
            yield f"{wanted} is for new adapters and --init_adapter {model.init_adapter} names old ones; drop one"


def training_problems(training: Any) -> Iterable[str]:
    """What contradicts what in a `TrainingConfig`, a sentence each."""
    if training.tf32 and training.mixed_precision != "no":
        yield f"--tf32 is about float32 products and --mixed_precision is {training.mixed_precision}; keep one of them"
    if training.residual_dtype == "bf16" and training.mixed_precision != "bf16":
        yield (
            f"--residual_dtype bf16 rounds what layers hand on and --mixed_precision is {training.mixed_precision}; "
            "use --mixed_precision bf16, or --residual_dtype float32"
        )
    if training.eval_steps not in ("epoch", "no") and whole_number(training.eval_steps) < 1:
        yield f"--eval_steps {shown(training.eval_steps)} is not a number of 1 or more, `epoch` or `no`"
    every = training.checkpointing_steps
    if every not in ("epoch", "no") and whole_number(every) < 1:
        yield f"--checkpointing_steps {shown(every)} is not a number of 1 or more, `epoch` or `no`"
    if training.resume_from_checkpoint not in ("no", "auto") and training.overwrite_output_dir:
        yield (
            f"--overwrite_output_dir starts anew and --resume_from_checkpoint {training.resume_from_checkpoint} does "
            "not; keep one of them"
        )
    if training.early_stopping_patience is not None and training.eval_steps == "no":
        yield "--early_stopping_patience needs evaluations but --eval_steps is no; set it to epoch or a number"


def run_problems(config: Any) -> Iterable[str]:
    """What contradicts what between the groups of a `RunConfig`, a sentence each."""
    training, tuning = config.training, config.model.tuning
    if tuning == "full" and training.loraplus_lr_ratio is not None:
        yield "--loraplus_lr_ratio is about LoRA adapters but --tuning is full; drop it or use --tuning lora"
    if config.model.quantization != "no" and training.residual_dtype == "bf16":
        yield (
            f"--residual_dtype bf16 rounds what norms give and --quantization {config.model.quantization} leaves them "
            "in float32; drop one"
        )
    if config.model.padding not in ("auto", "unpadded") and training.residual_dtype == "bf16":
        yield (
            f"--residual_dtype bf16 is for rows without padding and --padding is {config.model.padding}; drop one of "
            "them"
        )
