"""What a launcher says in the environment: made sure of before a process waits for others that will not come."""

import os
from collections.abc import Iterator, Mapping

from qa_dist.common.errors import ConfigError

_MOST = 1_000_000
_NUMBERS = {
    "RANK": (0, _MOST),
    "WORLD_SIZE": (1, _MOST),
    "LOCAL_RANK": (0, _MOST),
    "LOCAL_WORLD_SIZE": (1, _MOST),
    "MASTER_PORT": (1, 65535),
}
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def require_consistent_launch(environ: Mapping[str, str] = os.environ) -> None:
    """Make sure that the variables of a launcher, where there are some, describe one process among others.

    Raises:
        ConfigError: They do not; with all that is wrong.
    """
    if problems := list(_problems(environ)):
        raise ConfigError(
            [
                f"the environment describes no process of a run ({'; '.join(problems)}); start with torchrun or "
                "accelerate launch, which set all of these variables, or unset them to start one process alone"
            ]
        )


def _problems(environ: Mapping[str, str]) -> Iterator[str]:
    numbers = {}
    for name, (least, most) in _NUMBERS.items():
        value = environ.get(name)
        if value is None:
            continue
        if value.isascii() and value.isdecimal() and len(value) < 8 and least <= int(value) <= most:
            numbers[name] = int(value)
        else:
            yield f"{name}={value} is not a whole number from {least} to {most}"
    for place, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if place in numbers and size in numbers and numbers[place] >= numbers[size]:
            yield f"{place}={numbers[place]} is not below {size}={numbers[size]}"
    # Each of these makes a library wait for others.
    told = {"RANK": numbers.get("RANK", 0) > 0, "WORLD_SIZE": numbers.get("WORLD_SIZE", 1) > 1}
    tells = [name for name, is_told in (*told.items(), ("LOCAL_RANK", "LOCAL_RANK" in numbers)) if is_told]
    if tells and (lacking := [name for name in _NEEDED if name not in environ]):
        yield f"{tells[0]}={environ[tells[0]]} is set but not {', '.join(lacking)}"
