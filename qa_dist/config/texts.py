"""Values of options as text, and text as numbers."""

import dataclasses
import types
import typing
from typing import Any, Literal

from qa_dist.common.secrets import masked

_LONGEST_SHOWN = 80


def whole_number(text: str) -> int:
    """The number that up to 18 digits stand for; -1 for any other text."""
    return int(text) if text.isdecimal() and len(text) <= 18 else -1


def shown(raw: Any) -> str:
    """A value as messages show it: on one line, not too long, without secrets."""
    # As recipes and flags write them.
    text = {None: "null", True: "true", False: "false"}[raw] if raw is None or isinstance(raw, bool) else str(raw)
    text = masked(text)
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[:_LONGEST_SHOWN]}..."
    return repr(text) if not text or " " in text or not text.isprintable() else text


def option_type(hint: Any) -> str:
    """Short name of an option's type, for help and documentation."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return next(option_type(part) for part in typing.get_args(hint) if part is not type(None))
    if origin is Literal:
        return "|".join(typing.get_args(hint))
    if origin is tuple:
        return "NAME,..."
    return {"str": "TEXT", "int": "N", "float": "X", "bool": "true|false"}[hint.__name__]


def default_text(item: "dataclasses.Field[Any]") -> str:
    """What an option is if nothing sets it, for help and documentation: "default: 16", "required"."""
    if item.metadata["required"]:
        return "required"
    if item.default is None or item.default == ():
        is_auto = "auto:" in item.metadata["help"] and "none:" not in item.metadata["help"]
        return f"default: {'auto' if is_auto else 'none'}"
    if isinstance(item.default, tuple):
        return f"default: {','.join(item.default)}"
    return f"default: {str(item.default).lower() if isinstance(item.default, bool) else item.default}"
