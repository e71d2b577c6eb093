"""What the launcher asks for: the strategy that holds the model, read from the environment that it made.

`accelerate launch` hands its configuration file to the processes as environment variables, and accelerate acts on them
behind the program's back: it drops DeepSpeed and FSDP on a CPU, fills in values, and steps inside the backward pass.
Here they are read once, compared with the recipe - a value is set in one place - and turned into a `LaunchConfig` that
`qa_dist.distributed.strategies.choice` carries out.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qa_dist.common.errors import ConfigError
from qa_dist.common.parsers import ParseError, read_json
from qa_dist.common.shipped import file_or_shipped
from qa_dist.config.optimizers import OPTIMIZERS
from qa_dist.config.options import RunConfig, TrainingConfig
from qa_dist.config.texts import shown
from qa_dist.distributed.zero_section import section_problems

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]

USE_VARIABLES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP"}
"""With these accelerate and transformers act on their own; `Ranks` takes them out of the environment."""

GRADIENT_BUCKET = 1 << 24
"""Elements of the gradients that are reduced at once, 64 MiB in float32, whatever the strategy.

Plain data parallelism takes it from here; the files of ds_configs/ repeat it as `reduce_bucket_size`.
"""

PARALLELISM = (
    "the launcher's parallelism_config has no effect: every rank computes whole examples, and the strategy alone says "
    "what the ranks share; remove it"
)

_DEEPSPEED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "torch_autocast",
    "zero_optimization",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
)
"""Keys of a DeepSpeed configuration that have a meaning here; DeepSpeed itself ignores keys that it does not know."""

_COMMUNICATION_TYPES = ("fp32", "fp16", "bf16")

_STAGES: dict[int, Strategy] = {1: "zero1", 2: "zero2", 3: "zero3"}

_FSDP_ALLOWED = {
    "FSDP_VERSION": (("2",), "version 1 is not supported: set fsdp_version: 2"),
    "FSDP_SHARDING_STRATEGY": (("full_shard", "1"), "FSDP2 has no such choice: set fsdp_reshard_after_forward instead"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "false"), "set it to true or false"),
    "FSDP_AUTO_WRAP_POLICY": (
        ("transformer_based_wrap", "1"),
        "qa_dist shards layer by layer: set TRANSFORMER_BASED_WRAP",
    ),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ((), "qa_dist finds the layers itself: remove it"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "only ZeRO offloads: use ds_configs/zero3_offload.json, or set it to false"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (("false",), "every rank reads the checkpoint itself: set it to false"),
    "FSDP_FORWARD_PREFETCH": (("false",), "FSDP2 has no such choice: remove it"),
    "FSDP_BACKWARD_PREFETCH": (("backward_pre", "1"), "FSDP2 has no such choice: remove it"),
    "FSDP_STATE_DICT_TYPE": (("full_state_dict", "1"), "whole tensors are saved: set FULL_STATE_DICT"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "it is not supported: set it to false"),
    "FSDP_IGNORED_MODULES": ((), "everything is sharded: remove it"),
}
"""Values, in lower case, that are honoured, and what to do about others. The rest of FSDP_* has no effect in FSDP2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How the ranks are to hold the model.

    Attributes:
        strategy: `ddp` (every rank holds all of it), `zero1` to `zero3` (DeepSpeed), `fsdp2` (torch's fully_shard).
        deepspeed: with ZeRO, DeepSpeed's configuration with every `auto` filled in; empty otherwise.
        reshard_after_forward: with FSDP2, whether a layer is freed between its forward and its backward pass.
    """

    strategy: Strategy = "ddp"
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    reshard_after_forward: bool = True

    @property
    def settings(self) -> str:
        """What belongs to the strategy, as text that is the same where the settings are."""
        if self.strategy == "fsdp2":
            return f"reshard_after_forward: {str(self.reshard_after_forward).lower()}"
        return json.dumps(dict(self.deepspeed), sort_keys=True)


def asks_for(environment: Mapping[str, str]) -> str | None:
    """`DeepSpeed` or `FSDP`, if the launcher asks for one of them."""
    for variable, name in USE_VARIABLES.items():
        if _is_true(environment.get(variable)):
            return name
    return None


def read_launch_config(environment: Mapping[str, str], config: RunConfig) -> LaunchConfig:
    """The strategy that the launcher asks for.

    Args:
        environment: The process's environment variables.
        config: The recipe, which the launcher's values may repeat but not contradict.

    Raises:
        ConfigError: With every problem: a value that contradicts the recipe, or that nothing would act on.
    """
    training = config.training
    problems = list(_launcher_problems(environment, training))
    wanted = asks_for(environment)
    launch_config: LaunchConfig | None = LaunchConfig()
    if wanted == "DeepSpeed":
        launch_config = _deepspeed_launch_config(environment, training, problems)
    elif wanted == "FSDP":
        problems.extend(_fsdp_problems(environment, training))
        reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
        launch_config = LaunchConfig(strategy="fsdp2", reshard_after_forward=reshard)
    if launch_config is not None:
        problems.extend(recipe_problems(launch_config.strategy, config))
    if problems or launch_config is None:
        raise ConfigError(problems)
    return launch_config


def _is_true(value: str | None) -> bool:
    return value is not None and value.lower() in ("true", "1", "yes")


def _launcher_problems(environment: Mapping[str, str], training: TrainingConfig) -> Iterable[str]:
    """Values that any launcher configuration may hold, compared with the recipe's."""
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", training.mixed_precision):
        yield (
            f"the launcher's mixed_precision ({precision}) is not the run's ({training.mixed_precision}); remove it "
            "there and set --mixed_precision behind -m qa_dist.train"
        )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()
    if backend != "NO":
        yield f"the launcher's dynamo_backend ({backend.lower()}) has no effect; remove it and use --torch_compile"
    if _is_true(environment.get("ACCELERATE_USE_MEGATRON_LM")):
        yield "the launcher asks for Megatron-LM, which does not hold these models; use accelerate_configs/ddp.yaml"
    if _is_true(environment.get("ACCELERATE_USE_PARALLELISM_CONFIG")):
        yield PARALLELISM
    accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if accumulation not in ("auto", "1"):
        yield (
            f"the launcher's gradient_accumulation_steps ({accumulation}) has no effect: micro-batches follow from "
            "--global_batch_size and --max_tokens_per_device; remove it"
        )
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    if clipping != "auto" and not _same_clipping(clipping, training.max_grad_norm):
        yield _contradiction("gradient_clipping", clipping, "max_grad_norm", training.max_grad_norm)


def _fsdp_problems(environment: Mapping[str, str], training: TrainingConfig) -> Iterable[str]:
    for variable, (allowed, remedy) in _FSDP_ALLOWED.items():
        value = environment.get(variable)
        if value is not None and value.lower() not in allowed:
            yield f"the launcher's {variable.lower()} is {value}, but {remedy}"
    if "FSDP_VERSION" not in environment:
        yield "the launcher asks for FSDP without a version; set fsdp_version: 2"
    recompute = _is_true(environment.get("FSDP_ACTIVATION_CHECKPOINTING"))
    if recompute and not training.gradient_checkpointing:
        yield (
            "the launcher's fsdp_activation_checkpointing is true, but the recipe's gradient_checkpointing is not; "
            "remove it there and use --gradient_checkpointing"
        )


def recipe_problems(strategy: Strategy, config: RunConfig) -> Iterable[str]:
    """Options of the recipe that the strategy cannot honour."""
    training, quantization = config.training, config.model.quantization
    if quantization != "no" and strategy in ("zero3", "fsdp2"):
        yield (
            f"--quantization {quantization} does not work with {strategy}, which would cut the packed weights "
            "apart; drop it, or use accelerate_configs/ddp.yaml, zero1.yaml or zero2.yaml"
        )
    if training.mixed_precision == "fp16" and strategy != "ddp":
        yield (
            f"--mixed_precision fp16 does not work with {strategy}, which would scale the loss in its own way; "
            "use bf16, or accelerate_configs/ddp.yaml"
        )
    if training.torch_compile in ("layers", "model") and strategy in ("zero3", "fsdp2"):
        yield (
            f"--torch_compile {training.torch_compile} does not work with {strategy}, which gathers weights between "
            "the operations; drop it, or use accelerate_configs/ddp.yaml, zero1.yaml or zero2.yaml"
        )
    if config.model.lora_implementation == "grouped" and strategy != "ddp":
        yield (
            f"--lora_implementation grouped does not work with {strategy}, which holds the layers in shards or in one "
            "type; drop it: auto leaves such layers to peft"
        )
    optimizer = OPTIMIZERS[training.optim]
    if strategy != "ddp" and not optimizer.is_shardable:
        quantised = f"whose moments {optimizer.package} would quantise"
        taken = "that it takes whole" if optimizer.quantisation is None else quantised
        yield (
            f"--optim {training.optim} does not work with {strategy}, which cuts the tensors apart {taken}; drop it, "
            "or use accelerate_configs/ddp.yaml"
        )
    if training.gradient_exchange_dtype != "float32" and strategy != "ddp":
        own = "its communication_data_type" if strategy.startswith("zero") else "float32 alone"
        yield (
            f"--gradient_exchange_dtype {training.gradient_exchange_dtype} does not work with {strategy}, whose ranks "
            f"exchange in {own}; drop it, or use accelerate_configs/ddp.yaml"
        )
    if training.cpu_offload and strategy in ("ddp", "fsdp2"):
        yield (
            f"--cpu_offload does not work with {strategy}; drop it, or use accelerate_configs/zero2.yaml or zero3.yaml"
        )


def _deepspeed_launch_config(
    environment: Mapping[str, str], training: TrainingConfig, problems: list[str]
) -> LaunchConfig | None:
    """What a DeepSpeed configuration describes; None, and a problem, if it cannot be read at all."""
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        problems.append(
            "the launcher asks for DeepSpeed without a deepspeed_config_file; name one of ds_configs/, or use "
            "accelerate_configs/zero2.yaml"
        )
        return None
    try:
        found = read_json(file_or_shipped(path).read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(
            f"the launcher's deepspeed_config_file {path} cannot be read ({error.strerror}); start in the folder that "
            "it is relative to, or give --deepspeed_config_file with an absolute path"
        )
        return None
    except (UnicodeDecodeError, ParseError) as error:
        problems.append(f"the launcher's deepspeed_config_file {path} is not JSON: {error}")
        return None
    if not isinstance(found, dict) or not isinstance(found.get("zero_optimization"), dict):
        problems.append(f"{path} has no zero_optimization section; see ds_configs/zero2.json")
        return None
    problems.extend(f"{path}: {problem}" for problem in _deepspeed_problems(found, environment, training))
    zero = found["zero_optimization"]
    stage = zero.get("stage")
    strategy: Strategy = _STAGES.get(stage, "zero2") if type(stage) is int else "zero2"
    filled = {
        **{name: value for name, value in found.items() if name != "train_batch_size"},
        # What a rank computes at once is counted in tokens and differs from step to step. DeepSpeed wants a number,
        # for its statistics; it is told the end of each step's accumulation itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.max_grad_norm or 0.0,
        # Precision is torch's autocast over float32 weights, whatever the strategy; DeepSpeed's own would convert them.
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        # It would wait for the device at every pass and step.
        "timers": {"throughput": {"enabled": False}},
        # The optimiser is torch's AdamW everywhere; DeepSpeed's needs a compiler where it runs.
        "zero_force_ds_cpu_optimizer": False,
    }
    if training.cpu_offload:
        beside = {"device": "cpu", "pin_memory": True}
        offload: dict[str, Any] = {"offload_optimizer": dict(beside)}
        if strategy == "zero3":
            offload["offload_param"] = dict(beside)
        filled["zero_optimization"] = {**offload, **zero}
    return LaunchConfig(strategy=strategy, deepspeed=filled)


def _deepspeed_problems(
    ds_config: Mapping[str, Any], environment: Mapping[str, str], training: TrainingConfig
) -> Iterable[str]:
    """What of a DeepSpeed configuration contradicts the recipe or the launcher, or would be ignored."""
    for section in ("optimizer", "scheduler"):
        if section in ds_config:
            yield f"it has a section {section}, but the recipe sets the {section}; remove it"
    unknown = [name for name in ds_config if name not in (*_DEEPSPEED_KEYS, "optimizer", "scheduler")]
    if unknown:
        yield f"{', '.join(unknown)} would have no effect; keep to {', '.join(_DEEPSPEED_KEYS)}"
    yield from _batch_problems(ds_config, training)
    yield from _precision_problems(ds_config, training)
    yield from _value_problems(ds_config)
    if ds_config.get("zero_force_ds_cpu_optimizer") is True:
        yield "zero_force_ds_cpu_optimizer is true, but the optimiser is torch's AdamW; set it to false"
    yield from _stage_problems(ds_config["zero_optimization"], environment)
    yield from _offload_problems(ds_config["zero_optimization"], environment, training)


def _value_problems(ds_config: Mapping[str, Any]) -> Iterable[str]:
    """What is no value of the keys beside the sections."""
    data_type = ds_config.get("communication_data_type")
    if data_type is not None and data_type not in _COMMUNICATION_TYPES:
        yield f"communication_data_type is {shown(data_type)}; use {', '.join(_COMMUNICATION_TYPES)}"
    for name in ("wall_clock_breakdown", "zero_force_ds_cpu_optimizer"):
        if not isinstance(ds_config.get(name, False), bool):
            yield f"{name} is {shown(ds_config[name])}; use true or false"
    steps = ds_config.get("steps_per_print")
    if steps is not None and (type(steps) is not int or steps < 1):
        yield f"steps_per_print is {shown(steps)}; use a whole number, 1 or more"


def _batch_problems(ds_config: Mapping[str, Any], training: TrainingConfig) -> Iterable[str]:
    """What contradicts the recipe's batches and clipping."""
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if ds_config.get(name, "auto") != "auto":
            yield (
                f"{name} is {ds_config[name]}, but micro-batches follow from --global_batch_size and "
                "--max_tokens_per_device; set it to auto"
            )
    if ds_config.get("train_batch_size", "auto") not in ("auto", training.global_batch_size):
        yield _contradiction(
            "train_batch_size", ds_config["train_batch_size"], "global_batch_size", training.global_batch_size
        )
    clipping = ds_config.get("gradient_clipping", "auto")
    if clipping != "auto" and not _same_clipping(clipping, training.max_grad_norm):
        yield _contradiction("gradient_clipping", clipping, "max_grad_norm", training.max_grad_norm)


def _precision_problems(ds_config: Mapping[str, Any], training: TrainingConfig) -> Iterable[str]:
    for name in ("bf16", "fp16", "torch_autocast"):
        section = ds_config.get(name, {})
        settings = section.items() if isinstance(section, dict) else [("enabled", section)]
        for key, value in settings:
            if value != "auto" and not (key == "enabled" and value is False):
                yield (
                    f"{name}.{key} is {value}, but precision is the recipe's (--mixed_precision "
                    f"{training.mixed_precision}), over float32 weights; keep to enabled: auto"
                )


def _stage_problems(zero: Mapping[str, Any], environment: Mapping[str, str]) -> Iterable[str]:
    """What is no stage, does not go with the stage, or is filled in by nobody."""
    stage = zero.get("stage")
    # true equals 1.
    if type(stage) is not int or stage not in _STAGES:
        yield (
            f"zero_optimization.stage is {shown(stage)}; use 1, 2 or 3, or accelerate_configs/ddp.yaml for no "
            "partitioning"
        )
    asked = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if asked is not None and asked != str(stage):
        yield f"zero_optimization.stage is {stage}, but the launcher's zero_stage is {asked}; remove the latter"
    yield from section_problems(zero)
    for name, value in zero.items():
        if value == "auto":
            yield f"zero_optimization.{name} is auto, which nothing fills in; remove it to get DeepSpeed's default"
    if _is_true(environment.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL")):
        yield (
            "the launcher's zero3_save_16bit_model is true, but weights are gathered and saved as they are trained, in "
            "float32; set it to false"
        )
    experts = environment.get("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", "")
    if experts.lower() not in ("", "none"):
        yield (
            f"the launcher's deepspeed_moe_layer_cls_names is {experts}, but no model here is a mixture of experts; "
            "remove it"
        )
    if _is_true(environment.get("ACCELERATE_DEEPSPEED_ZERO3_INIT")):
        yield "the launcher's zero3_init_flag is true, but every rank builds the whole model first; set it to false"


def _offload_problems(
    zero: Mapping[str, Any], environment: Mapping[str, str], training: TrainingConfig
) -> Iterable[str]:
    """Devices that the recipe or the launcher contradicts, or that nothing is offloaded to here."""
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name)
        if not isinstance(offload, Mapping):
            # `section_problems` says so.
            offload = {}
        device = offload.get("device", "none")
        if device not in ("cpu", "none"):
            yield f"zero_optimization.{name}.device is {device}; use cpu or none"
        elif device == "none" and training.cpu_offload and name in zero:
            yield f"zero_optimization.{name}.device is none, but the recipe says --cpu_offload; remove one of them"
        asked = environment.get(f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE", device)
        if asked != device:
            yield (
                f"zero_optimization.{name}.device is {device}, but the launcher's {name}_device is {asked}; remove "
                "the latter"
            )


def _same_clipping(value: Any, max_grad_norm: float | None) -> bool:
    try:
        return float(value) == (max_grad_norm or 0.0)
    except (TypeError, ValueError):
        return False


def _contradiction(name: str, value: Any, option: str, set_to: Any) -> str:
    wanted = "none" if set_to is None else set_to
    return f"{name} is {value}, but the recipe's {option} is {wanted}; set it to auto and use --{option}"
