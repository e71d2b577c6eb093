"""Texts that would run as a script, or change the page, wherever text were taken for HTML."""

import json
from pathlib import Path

CORPUS: tuple[str, ...] = tuple(
    json.loads((Path(__file__).parents[2] / "fixtures" / "markup.json").read_text(encoding="utf-8"))
)
