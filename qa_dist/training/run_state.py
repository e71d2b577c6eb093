"""How far a run is, beside its tensors: what the `state.json` of a checkpoint holds under `progress`."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from qa_dist.common.errors import CheckpointError

Figures = Mapping[str, float]
"""Numbers by name: of an evaluation, its step, its loss and its metrics."""


@dataclass(frozen=True, slots=True)
class BestScore:
    """The best evaluation so far.

    Attributes:
        value: what evaluations are compared by; greater is better, so that a loss is negated.
        step: optimiser steps done when it was made.
        measure: what was measured, and on what; None: not known, as in checkpoints of earlier versions.
    """

    value: float
    step: int
    measure: str | None = dataclasses.field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The fields by name; without a measure that is not known."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a run knows besides its weights and its optimiser's state; the defaults are those of one that begins.

    Attributes:
        evaluation_pending: whether an evaluation was due when the run stopped.
        evaluations_without_best: evaluations in a row without a new best, for early stopping.
        best: the best evaluation so far, None before the first.
        evaluations: every evaluation so far: `step`, `loss` and its metrics.
        resumed_at_steps: after which steps the run was resumed before.
        skipped_steps: steps that changed nothing, as their float16 gradients had overflowed.
        world_size: number of ranks.
        max_tokens_per_device: token budget of a forward pass, which a lack of memory may have lowered.
        wanted_tokens_per_device: `--max_tokens_per_device` of the run; None for auto, and if a checkpoint does not say.
        gradient_scaler: state of the loss scaling in float16; None without it.
    """

    evaluation_pending: bool = False
    evaluations_without_best: int = 0
    best: BestScore | None = None
    evaluations: tuple[Figures, ...] = ()
    resumed_at_steps: tuple[int, ...] = ()
    skipped_steps: int = 0
    world_size: int
    max_tokens_per_device: int
    wanted_tokens_per_device: int | None = None
    gradient_scaler: Figures | None = None

    def to_json(self) -> dict[str, Any]:
        """The state as JSON values, in the order of the fields."""
        return {
            "evaluation_pending": self.evaluation_pending,
            "evaluations_without_best": self.evaluations_without_best,
            "best": None if self.best is None else self.best.to_json(),
            "evaluations": [dict(evaluation) for evaluation in self.evaluations],
            "resumed_at_steps": list(self.resumed_at_steps),
            "skipped_steps": self.skipped_steps,
            "world_size": self.world_size,
            "max_tokens_per_device": self.max_tokens_per_device,
            # Left out where it is None, so that such a checkpoint is what earlier versions wrote.
            **({"wanted_tokens_per_device": wanted} if (wanted := self.wanted_tokens_per_device) else {}),
            "gradient_scaler": None if self.gradient_scaler is None else dict(self.gradient_scaler),
        }

    @classmethod
    def from_json(cls, value: object, where: object) -> Self:
        """The state that `to_json` wrote; `where` names its place in messages.

        Raises:
            CheckpointError: A key is missing or unknown, or its value is of another type.
        """
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: progress is not a JSON object; the file is damaged")
        value = {**_ADDED, **value}
        names = [field.name for field in dataclasses.fields(cls)]
        for problem, keys in (
            ("lacks", [name for name in names if name not in value]),
            ("has the unknown", [name for name in value if name not in names]),
        ):
            if keys:
                raise CheckpointError(
                    f"{where}: progress {problem} {', '.join(keys[:3])}; use the version of qa_dist that wrote it"
                )
        for name in names:
            is_valid, allowed = _ALLOWED[name]
            if not is_valid(value[name]):
                raise CheckpointError(
                    f"{where}: {name} is {value[name]!r:.60} and must be {allowed}; the file is damaged"
                )
        return cls(
            **{
                **value,
                "best": None if value["best"] is None else BestScore(**value["best"]),
                "evaluations": tuple(value["evaluations"]),
                "resumed_at_steps": tuple(value["resumed_at_steps"]),
            }
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_figures(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_evaluation(value: object) -> bool:
    return isinstance(value, dict) and _are_figures(value) and len(value) > 1 and _is_count(value.get("step"))


def _is_best(value: object) -> bool:
    return (
        isinstance(value, dict)
        and {"value", "step"} <= value.keys() <= {"value", "step", "measure"}
        and _is_number(value["value"])
        and _is_count(value["step"])
        and isinstance(value.get("measure"), str | None)
    )


def _is_list_of(is_valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def _is_null_or(is_valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or is_valid(value)


_COUNT = (_is_count, "a whole number of 0 or more")
_POSITIVE = (_is_positive, "a whole number of 1 or more")
_ALLOWED: dict[str, tuple[Callable[[object], bool], str]] = {
    "evaluation_pending": (lambda value: isinstance(value, bool), "true or false"),
    "evaluations_without_best": _COUNT,
    "best": (_is_null_or(_is_best), "null, or a value and a step"),
    "evaluations": (_is_list_of(_is_evaluation), "a list of evaluations: a step, a loss and other numbers"),
    "resumed_at_steps": (_is_list_of(_is_count), "a list of whole numbers"),
    "skipped_steps": _COUNT,
    "world_size": _POSITIVE,
    "max_tokens_per_device": _POSITIVE,
    "wanted_tokens_per_device": (_is_null_or(_is_positive), "null, or a whole number of 1 or more"),
    "gradient_scaler": (_is_null_or(_are_figures), "null, or numbers by name"),
}
"""What each key may hold: a check, and the same in words."""

_ADDED: dict[str, object] = {"wanted_tokens_per_device": None}
"""Keys that checkpoints of earlier versions do not have, and what stands for them."""
