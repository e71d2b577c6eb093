"""What is kept of a trial, in its folder, and of a sweep: plain JSON."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qa_dist.common.errors import ConfigError, UserError
from qa_dist.common.files import require_writable, write_json
from qa_dist.common.parsers import ParseError, read_json
from qa_dist.common.reading import read_json_object
from qa_dist.config.added_options import with_added
from qa_dist.config.options import RunConfig
from qa_dist.config.removed_options import without_removed
from qa_dist.sweeping.plan import Plan, Trial

FORMAT = 1
FILE = "trial.json"
"""The file in a run's folder that says how far the sweep has brought it."""

Status = Literal["done", "paused", "stopped", "diverged", "failed"]
Record = dict[str, Any]

_ALIKE = ("hardware", "versions", "git_commit", "world_size", "data")
"""What is said once for a sweep if it is the same for all of its runs."""

_APART = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "disable_tqdm", "store_dir")
"""Options of a run that say nothing about its result."""


def read_versioned(path: Path, version: int, *, if_damaged: str, if_other: str) -> dict[str, Any]:
    """The object in a JSON file, whose `format` is of this version.

    Args:
        path: The file.
        version: Its format.
        if_damaged: What to do where it cannot be read.
        if_other: What a file of another kind or version is, and what to do with it.

    Raises:
        UserError: It cannot be read, or is of another format.
    """
    try:
        found = read_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ParseError) as error:
        raise UserError(f"{path} cannot be read ({error}); {if_damaged}") from error
    if not isinstance(found, dict) or found.get("format") != version:
        raise UserError(f"{path} {if_other}")
    return found


def read_record(trial: Trial) -> Record | None:
    """What the folder of a trial says; None if it says nothing, or that other options failed before the first step.

    Raises:
        UserError: The file is damaged, or of a run with other options.
    """
    path = trial.folder / FILE
    if not os.path.lexists(path):
        return None
    record = read_versioned(
        path,
        FORMAT,
        if_damaged="remove the folder to run the trial again",
        if_other="is not of this version; choose another --output_dir",
    )
    wanted = json.loads(json.dumps(compared(trial)))
    saved = without_removed(record.get("config") or {})
    # Options that were added since had no other value than their defaults, or what `with_added` knows.
    defaults = {name: value for name, value in json.loads(json.dumps(RunConfig().flat())).items() if name in wanted}
    earlier = record["config"] = {**defaults, **with_added(saved, wanted)} if saved else {}
    if earlier != wanted:
        log = trial.folder / "metrics.jsonl"
        if record.get("status") == "failed" and not (log.is_file() and log.stat().st_size):
            return None
        names = sorted(name for name in {*earlier, *wanted} if earlier.get(name) != wanted.get(name))
        raise UserError(
            f"{trial.folder} was run with another {', '.join(names[:5])} than the sweep file says now; choose another "
            "--output_dir, or change it back"
        )
    return record


def compared(trial: Trial) -> dict[str, Any]:
    """The options of a trial that its result depends on."""
    return {name: value for name, value in trial.config.flat().items() if name not in _APART}


def new_record(trial: Trial) -> Record:
    """What is known of a trial before it has run."""
    return {
        "format": FORMAT,
        "method": trial.method,
        "seed": trial.seed,
        "options": dict(trial.options),
        "config": compared(trial),
        "status": "stopped",
        "step": 0,
        "num_steps": None,
        "rungs": [],
        "final": None,
        "error": None,
        "seconds": 0.0,
        "starts": 0,
    }


def write_record(trial: Trial, record: Mapping[str, Any]) -> None:
    """Write the file in the trial's folder."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    write_json(trial.folder / FILE, record)


def note_failure(trial: Trial, error: str) -> None:
    """Write the record of a trial whose process could not."""
    record = read_record(trial) or new_record(trial)
    write_record(trial, {**record, "status": "failed", "error": error})


def note_left_over(trial: Trial) -> None:
    """Write the record of a trial that could not be begun now; the next call of the sweep does."""
    record = read_record(trial) or new_record(trial)
    # The process in its folder may just have brought it to its end.
    if record["status"] in ("stopped", "paused"):
        write_record(trial, {**record, "status": "stopped"})


def other_records(plan: Plan) -> list[Record]:
    """What is known of trials in a sweep's folder that its file has no more; [] for a search, whose study knows all."""
    if plan.search:
        return []
    planned = {(trial.method, trial.seed) for trial in plan.trials}
    found = [read_json_object(path) for path in sorted((plan.output_dir / "trials").glob(f"*/{FILE}"))]
    return [
        dict(each)
        for each in found
        if each.get("format") == FORMAT and "config" in each and (each.get("method"), each.get("seed")) not in planned
    ]


def is_at(record: Record | None, step: int | None) -> bool:
    """Whether a trial needs no more work to be after `step` optimiser steps; None: at its end."""
    if record is None:
        return False
    if record["status"] in ("done", "diverged", "failed"):
        return True
    return step is not None and record["status"] == "paused" and record["step"] >= step


