"""What a search tries: the `search` of a sweep file, and the values of options that are to be searched."""

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from qa_dist.common.errors import ConfigError
from qa_dist.common.parsers import type_name
from qa_dist.config.texts import shown

SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "gp": "GPSampler"}
"""Names of samplers, and optuna's class of each."""

PRUNERS = {
    "none": "NopPruner",
    "median": "MedianPruner",
    "halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
}
"""Names of pruners, and optuna's class of each."""

KEYS = ("trials", "parameters", "sampler", "pruner", "storage", "study")
MAX_PROPOSALS = 10_000
LONGEST_NAME = 100
_BETWEEN = 0.381966
_RANGE_KEYS = ("low", "high", "log", "step")


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included; whole numbers where both are.

    Attributes:
        low: The least.
        high: The greatest.
        log: Whether they are drawn on a logarithmic scale.
        step: Only `low` and so many steps above it; None: all.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether its numbers are whole."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some values.

    Attributes:
        values: The values by the text that stands for each in the study, which holds no lists.
    """

    values: Mapping[str, Any]


Parameter = Range | Choice


@dataclass(frozen=True, slots=True)
class Part:
    """A sampler or a pruner: its name, and what its class is given."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched, and how.

    Attributes:
        trials: How many points are tried, each with all seeds.
        parameters: By the name of the option.
        sampler: What proposes the points.
        pruner: What decides at a rung whether a point goes on.
        storage: Where the study is kept, as an address of optuna's; None: in the output folder.
        study: Name of the study there.
    """

    trials: int
    parameters: Mapping[str, Parameter]
    sampler: Part
    pruner: Part
    storage: str | None
    study: str

    def point_name(self, number: int, point: Mapping[str, Any]) -> str:
        """Name of a point's method: its number, and what may be shown of its values."""
        return f"{number} {' '.join(_said(name, value) for name, value in point.items())}"[:LONGEST_NAME].rstrip()

    def described(self) -> dict[str, Any]:
        """What is searched and how, without the place where the study is kept."""
        return {
            "trials": self.trials,
            "sampler": {"name": self.sampler.name, **self.sampler.arguments},
            "pruner": {"name": self.pruner.name, **self.pruner.arguments},
            "parameters": {
                name: list(each.values) if isinstance(each, Choice) else asdict(each)
                for name, each in self.parameters.items()
            },
        }

    def corners(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Points that have each parameter at each of its ends or values, the others at their first: name and values."""
        first = {name: next(_ends(parameter)) for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for value in _ends(parameter):
                yield f"{name} {shown(value)}", {**first, name: value}


def value_text(value: Any) -> str:
    """A value as the names of methods have it."""
    return "+".join(map(str, value)) if isinstance(value, list) else re.sub(r"[/,]", ".", str(value))


def as_name(text: str) -> str:
    """A text with dots for what no method's name may have."""
    return re.sub(r"[^A-Za-z0-9 ._=+-]", ".", text)


def _said(name: str, value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else value_text(value)
    return as_name(f"{name}={text}")


def _ends(parameter: Parameter) -> Iterator[Any]:
    if isinstance(parameter, Choice):
        yield from parameter.values.values()
        return
    yield from (parameter.low, parameter.high)
    if not parameter.is_whole:
        # One between them too: an option of whole numbers takes 4.0 and 64.0, and nothing else of that range.
        step = _BETWEEN * (parameter.high - parameter.low) if parameter.step is None else parameter.step
        yield parameter.low + step


def read_search(path: Path, content: Mapping[str, Any], rungs: Sequence[int]) -> Search | None:
    """The search that a sweep file asks for; None if it asks for none.

    Args:
        path: The sweep file.
        content: What it holds.
        rungs: Its rungs.

    Raises:
        ConfigError: With every problem of it.
    """
    asked = content.get("search")
    if asked is None:
        return None
    if not isinstance(asked, dict):
        raise ConfigError([f"{path}: search is {type_name(asked)} and must be names with values"])
    problems = [
        f"{path}: {shown(name)} is none of a search's keys, which are {', '.join(KEYS)}"
        for name in asked
        if name not in KEYS
    ]
    problems += [
        f"{path} has a search and {name}; a search proposes the points itself, so keep one of them"
        for name in ("grid", "trials")
        if content.get(name)
    ]
    trials = asked.get("trials")
    if not isinstance(trials, int) or isinstance(trials, bool) or not 1 <= trials <= MAX_PROPOSALS:
        problems.append(
            f"{path}: trials of the search is {shown(trials)} and must be how many points are tried, "
            f"from 1 to {MAX_PROPOSALS:,}"
        )
    for name in ("storage", "study"):
        if asked.get(name) is not None and not (isinstance(asked[name], str) and asked[name]):
            problems.append(f"{path}: {name} of the search is {type_name(asked[name])} and must be text")
    parameters = _parameters(path, asked.get("parameters"), problems)
    sampler = _part(path, "sampler", asked.get("sampler", "tpe"), SAMPLERS, problems)
    pruner = _part(path, "pruner", asked.get("pruner", "median" if rungs else "none"), PRUNERS, problems)
    if pruner.name != "none" and not rungs:
        problems.append(f"{path}: the pruner {pruner.name} decides at rungs, and there are none; add rungs: [...]")
    if sampler.name == "gp" and importlib.util.find_spec("scipy") is None:
        problems.append(f"{path}: the sampler gp needs scipy; pip install 'qa-dist[sweep]'")
    if problems:
        raise ConfigError(problems)
    assert isinstance(trials, int)
    return Search(trials, parameters, sampler, pruner, asked.get("storage"), asked.get("study") or path.stem)


def _part(path: Path, key: str, asked: Any, known: Mapping[str, str], problems: list[str]) -> Part:
    """A sampler or pruner: a name, or a mapping with a name and arguments."""
    # `pruner: none` and YAML's own nothing are one word to whoever writes them.
    asked = "none" if asked is None and key == "pruner" else asked
    arguments = dict(asked) if isinstance(asked, dict) else {"name": asked}
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in known:
        what = f"the name of the {key}" if isinstance(asked, dict) else key
        problems.append(f"{path}: {what} is {shown(name)}; use one of {', '.join(known)}")
        name = next(iter(known))
    return Part(name, {str(word): _number(value) for word, value in arguments.items()})


def _parameters(path: Path, asked: Any, problems: list[str]) -> dict[str, Parameter]:
    if not isinstance(asked, dict) or not asked:
        problems.append(f"{path}: the search has no parameters; write options with a list of values, or low and high")
        return {}
    found: dict[str, Parameter] = {}
    for name, content in asked.items():
        where = f"{path}: the parameter {shown(name)}"
        try:
            found[str(name)] = _choice(where, content) if isinstance(content, list) else _range(where, content)
        except ConfigError as error:
            problems += error.problems
    return found


def _choice(where: str, values: list[Any]) -> Choice:
    texts = [value_text(value) for value in values]
    if not values or len(set(texts)) < len(texts):
        raise ConfigError([f"{where} is {shown(values)} and must be a list of different values"])
    return Choice(dict(zip(texts, values, strict=True)))


def _range(where: str, content: Any) -> Range:
    if not isinstance(content, dict) or not {"low", "high"} <= content.keys() <= set(_RANGE_KEYS):
        said = f"has {', '.join(map(str, content))}" if isinstance(content, dict) else f"is {type_name(content)}"
        raise ConfigError([f"{where} {said}; give it a list of values, or low and high with log or step if you like"])
    low, high, step = (_number(content.get(name)) for name in ("low", "high", "step"))
    log = content.get("log", False)
    if not _is_number(low) or not _is_number(high) or not low < high:
        raise ConfigError([f"{where} goes from {shown(low)} to {shown(high)}; both must be numbers, low the less"])
    if not isinstance(log, bool) or (step is not None and not (_is_number(step) and step > 0)):
        raise ConfigError([f"{where} has log {shown(log)} and step {shown(step)}; log is true or false, step above 0"])
    if log and (step is not None or low <= 0):
        raise ConfigError([f"{where} is on a logarithmic scale; give it a low above 0, and no step"])
    found = Range(low, high, log, step)
    if found.is_whole and step is not None and not isinstance(step, int):
        raise ConfigError([f"{where} has whole numbers and a step of {shown(step)}; make it a whole number too"])
    # As decimals, in which 0.9 is three steps of 0.3.
    if step is not None and (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
        raise ConfigError(
            [f"{where} does not get from {low} to {high} in steps of {step}; choose others, so that it does"]
        )
    return found if found.is_whole else Range(float(low), float(high), log, step)


def _number(value: Any) -> Any:
    """A number that YAML takes for text, such as 1e-4; all else as it is."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+\.?[0-9]*[eE][+-]?[0-9]+", value):
        return float(value)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
