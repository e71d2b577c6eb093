"""What makes calls from Python, a notebook's above all, read as well as a command's lines."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from qa_dist.common.errors import ConfigError, UserError


class ShownAsText:
    """A value that notebooks show as its text (`str`), as IPython asks for it; its `repr` stays short."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        # In each class itself: IPython takes the `repr` that it finds in one before it looks at the next base.
        cls._repr_pretty_ = _pretty  # type: ignore[attr-defined]


def _pretty(value: object, printer: Any, cycle: bool) -> None:
    printer.text(str(value))


@contextmanager
def named_as_in_python(
    names: Mapping[str, str] = MappingProxyType({}), *, kind: type[UserError] = UserError
) -> Iterator[None]:
    """Context in which mistakes name options as arguments of Python have them, without dashes.

    Args:
        names: What arguments are called that have other names than the options, by the names of these.
        kind: Of which mistakes: others may speak of the options of commands.
    """
    try:
        yield
    except kind as error:
        error.args = tuple(_in_python(part, names) if isinstance(part, str) else part for part in error.args)
        if isinstance(error, ConfigError):
            error.problems = tuple(_in_python(problem, names) for problem in error.problems)
        raise


def _in_python(message: str, names: Mapping[str, str]) -> str:
    # Not the dashes inside of paths.
    return re.sub(r"(?<![\w-])--([a-z]\w*)", lambda match: names.get(match[1], match[1]), message)
