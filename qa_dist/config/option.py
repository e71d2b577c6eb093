"""One option: a field of a frozen dataclass, with its help and the range of its values."""

from dataclasses import field
from typing import Any


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
