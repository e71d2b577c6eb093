"""Options that earlier versions had and this one has not: the measurements in docs/results.md showed no gain for them.

Files of earlier versions still name them: config.yaml in the folder of a run, checkpoints, the records of a sweep's
trials. Where such a file gives an option the value that switched it off, the run was trained as one without the option
is, and the option is passed over without a word. Any other value says how a run was trained, and nothing about the
weights that it ended with: they are read as any others, but no run can be trained or resumed in that way.
"""

from collections.abc import Mapping
from typing import Any

_OFF: Mapping[str, Any] = {
    "loraplus_lr_ratio": None,
    "head_lr_ratio": None,
    "ema_decay": None,
    "init_lora_weights": "default",
}
"""The value that switched each of them off."""


def was_removed(name: str) -> bool:
    """Whether an earlier version had an option of this name."""
    return name in _OFF


def was_off(name: str, value: Any) -> bool:
    """Whether this value, of a file or a flag, switched a removed option off."""
    off = _OFF[name]
    # "none" and its like stand for no value, as they do for the options that there are.
    return value == off or (off is None and str(value).lower() in ("auto", "none", "null"))


def removal(name: str) -> str:
    """What to tell those who set a removed option."""
    return (
        f"--{name} was taken out, as it brought no gain in the measurements (docs/results.md); leave it out and train "
        "anew"
    )


def removals(options: Mapping[str, Any]) -> list[str]:
    """A sentence for each removed option that these options of a run had switched on."""
    return [removal(name) for name, value in options.items() if was_removed(name) and not was_off(name, value)]


def without_removed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run, without removed ones that were off."""
    return {name: value for name, value in options.items() if not (was_removed(name) and was_off(name, value))}
