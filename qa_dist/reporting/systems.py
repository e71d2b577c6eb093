"""Systems that are compared: predictions files, and the output folders of runs with what they say of themselves."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qa_dist.common.errors import ConfigError, DataError
from qa_dist.common.parsers import is_number, type_name
from qa_dist.common.reading import read_json_file, read_json_object
from qa_dist.config.recipe_files import read_run_options
from qa_dist.evaluation.score_files import load_null_odds, load_predictions
from qa_dist.evaluation.scoring import counted

BESIDE_RESULTS = (
    *("output_dir", "overwrite_output_dir", "store_dir", "cache_dir", "preprocessing_num_workers", "show_structure"),
    *("max_tokens_per_device", "eval_tokens_per_device", "gather", "disable_tqdm", "report_to", "logging_steps"),
    *("checkpointing_steps", "checkpoint_total_limit", "resume_from_checkpoint", "hang_timeout", "ddp_timeout"),
    # What is tuned at the end goes into a file of its own.
    "tune_on",
)
"""Options that runs may differ in and still be repetitions of one another with other seeds."""

_TOLERANCE = 0.005
"""Percent points that a score may differ from the one in metrics.json: tables show two digits."""

_HIGHEST = 1e39
"""Beyond the scores that float32 has; what is no number is not below it."""

Candidates = Mapping[str, Sequence[Mapping[str, Any]]]
"""Entries of nbest.json by question id: `text`, `score`, `start_char`, `end_char`, best first."""


@dataclass(frozen=True, slots=True)
class System:
    """Predictions of one origin.

    Attributes:
        name: how tables call it.
        path: what the user named.
        texts: predicted text by question id.
        notes: what was taken in another way than usual.
        run: the output folder it is from; None for a file.
        config: the options of the run, as its config.yaml has them; empty where there is none.
        rules: the name of the rules that the run scored by; None where it is not known.
        f1: what the run scored by them, in percent; None where it is not known.
    """

    name: str
    path: str
    texts: Mapping[str, str] = field(repr=False)
    notes: tuple[str, ...] = ()
    run: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    rules: str | None = None
    f1: float | None = None

    def candidates(self) -> Candidates:
        """The n-best lists of the run; empty where there are none.

        Raises:
            DataError: nbest.json cannot be used.
        """
        path = None if self.run is None else self.run / "nbest.json"
        return {} if path is None or not path.is_file() else _candidates(path)

    def null_odds(self) -> Mapping[str, float]:
        """How much better no answer scored than the best answer; empty where nothing says so.

        Raises:
            DataError: null_odds.json cannot be used.
        """
        path = None if self.run is None else self.run / "null_odds.json"
        return {} if path is None or not path.is_file() else load_null_odds(path)


def other_score_note(system: System, f1: float, rules: str) -> str | None:
    """A note on an F1 by some rules, in percent, that is not what the run scored by them; None where it is that."""
    if system.f1 is None or system.rules != rules or abs(system.f1 - f1) <= _TOLERANCE:
        return None
    return (
        f"its metrics.json has an F1 of {system.f1:.2f}, and on these questions its answers have {f1:.2f}: they are "
        "not (all) those that it was scored on"
    )


def read_systems(paths: Sequence[str]) -> list[System]:
    """The systems that paths name: output folders of runs, and files that `qa-dist score` takes.

    Raises:
        UserError: A file cannot be used, a run has no predictions, or one is named twice.
    """
    files = [_predictions_file(path) for path in paths]
    seen: dict[str, str] = {}
    for path, file in zip(paths, files, strict=True):
        real = os.path.realpath(file)
        if real in seen:
            both = path if seen[real] == path else f"{seen[real]} and {path}"
            raise ConfigError([f"{both}: the same predictions twice; name each system once"])
        seen[real] = path
    names = [Path(path).name for path in paths]
    return [
        _read_system(path, file, name if name and names.count(name) == 1 else path)
        for path, file, name in zip(paths, files, names, strict=True)
    ]


def _predictions_file(path: str) -> Path:
    if not os.path.isdir(path):
        return Path(path)
    file = Path(path) / "predictions.json"
    if not os.path.lexists(file):
        raise DataError(
            f"{path} holds no predictions.json; name the --output_dir of a run that has ended, a --results_dir of "
            "qa-dist evaluate, or a predictions file"
        )
    return file


def _read_system(path: str, file: Path, name: str) -> System:
    if os.path.isdir(path):
        return read_run_system(path, name, read_run_options(Path(path, "config.yaml")))
    texts, notes = load_predictions(file)
    return System(name, path, texts, notes)


def read_run_system(path: str, name: str, config: Mapping[str, Any]) -> System:
    """The predictions in the folder of a run whose options were read; empty where they are not known.

    Raises:
        UserError: A file cannot be used, or there are no predictions.
    """
    texts, notes = load_predictions(_predictions_file(path))
    run = Path(path)
    metrics = read_json_object(run / "metrics.json")
    # Runs of versions before the rules had names scored by SQuAD's.
    rules = metrics.get("answer_normalization", "squad" if "f1" in metrics else None)
    f1: Any = metrics.get("f1")
    return System(
        *(name, path, texts, notes, run, config),
        rules=rules if isinstance(rules, str) else None,
        f1=float(f1) if is_number(f1) else None,
    )


def _candidates(path: Path) -> Candidates:
    lists = read_json_file(path)
    if not isinstance(lists, dict):
        raise DataError(f"{path} must hold a JSON object from ids to lists of candidates, not {type_name(lists)}")
    strange = [key for key, entries in lists.items() if not isinstance(entries, list) or not all(map(_is_one, entries))]
    if strange:
        raise DataError(
            f"{path} must map question ids to lists of candidates with text, score, start_char and end_char, but does "
            f"not for {counted(strange, 'id')}; mend or remove it."
        )
    return lists


def _is_one(entry: Any) -> bool:
    """Whether this is a candidate."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("text"), str)
        and isinstance(entry.get("start_char"), int)
        and isinstance(entry.get("end_char"), int)
        and isinstance(entry.get("score"), int | float)
        and abs(entry["score"]) <= _HIGHEST
    )


def repetitions(systems: Sequence[System]) -> tuple[list[list[System]], list[str]]:
    """Groups of two or more runs whose options differ in the seed, and otherwise in `BESIDE_RESULTS` alone.

    Runs of which two have the same seed are no such group, as that seed would count twice.

    Returns:
        The groups; a sentence on each group that was dropped.
    """
    alike: dict[str, list[System]] = {}
    for system in systems:
        if "seed" in system.config:
            options = {
                name: value for name, value in system.config.items() if name != "seed" and name not in BESIDE_RESULTS
            }
            alike.setdefault(repr(sorted(options.items(), key=repr)), []).append(system)
    groups, notes = [], []
    for group in alike.values():
        by_seed: dict[str, list[str]] = {}
        for system in group:
            by_seed.setdefault(str(system.config["seed"]), []).append(system.name)
        repeated = [f"{' and '.join(names)} have seed {seed}" for seed, names in by_seed.items() if len(names) > 1]
        if repeated:
            listed = ", ".join(system.name for system in group)
            notes.append(f"no mean over the seeds of {listed}: {', '.join(repeated)}; name one run for each seed")
        elif len(group) > 1:
            groups.append(group)
    return groups, notes
