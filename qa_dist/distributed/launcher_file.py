"""What a configuration file of `accelerate launch` would make of the environment of a run's processes."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qa_dist.common.errors import ConfigError
from qa_dist.config.recipe_files import yaml_file
from qa_dist.config.texts import shown
from qa_dist.distributed.launch_config import PARALLELISM

_TEXTS = ("compute_environment", "distributed_type", "mixed_precision", "gpu_ids", "dynamo_config.dynamo_backend")
"""Keys whose values accelerate takes apart as text."""

_LISTS = ("commands", "tpu_vm", "tpu_env")
"""Keys that accelerate itself writes as lists."""


def launcher_environment(path: Path) -> dict[str, str]:
    """The variables that `accelerate launch --config_file PATH` would start each process with.

    accelerate itself works them out, and nothing is started.

    Raises:
        ConfigError: The file cannot be read, or accelerate would refuse it, or start fewer processes than it asks for.
    """
    if _read(path).get("parallelism_config"):
        # accelerate looks at it for some strategies only.
        raise ConfigError([PARALLELISM])
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import launch

    is_one_process = False
    # Its warnings are about values that the command line may still give.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            words = ["--config_file", str(path), "-m", "qa_dist.train"]
            arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
            # Any free one: the file's own may be in use now, which says nothing about the file.
            arguments.main_process_port = 0
            if arguments.use_deepspeed:
                arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
                environment = launch.prepare_deepspeed_cmd_env(arguments)[1]
            elif arguments.use_fsdp or arguments.use_megatron_lm or arguments.multi_gpu:
                environment = launch.prepare_multi_gpu_env(arguments)
            else:
                environment = launch.prepare_simple_launcher_cmd_env(arguments)[1]
                is_one_process = True
            kind = defaults.distributed_type.value
        # What accelerate does with an odd value is not written down anywhere: it may be any of these.
        except (
            *(ArithmeticError, AssertionError, AttributeError, LookupError),
            *(ImportError, OSError, RuntimeError, TypeError, ValueError),
        ) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError([f"accelerate launch does not take it: {reason}"]) from error
    if is_one_process and (arguments.num_processes or 1) > 1:
        raise ConfigError(
            [
                f"distributed_type {kind} starts one process and not num_processes: "
                f"{arguments.num_processes}; set distributed_type: MULTI_GPU, also on a CPU"
            ]
        )
    return {name: str(value) for name, value in environment.items()}


def _read(path: Path) -> Mapping[str, Any]:
    """The file's values, read more strictly than accelerate does."""
    _, values = yaml_file(path, "it")
    if not isinstance(values, dict):
        raise ConfigError(["it holds no `name: value` lines; see accelerate_configs/ddp.yaml"])
    counts = {name: values[name] for name in ("num_processes", "num_machines") if name in values}
    # Handed on as they are, they would stop torchrun later, with a traceback.
    wrong = [
        f"{name} is {shown(value)} and not a number of 1 or more"
        for name, value in counts.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    if wrong := [*wrong, *(problem for name in values for problem in _type_problems(name, values[name]))]:
        raise ConfigError(wrong)
    return values


def _type_problems(name: str, value: Any) -> Iterator[str]:
    """Values of a type that accelerate does not look for, and would stop at with a traceback or an odd message."""
    if name.endswith("_config"):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from _type_problems(f"{name}.{key}", inner)
        elif value is not None:
            yield f"{name} is {shown(value)} and no section of `name: value` lines; mend it or remove it"
    elif isinstance(value, dict) or (isinstance(value, list) and name not in _LISTS):
        yield f"{name} is {shown(value)} and takes one value; mend it or remove it"
    elif name in _TEXTS and not isinstance(value, str) and (value is not None or name == "distributed_type"):
        # What YAML takes for a number or for a word of its own, such as NO, needs quotes.
        yield f"{name} is {shown(value)} and no text; write one, in quotes"
