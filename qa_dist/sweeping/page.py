"""What sweeps measured, as Markdown: docs/results.md shows the files in docs/results/."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qa_dist.sweeping.record import FORMAT, read_versioned
from qa_dist.sweeping.table import markdown

NOTHING = "No results yet: `docs/results/` holds no file that `qa-dist sweep` wrote.\n"


def results_page(folder: Path) -> str:
    """A section for each file of results in a folder, in the order of their names; `NOTHING` without any.

    Raises:
        UserError: A file is not what `qa-dist sweep` writes.
    """
    paths = sorted(folder.glob("*.json"))
    return "\n".join(_section(path) for path in paths) if paths else NOTHING


def _section(path: Path) -> str:
    sweep = read_versioned(
        path,
        FORMAT,
        if_damaged="copy the file of results again",
        if_other="is no file of results of this version of qa-dist sweep; remove it",
    )
    title = path.stem.replace("_", " ").capitalize()
    return "\n".join([f"### {title}", "", *_facts(sweep), "", markdown(sweep)])


def _facts(sweep: Mapping[str, Any]) -> list[str]:
    """Where, when and on what: one line each."""
    hardware, versions, data = (sweep.get(name) or {} for name in ("hardware", "versions", "data"))
    devices = hardware.get("devices") or [hardware.get("processor") or "unknown"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if versions.get(name))
    lines = [f"- {sweep['started'][:10]}, {devices[0]}, {packages}, commit {str(sweep.get('git_commit'))[:12]}"]
    if data:
        scored = f"{data['validation']['num_examples']:,} to score" if "validation" in data else "none to score"
        length = _length(sweep["shared_options"])
        lines.append(f"- {data['train']['num_examples']:,} questions to train on, {scored}; {length}")
    lines.append(f"- `{shlex.join(sweep['command'])}`")
    ended = sum(trial["status"] in ("done", "paused") for trial in sweep["trials"])
    lines.append(f"- {ended} of {sweep['num_trials']} trials ended, in {sweep['seconds'] / 60:.1f} minutes")
    return lines


def _length(options: Mapping[str, Any]) -> str:
    steps, epochs = options.get("max_train_steps"), options.get("num_train_epochs")
    return f"{steps:,} steps" if steps else f"{epochs:g} epochs" if epochs else "trials of different lengths"
