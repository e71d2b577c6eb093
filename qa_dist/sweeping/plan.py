"""A sweep file, read: methods or a search, seeds and rungs, and the run that each of them makes."""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_dist.common.errors import ConfigError
from qa_dist.common.parsers import type_name
from qa_dist.config.given import given_flags, peek
from qa_dist.config.options import RunConfig
from qa_dist.config.parsing import LARGEST_INTEGER, layered, parse
from qa_dist.config.recipe_files import read_recipe
from qa_dist.config.texts import shown
from qa_dist.sweeping.space import LONGEST_NAME, Search, as_name, read_search, value_text

PROG = "qa_dist.sweep"
KEYS = ("config", "options", "seeds", "grid", "trials", "search", "rungs")
MAX_TRIALS = 10_000
"""A grid of more is a slip of the pen."""

_MAX_EVALUATIONS = 10
"""How often a trial may have to evaluate before its first rung."""

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
        trials: In the order of the file, the seeds of a method one after the other; none where there is a search.
        rungs: After how many steps only some of the methods go on; in increasing order.
        seeds: Every method is tried with each of them.
        output_dir: The folder of all of it.
        metric: By which methods are compared.
        search: What is searched; None: the trials are all there is.
        runs: The trials of a method, with all seeds; it raises a ConfigError if the options do not go together.
        configs: A run of each method, or of each corner of the search.
        only: Names of the methods whose trials are run; none: all.
    """

    name: str
    trials: Sequence[Trial]
    rungs: Sequence[int]
    seeds: Sequence[int]
    output_dir: Path
    metric: str
    search: Search | None
    runs: Callable[[Method], list[Trial]]
    configs: Sequence[RunConfig]
    only: Collection[str] = ()

    @property
    def num_trials(self) -> int:
        """How many runs there will be."""
        return self.search.trials * len(self.seeds) if self.search else len(self.trials)


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
    seeds, rungs = _seeds(path, content), _rungs(path, content)
    search = read_search(path, content, rungs)
    methods = [] if search else _methods(path, content)
    if search and only:
        raise ConfigError([f"--only names trials, and {path} has a search, which proposes them; drop one of the two"])
    if rungs and only:
        raise ConfigError([f"--only runs some trials, and {path} has rungs, which compare all; drop one of the two"])
    if unknown := [name for name in only if name not in {method.name for method in methods}]:
        raise ConfigError(
            [f"--only {unknown[0]}: no such trial in {path}; there are {', '.join(method.name for method in methods)}"]
        )
    differing: set[str] = set().union(*(method.options for method in methods), search.parameters if search else ())
    _check_flags(argv, {"seed", *differing}, path)
    _check_own(argv, differing, content, path)
    recipe = {} if content.get("config") is None else read_recipe(str(content["config"]))
    common = layered(recipe, content.get("options") or {})

    def runs(method: Method) -> list[Trial]:
        raw = layered(common, method.options)
        where = f"{path}, trial {method.name}"
        config, _ = parse(argv, prog=PROG, description="", entry=entry, base=raw, base_name=where)
        return [
            Trial(method.name, seed, dict(method.options), _of_trial(config, method.name, seed, rungs))
            for seed in seeds
        ]

    trials: list[Trial] = []
    problems: list[str] = []
    configs = []
    points = [Method(*corner) for corner in search.corners()] if search else methods
    for point in points:
        try:
            made = runs(point)
        except ConfigError as error:
            problems += error.problems
            continue
        configs.append(made[0].config)
        trials += [] if search else made
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    _check_distinct(methods, configs, path)
    _check_scores(configs, search=search is not None, rungs=bool(rungs), path=path)
    training = configs[0].training
    _check_spacing(rungs, path)
    _check_rungs(configs, rungs, path)
    metric, folder = training.metric_for_best_model, Path(str(training.output_dir)).parent.parent
    return Plan(path.stem, trials, rungs, seeds, folder, metric, search, runs, configs, only)


def _check_flags(argv: Sequence[str], varied: Collection[str], path: Path) -> None:
    """Refuse flags that no trial can take, given which options the trials of the file differ in."""
    problems = [
        f"--{name} would overwrite what the trials of {path} differ in; drop it, or change the file"
        for name in sorted({*given_flags(argv)} & set(varied))
    ]
    if peek(argv, "config") is not None:
        problems.append(f"--config is for single runs; write `config: NAME` into {path}")
    if problems:
        raise ConfigError(problems)


def _check_own(argv: Sequence[str], differing: Collection[str], content: Mapping[str, Any], path: Path) -> None:
    """Refuse options that a sweep sets itself, wherever they are given, and differences in what all trials share.

    Args:
        argv: The flags of the command line.
        differing: Names of the options that the trials differ in.
        content: What the file holds.
        path: The file.
    """
    own = {
        "seed": "its trials have those of the list `seeds`",
        "resume_from_checkpoint": "its trials go on from where they are",
        "overwrite_output_dir": "its trials go on from where they are",
        "disable_tqdm": "its trials have no bars",
    }
    if content.get("rungs"):
        own |= dict.fromkeys(("eval_steps", "checkpointing_steps"), "its trials are evaluated and saved at its rungs")
    given = {*differing, *(content.get("options") or {}), *given_flags(argv)}
    problems = [f"{path}: a sweep sets --{name} itself, {why}; drop it" for name, why in own.items() if name in given]
    problems += [
        f"{path}: --{name} must be the same for all trials; move it to `options`"
        for name in ("metric_for_best_model", "output_dir")
        if name in differing
    ]
    if problems:
        raise ConfigError(problems)


def _check_distinct(methods: Sequence[Method], configs: Sequence[RunConfig], path: Path) -> None:
    """Refuse methods that are the same run, whatever their names: its figures would be the same, to the last bit.

    Args:
        methods: All of them; none where there is a search.
        configs: A run of each.
        path: The sweep file.
    """
    first: dict[str, str] = {}
    problems = []
    for method, config in zip(methods, configs, strict=False):
        run = repr(dataclasses.replace(config, training=dataclasses.replace(config.training, output_dir=None)))
        if first.setdefault(run, method.name) != method.name:
            problems.append(
                f"{path}: {first[run]} and {method.name} are the same run, as their options are; leave one out"
            )
    if problems:
        raise ConfigError(problems)


def _check_scores(configs: Sequence[RunConfig], *, search: bool, rungs: bool, path: Path) -> None:
    """Refuse a search, or rungs, where there is nothing to score."""
    what = "a search, which goes by" if search else "rungs, where trials are compared by"
    if (search or rungs) and any(not (each.data.validation_file or each.data.dataset_name) for each in configs):
        raise ConfigError([f"{path} has {what} scores; give --validation_file"])


def _check_rungs(configs: Sequence[RunConfig], rungs: Sequence[int], path: Path) -> None:
    """Refuse rungs at which there is nothing to compare trials by, or that trials do not come to."""
    metric = configs[0].training.metric_for_best_model
    lengths = [each.training.max_train_steps or math.inf for each in configs]
    if rungs and max(lengths) <= rungs[-1]:
        raise ConfigError(
            [
                f"{path} has a rung after {rungs[-1]} steps, and --max_train_steps {max(lengths)} ends all trials "
                "before they would go on from there; take smaller rungs, or more steps"
            ]
        )
    if rungs and metric != "loss" and any(config.data.max_eval_features for config in configs):
        raise ConfigError(
            [
                f"{path} has rungs, where trials are compared by {metric}, and --max_eval_features has the loss alone "
                "evaluated; leave it out, or add --metric_for_best_model loss"
            ]
        )


def _check_spacing(rungs: Sequence[int], path: Path) -> None:
    """Refuse rungs for which trials would have to evaluate all the time."""
    every = math.gcd(*rungs) if rungs else 0
    if rungs and min(rungs) > _MAX_EVALUATIONS * every:
        multiples = ", ".join(dict.fromkeys(str(max(1, round(rung / min(rungs))) * min(rungs)) for rung in rungs))
        raise ConfigError(
            [
                f"{path} has rungs {', '.join(map(str, rungs))}, for which trials evaluate at every multiple of "
                f"{every} steps, the largest number that divides them all; take multiples of one number, such as "
                f"{multiples}"
            ]
        )


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
    if not any(content.get(name) for name in ("grid", "trials", "search")):
        problems.append(f"{path} has neither a grid nor trials nor a search; write what the runs differ in")
    if problems:
        raise ConfigError(problems)
    return content


def _seeds(path: Path, content: Mapping[str, Any]) -> list[int]:
    seeds = content.get("seeds", [42])
    if not _are_counts(seeds, 0) or max(seeds) > LARGEST_INTEGER or len(set(seeds)) < len(seeds):
        raise ConfigError(
            [
                f"{path}: seeds is {shown(seeds)} and must be a list of different whole numbers from 0 to "
                f"{LARGEST_INTEGER}"
            ]
        )
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


def _with_short_names(methods: Sequence[Method]) -> list[Method]:
    """Points of a grid under names of `LONGEST_NAME` characters at most: those that are cut alike end in a number."""
    cut = [method.name[:LONGEST_NAME].rstrip() for method in methods]
    counts = Counter(folder_name(name, 0) for name in cut)
    numbered = [f"{name[: LONGEST_NAME - 8].rstrip()} {number}" for number, name in enumerate(cut, 1)]
    return [
        Method(other if counts[folder_name(name, 0)] > 1 and name != method.name else name, method.options)
        for method, name, other in zip(methods, cut, numbered, strict=True)
    ]


def _methods(path: Path, content: Mapping[str, Any]) -> list[Method]:
    """The grid's points and then the listed trials."""
    grid: Mapping[str, Any] = content.get("grid") or {}
    problems = [
        f"{path}: {name} in the grid is {'empty' if values == [] else type_name(values)} and must be a list of values"
        for name, values in grid.items()
        if not isinstance(values, list) or not values
    ]
    if problems:
        raise ConfigError(problems)
    num_points = math.prod(len(values) for values in grid.values()) if grid else 0
    if num_points > MAX_TRIALS:
        raise ConfigError([f"{path}: the grid has {num_points:,} points; at most {MAX_TRIALS:,} are allowed"])
    methods = []
    if grid:
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            name = " ".join(as_name(f"{option}={value_text(value)}") for option, value in point.items())
            methods.append(Method(name, point))
        methods = _with_short_names(methods)
    for number, item in enumerate(content.get("trials") or [], 1):
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            found = item.get("name") if isinstance(item, dict) else None
            raise ConfigError(
                [f"{path}: trial {number} has no name; write `- name: ...` and its options below"]
                if found is None
                else [
                    f"{path}: the name of trial {number} is {type_name(found)}, {shown(found)}, and must be text; put "
                    "quotation marks around it"
                ]
            )
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
