"""Values of options as text, and text as numbers."""

from typing import Any

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