def is_paused_at(record: Record | None, step: int) -> bool:
    """Whether a trial waits at a rung, after so many optimiser steps."""
    return record is not None and record["status"] == "paused" and record["step"] == step


def score_at(record: Record | None, step: int | None, metric: str) -> float | None:
    """The score of a trial at a rung, or of its end where it ended before; None if it has none. Greater is better.

    Where `step` is None it is that of its end, even where that was at a rung at which it paused. What became of a trial
    behind a rung does not change its score there: each call of a sweep must decide about a rung as the first one did.
    """
    if record is None:
        return None
    found: Mapping[str, Any] | None = next((rung for rung in record["rungs"] if rung["step"] == step), None)
    if found is None and record["status"] not in ("diverged", "failed"):
        found = record["final"]
    if found is None or found.get(metric) is None:
        return None
    return -float(found["loss"]) if metric == "loss" else float(found[metric])


def require_rungs(trial: Trial, record: Record, rungs: Sequence[int]) -> None:
    """Make sure that a trial has a score at every rung that it has passed, by which it can be compared there.

    Raises:
        UserError: It has passed one without a pause, as the rungs were others.
    """
    paused_at = {rung["step"] for rung in record["rungs"]}
    passed = [step for step in rungs if step < record["step"] and step not in paused_at]
    if passed and record["status"] not in ("diverged", "failed"):
        raise UserError(
            f"{trial.folder} has passed step {passed[0]} when the sweep file had other rungs, and has no score there; "
            "choose another --output_dir, or change them back"
        )


def require_results_file(path: Path, plan: Plan, *, is_own: bool) -> None:
    """Make sure that the results of a sweep can be written to a file, before anything is computed for it.

    Args:
        path: The file.
        plan: The sweep.
        is_own: Whether it is that of the sweep's folder, which has the records of all trials that it holds.

    Raises:
        ConfigError: They cannot, or the file holds something else, which would be lost.
    """
    if os.path.lexists(path):
        held = read_json_object(path) if path.is_file() else {}
        if not {"sweep", "trials"} <= held.keys():
            raise ConfigError([f"{path} exists and holds no results of a sweep; name another file with --results_file"])
        if foreign := _foreign_results(held, plan, is_own=is_own):
            raise ConfigError(
                [f"{path} holds {foreign}; choose another --output_dir, or name another file with --results_file"]
            )
    require_writable(path.parent, f"{path}: its folder")


def _foreign_results(held: Mapping[str, Any], plan: Plan, *, is_own: bool) -> str | None:
    """What a file of results holds that a sweep would lose by writing its own there; None if nothing."""
    if bool(plan.search) != ("search" in held):
        kinds = ("a search", "single trials") if "search" in held else ("single trials", "a search")
        return f"results of {kinds[0]}, and {plan.name} has {kinds[1]}"
    # In its own folder the records stay, and are shown; a study says itself whether it is of this search.
    if is_own:
        return None
    if held["sweep"] != plan.name:
        return f"the results of another sweep, {held['sweep']}, and not of {plan.name}"
    known = {(each["method"], each["seed"]) for each in other_records(plan)}
    known |= {(trial.method, trial.seed) for trial in plan.trials}
    others = [] if plan.search else [each for each in held["trials"] if (each["method"], each["seed"]) not in known]
    if not others:
        return None
    first = f"{others[0]['method']} with seed {others[0]['seed']}"
    return f"results of {len(others)} trials that {plan.name} does not have, such as {first}"


def write_sweep(path: Path, plan: Plan, records: Sequence[Record], about: Mapping[str, Any]) -> None:
    """Write all that is known of a sweep into one file.

    Args:
        path: The file.
        plan: The sweep.
        records: Of those of its trials that have one.
        about: What else belongs to it: command, machine, versions.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = {name: value for name in _ALIKE if (value := _common(records, name)) is not None}
    left_out = {"format", "config", *shared}
    write_json(
        path,
        {
            "format": FORMAT,
            "sweep": plan.name,
            **about,
            **shared,
            "rungs": list(plan.rungs),
            **({"search": plan.search.described()} if plan.search else {}),
            "num_trials": plan.num_trials,
            "shared_options": {
                name: without_folders(value) for name, value in _shared([each["config"] for each in records]).items()
            },
            "trials": [
                {name: _shown(name, value) for name, value in record.items() if name not in left_out}
                for record in records
            ],
        },
    )


def without_folders(value: Any) -> Any:
    """A value as others may read it: of a path, which only this machine has, the last part."""
    return (Path(value).name or value) if isinstance(value, str) and Path(value).is_absolute() else value


def _shown(name: str, value: Any) -> Any:
    """A value of a record as others may read it."""
    return {word: without_folders(each) for word, each in value.items()} if name == "options" else value


def _common(records: Sequence[Record], name: str) -> Any:
    """What all records that say something under this name say alike; None where they differ or none does."""
    values = [record[name] for record in records if record.get(name) is not None]
    return values[0] if values and all(value == values[0] for value in values) else None


def _shared(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options that all runs have in common."""
    if not configs:
        return {}
    return {
        name: value
        for name, value in configs[0].items()
        if all(name in other and other[name] == value for other in configs)
    }
