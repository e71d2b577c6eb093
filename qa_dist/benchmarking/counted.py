"""The table of what a training step asks of a GPU; tests/support/count_steps.py counts it, on a machine without one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qa_dist.common.errors import UserError
from qa_dist.common.parsers import read_json

FORMAT = 1
COLUMNS = ("before", "after", "trainer")
_HEADS = ("before", "after", "Trainer")

_COUNTS: tuple[tuple[str, str, Callable[[int], str]], ...] = (
    ("launches", "launches", "{:,}".format),
    ("waits", "syncs", "{:,}".format),
    ("elementwise GB", "elementwise_bytes", lambda value: f"{value / 1e9:.1f}"),
)


def read_counts(path: Path) -> Mapping[str, Any] | None:
    """What was counted; None if the file is another benchmark's.

    Raises:
        UserError: It was counted, and is not as `tests.support.count_steps` writes it.
    """
    try:
        found: Any = read_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or "counted" not in found:
        return None
    try:
        if found["format"] != FORMAT:
            raise UserError(f"{path} has a format that this version does not read; count again into another file")
        counts_part(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} lacks a part ({error}); count again with tests.support.count_steps") from error
    return found


def counts_part(counts: Mapping[str, Any]) -> list[str]:
    """The part of docs/benchmarks.md, line by line."""
    columns = {name: counts[name]["steps"] for name in COLUMNS}
    heads = ["a step of", *(f"{title}, {head}" for title, _, _ in _COUNTS for head in _HEADS)]
    rows = []
    for scenario in columns["after"]:
        cells = [scenario]
        for _, key, shown in _COUNTS:
            found = (steps.get(scenario) for steps in columns.values())
            cells += ["" if each is None else shown(each[key]) for each in found]
        rows.append(cells)
    before, after, trainer = (counts[name] for name in COLUMNS)
    return [
        "## What a step asks of a GPU",
        "",
        "Counted operator by operator on tensors without numbers that say they are on a CUDA device; nothing is timed,",
        f"and no GPU is needed. BERT base in bf16, {counts['batch']} features of SQuAD's lengths in one micro-batch,"
        " the third",
        "step, from the choice of its features to its update. Dropout is the model's unless none is named;",
        "before, attention had none.",
        "",
        "- A *launch* is an operator that computes or copies; one over a list of tensors counts once.",
        "- A *wait* is a number of the device that the host reads, or a copy that it waits for.",
        "- *Elementwise* is what all operators but products, attention and embeddings read and write.",
        "- *Trainer* is the model of transformers and peft, the batch padded to its longest feature and copied",
        "  without a wait (`non_blocking`, which is not the default), with the steps that `Trainer` takes at its",
        "  defaults: loss in autocast, backward pass, the look for losses that are not finite, clipping, fused AdamW.",
        "  Its attention (SDPA, with a mask) counts as one kernel forward and one backward, beside the operators that",
        "  make its mask.",
        "",
        f"Before is commit {short_commit(before['commit'])}, after is {short_commit(after['commit'])};"
        f" torch {after['torch']}, transformers {trainer['transformers']}.",
        "`python -m tests.support.count_steps --output docs/benchmarks/counted.json` counts again; its text says how",
        "an earlier commit is counted. [On a GPU](gpu.md#results) has what a profiler saw.",
        "",
        *markdown_table(heads, rows),
        "",
    ]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]


def short_commit(commit: str | None) -> str:
    """The first digits of a commit, and whether the checkout had been changed."""
    if commit is None:
        return "unknown"
    number, *changed = commit.split("-")
    return "-".join([number[:12], *changed])
