"""HTML pages from templates of this folder: one style, nothing loaded, no script; and a file that appears whole.

All text goes through the templates' escaping: what a context, an answer or a name holds is shown, never obeyed.
"""

import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from qa_dist.common.errors import ConfigError
from qa_dist.common.files import require_writable, staged

_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Control characters and halves of characters, which no page may hold."""

_TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Characters that turn the direction of the text behind them, which is not only that of a name with one of them."""


def rendered(template: str, values: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]] | None = None) -> str:
    """A template of this folder with these values: the same for the same, to the byte.

    Besides `filters` there are `svg` (a chart as it is), `number` (with commas), `score` (two digits), `percent`
    and `straight`.
    """
    environment = _environment(template)
    environment.filters.update(filters or {})
    return str(environment.get_template(template).render(**values))


@cache
def _environment(template: str) -> Any:
    """What renders one template; a process compiles it once."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_fit,
        loader=FunctionLoader(_template),
    )
    environment.filters |= {
        "svg": Markup,
        "number": lambda value: f"{value:,}",
        "score": lambda value: f"{value:.2f}",
        "percent": lambda value: f"{100 * value:.0f} %",
        "straight": straight,
    }
    return environment


def straight(text: str) -> str:
    """Text with characters that turn its direction spelled out, for where no element isolates a name in it."""
    return _TURNS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _template(name: str) -> str:
    return resources.files("qa_dist.reporting").joinpath(name).read_text(encoding="utf-8")


def _fit(value: Any) -> Any:
    """Text without what no page may hold."""
    return type(value)(_UNFIT.sub("\ufffd", value)) if isinstance(value, str) else value


def require_page(path: Path, option: str) -> None:
    """Make sure that a page can be written to a file, before anything is computed for it.

    Args:
        path: The file.
        option: What names it, for the message.

    Raises:
        ConfigError: It cannot.
    """
    if path.is_dir():
        raise ConfigError([f"{option} {path} is a folder; name a file, as {path / 'report.html'}"])
    if os.path.lexists(path) and not _is_page(path):
        raise ConfigError([f"{option} {path} exists and is no page, which alone is replaced; name another file"])
    require_writable(path.parent, f"the folder of {option}")


def _is_page(path: Path) -> bool:
    """Whether a file is a page, or empty."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(200).lstrip().lower()
    except OSError:
        return False
    return not start or start.startswith(b"<!doctype html")


def write_page(text: str, path: Path, option: str) -> None:
    """Write a page, which appears whole and replaces one of that name.

    Raises:
        ConfigError: The file system refuses it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as aside:
            aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{option} {path} cannot be written: {error.strerror}; name another file"]) from error
