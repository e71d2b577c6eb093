"""The section zero_optimization of a DeepSpeed configuration: which keys act here, in which stages, on which values.

DeepSpeed would refuse an unknown key or a value of a wrong type too, but only in a run that has started; and a key that
has no effect it takes in silence. It is not loaded for this: `qa-dist recipes validate` works without it.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from qa_dist.config.texts import shown

_NUMBERS = {
    "reduce_bucket_size": (1, (1, 2, 3)),
    "allgather_bucket_size": (0, (1, 2)),
    "sub_group_size": (0, (3,)),
    "stage3_prefetch_bucket_size": (0, (3,)),
    "stage3_param_persistence_threshold": (0, (3,)),
    "stage3_model_persistence_threshold": (0, (3,)),
    "stage3_max_live_parameters": (0, (3,)),
    "stage3_max_reuse_distance": (0, (3,)),
    "stage3_module_granularity_threshold": (0, (3,)),
    "zero_hpz_partition_size": (1, (3,)),
}
"""Whole numbers: the least that each may be, and the stages in which it acts (DeepSpeed 0.19)."""

_SWITCHES = {
    "contiguous_gradients": (1, 2, 3),
    "reduce_scatter": (1, 2, 3),
    "use_multi_rank_bucket_allreduce": (1, 2),
    "round_robin_gradients": (1, 2),
    "parameter_alignment": (1, 2),
    "ignore_unused_parameters": (2,),
    "overlap_comm": (2, 3),
    "stage3_use_all_reduce_for_fetch_params": (3,),
    "stage3_allgather_sequential": (3,),
    "zero_quantized_weights": (3,),
    "zero_quantized_nontrainable_weights": (3,),
    "zero_quantized_gradients": (3,),
    "memory_efficient_linear": (3,),
    "override_module_apply": (3,),
    "log_trace_cache_warnings": (3,),
    "enable_sanity_checks": (3,),
}
"""What is on or off, and the stages in which it acts."""

_OFFLOADS = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}

_STAGES_BY_KEY = {**{name: stages for name, (_, stages) in _NUMBERS.items()}, **_SWITCHES, **_OFFLOADS}

_OFFLOAD_KEYS = ("device", "pin_memory")
"""The others of DeepSpeed are for NVMe, or for its own optimiser."""

_AS_IT_IS = {"allgather_partitions": True}
"""What most configurations in circulation say besides, and what happens anyway; anything else cannot be had."""

_NEWER_NAMES = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}


def section_problems(zero: Mapping[str, Any]) -> Iterable[str]:
    """Keys of zero_optimization that are none or have no effect, and values of a wrong type or size.

    A stage that is none is left to the caller, as are values that the launcher or the recipe may contradict.
    """
    stage = zero.get("stage")
    for name, value in zero.items():
        stages = _STAGES_BY_KEY.get(name)
        if name == "stage" or (name in _AS_IT_IS and value is _AS_IT_IS[name]):
            continue
        if stages is None:
            yield f"zero_optimization.{name} would have no effect; {_instead(name)}"
        elif type(stage) is int and stage in (1, 2, 3) and stage not in stages:
            # What is off, or no section, says what is so.
            if value is not False and value is not None:
                other = " or ".join(map(str, stages))
                yield f"zero_optimization.{name} has no effect in stage {stage}; remove it, or use stage {other}"
        elif name in _OFFLOADS:
            yield from _offload_problems(name, value)
        elif value != "auto":
            yield from _value_problems(name, value)


def _instead(name: str) -> str:
    close = difflib.get_close_matches(name, _STAGES_BY_KEY, n=1)
    other = _NEWER_NAMES.get(name) or (close[0] if close else None)
    return f"did you mean {other}?" if other else "remove it"


def _value_problems(name: str, value: Any) -> Iterable[str]:
    if name in _SWITCHES:
        if not isinstance(value, bool):
            yield f"zero_optimization.{name} is {shown(value)}; use true or false"
        return
    least = _NUMBERS[name][0]
    # JSON has one kind of number: 5e8 is a whole one.
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
    if not is_whole or value < least:
        yield f"zero_optimization.{name} is {shown(value)}; use a whole number, {least} or more"


def _offload_problems(name: str, offload: Any) -> Iterable[str]:
    if offload is None:
        return
    if not isinstance(offload, Mapping):
        yield f'zero_optimization.{name} is {shown(offload)} and must be an object, such as {{"device": "cpu"}}'
        return
    for key in offload:
        if key not in _OFFLOAD_KEYS:
            yield f"zero_optimization.{name}.{key} would have no effect; keep to {' and '.join(_OFFLOAD_KEYS)}"
    if not isinstance(offload.get("pin_memory", True), bool):
        yield f"zero_optimization.{name}.pin_memory is {shown(offload['pin_memory'])}; use true or false"
