"""A sweep file, read: methods, seeds and rungs, and the run that each of them makes."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_dist.common.errors import ConfigError
from qa_dist.common.parsers import type_name
from qa_dist.config.options import RunConfig
from qa_dist.config.parsing import layered, parse, peek, read_recipe
from qa_dist.config.texts import shown

PROG = "qa_dist.sweep"
KEYS = ("config", "options", "seeds", "grid", "trials", "rungs")
MOST_TRIALS = 10_000
"""A grid of more is a slip of the pen."""

# Without a comma, which stands between names on the command line.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._=+-]{0,99}")


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train, to be tried with every seed.

    Attributes:
        name: What the table calls it.
        options: What it sets beside the options that all share, by flag name.
    """

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep.

    Attributes:
        method: Name of the method.
        seed: The seed of the run.
        options: What the method sets, by flag name.
        config: The run, whole.
    """

    method: str
    seed: int
    options: Mapping[str, Any]
    config: RunConfig

    @property
    def name(self) -> str:
        """Unique in the sweep, and the name of the run's folder."""
        return folder_name(self.method, self.seed)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(str(self.config.training.output_dir))


@dataclass(frozen=True, slots=True)
class Plan:
    """A sweep: its trials, those of a method side by side, and its rungs in optimiser steps (none: all go to the end).

    Attributes:
        name: Of the sweep file.
        trials: In the order of the file, the seeds of a method one after the other.
        rungs: After how many steps only the better half of the methods goes on; in increasing order.
    """

    name: str
    trials: Sequence[Trial]
    rungs: Sequence[int]


def folder_name(method: str, seed: int) -> str:
    """Name of the folder of a run."""
    return f"{method.replace(' ', '_')}-seed{seed}"


def read_plan(path: Path, argv: Sequence[str], entry: type[Any], only: Sequence[str] = ()) -> Plan:
    """The sweep that a file describes, with the flags of the command line on top of every trial.

    Args:
        path: The sweep file.
        argv: The flags, `--output_dir` among them.
        entry: Options of the command itself, which may be among the flags.
        only: Names of the methods that are run; none: all.

    Raises:
        ConfigError: With every problem of the file and of its trials.
    """
    content = _read(path)
    seeds, rungs, methods = _seeds(path, content), _rungs(path, content), _methods(path, content)
    if unknown := [name for name in only if name not in {method.name for method in methods}]:
        raise ConfigError(
            [f"--only {unknown[0]}: no such trial in {path}; there are {', '.join(method.name for method in methods)}"]
        )
    flags = {word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    varied = {"seed"}.union(*(method.options for method in methods))
    problems = [
        f"--{name} would overwrite what the trials of {path} differ in; drop it, or change the file"
        for name in sorted(flags & varied)
    ]
    if peek(argv, "config") is not None:
        problems.append(f"--config is for single runs; write `config: NAME` into {path}")
    if problems:
        raise ConfigError(problems)
    common = layered(read_recipe(str(content["config"])) if "config" in content else {}, content.get("options") or {})
    trials = []
    for method in methods:
        try:
            raw = layered(common, method.options)
            config, _ = parse(
                argv, prog=PROG, description="", entry=entry, base=raw, base_name=f"{path}, trial {method.name}"
            )
        except ConfigError as error:
            problems += error.problems
            continue
        if not only or method.name in only:
            trials += [
                Trial(method.name, seed, dict(method.options), _of_trial(config, method.name, seed, rungs))
                for seed in seeds
            ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return Plan(path.stem, trials, rungs)


def _of_trial(config: RunConfig, method: str, seed: int, rungs: Sequence[int]) -> RunConfig:
    """The run of a trial: its seed and folder, and a stop at every rung."""
    folder = Path(str(config.training.output_dir)) / "trials" / folder_name(method, seed)
    training = dataclasses.replace(
        config.training,
        seed=seed,
        output_dir=str(folder),
        resume_from_checkpoint="auto",
        overwrite_output_dir=True,
        disable_tqdm=True,
    )
    if rungs:
        every = str(math.gcd(*rungs))
        training = dataclasses.replace(training, eval_steps=every, checkpointing_steps=every)
    return dataclasses.replace(config, training=training)


def _read(path: Path) -> dict[str, Any]:
    content = read_recipe(str(path), called="the sweep file") if path.is_file() else None
    if content is None:
        raise ConfigError([f"there is no sweep file {path}; give the name of a YAML file"])
    problems = [
        f"{path}: {shown(name)} is none of a sweep's keys, which are {', '.join(KEYS)}"
        for name in content
        if name not in KEYS
    ]
    for name, kind, words in (
        ("options", dict, "names with values"),
        ("grid", dict, "names with lists"),
        ("trials", list, "a list"),
    ):
        if content.get(name) is not None and not isinstance(content[name], kind):
            problems.append(f"{path}: {name} is {type_name(content[name])} and must be {words}")
    if not content.get("grid") and not content.get("trials"):
        problems.append(f"{path} has neither a grid nor trials; write what the runs differ in")
    if problems:
        raise ConfigError(problems)
    return content


def _seeds(path: Path, content: Mapping[str, Any]) -> list[int]:
    seeds = content.get("seeds", [42])
    if not _are_counts(seeds, 0) or len(set(seeds)) < len(seeds):
        raise ConfigError([f"{path}: seeds is {shown(seeds)} and must be a list of different whole numbers"])
    return list(seeds)


def _rungs(path: Path, content: Mapping[str, Any]) -> list[int]:
    rungs = content.get("rungs") or []
    if rungs and (not _are_counts(rungs, 1) or sorted(set(rungs)) != rungs):
        raise ConfigError([f"{path}: rungs is {shown(rungs)} and must be a list of increasing numbers of steps"])
    return list(rungs)


def _are_counts(value: Any, least: int) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, int) and not isinstance(item, bool) and item >= least for item in value)
    )


def _methods(path: Path, content: Mapping[str, Any]) -> list[Method]:
    """The grid's points and then the listed trials."""
    grid: Mapping[str, Any] = content.get("grid") or {}
    problems = [
        f"{path}: {name} in the grid is {type_name(values)} and must be a list of values"
        for name, values in grid.items()
        if not isinstance(values, list) or not values
    ]
    if problems:
        raise ConfigError(problems)
    num_points = math.prod(len(values) for values in grid.values()) if grid else 0
    if num_points > MOST_TRIALS:
        raise ConfigError([f"{path}: the grid has {num_points:,} points; at most {MOST_TRIALS:,} are allowed"])
    methods = []
    if grid:
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            methods.append(Method(" ".join(f"{name}={_text(value)}" for name, value in point.items()), point))
    for number, item in enumerate(content.get("trials") or [], 1):
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise ConfigError([f"{path}: trial {number} has no name; write `- name: ...` and its options below"])
        methods.append(Method(item["name"], {name: value for name, value in item.items() if name != "name"}))
    names = [method.name for method in methods]
    problems = [
        f"{path}: the trial name {shown(name)} may have letters, digits, blanks and any of . _ = + -"
        for name in names
        if not _NAME.fullmatch(name)
    ]
    places = [folder_name(name, 0) for name in names]
    problems += [
        f"{path}: two trials would share the name {shown(name)}; choose another"
        for name, place in dict(zip(names, places, strict=True)).items()
        if places.count(place) > 1
    ]
    if problems:
        raise ConfigError(problems)
    return methods


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else re.sub(r"[/,]", ".", str(value))
