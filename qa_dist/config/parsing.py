"""Flags and recipes read into one configuration, with every problem of all of them reported at once.

A recipe (`qa_dist.config.recipe_files`) overrides the defaults, and flags override the recipe.
"""

import argparse
import dataclasses
import difflib
import itertools
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Literal, TypeVar

from qa_dist.common.errors import ConfigError
from qa_dist.common.notebook import named_as_in_python
from qa_dist.common.secrets import masked
from qa_dist.config.model_options import ADAPTER_OPTIONS
from qa_dist.config.options import GROUPS, RunConfig
from qa_dist.config.recipe_files import read_recipe
from qa_dist.config.removed_options import removal, was_off, was_removed
from qa_dist.config.texts import default_text, option_type, shown

T = TypeVar("T")

_NO_VALUE = object()
_EARLIER = "the earlier run's configuration"
LARGEST_INTEGER = 2**63 - 1
"""The most that an option of whole numbers takes."""

_MAX_DIGITS = 20


def parse(
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    groups: Sequence[str] = tuple(GROUPS),
    entry: type[T] | None = None,
    base: Mapping[str, Any] | None = None,
    base_name: str = _EARLIER,
) -> tuple[RunConfig, T]:
    """The configuration that flags, the recipe they name and `base` describe.

    Args:
        argv: The command line without the program's name.
        prog: Name shown in help and errors.
        description: First lines of the help.
        groups: Option groups this entry takes as flags. A recipe may hold options of the other groups, so that one file
            serves every entry.
        entry: A dataclass of options that belong to this entry alone.
        base: Options that recipe and flags override, as from the `config.yaml` of an earlier run: those of the groups,
            not the entry's own, because such a file may come from somebody else.
        base_name: What messages call `base`.

    Returns:
        The run's configuration and the entry's own options.

    Raises:
        ConfigError: With every problem found: unknown options, wrong types, values out of range, contradictions.
    """
    options = [GROUPS[name] for name in groups] + ([entry] if entry else [])
    known = [*GROUPS.values(), *([entry] if entry else [])]
    flags, problems = _read_flags(argv, options, prog, description)
    layers: list[tuple[str, Mapping[str, Any]]] = [(base_name, base or {})]
    is_recipe_read = True
    if "config" in flags:
        name = str(flags.pop("config"))
        try:
            layers.append((f"--config {name}", read_recipe(name)))
        except ConfigError as error:
            problems.extend(error.problems)
            is_recipe_read = False
    layers.append(("", flags))
    values, refused = _values_of(layers, known, trains="training" in groups)
    problems.extend(refused)
    if is_recipe_read:
        # What was given and refused is not missing.
        given = {name for _, layer in layers for name, raw in layer.items() if raw is not None}
        given |= {word[2:] for word in argv if word.startswith("--")}
        problems.extend(_missing(options, values, given))
    built = _built(known, values, entry, base or {})
    for group in built.values():
        if hasattr(group, "problems"):
            problems.extend(group.problems())
    run = RunConfig(**{name: built[group] for name, group in GROUPS.items()})
    problems.extend(run.problems())
    if problems:
        raise ConfigError(problems)
    return run, (built[entry] if entry else None)  # type: ignore[return-value]


def configure(recipe: str | os.PathLike[str] | RunConfig | None = None, /, **options: Any) -> RunConfig:
    """The configuration of a run from Python: a recipe, and the options that are to differ from it.

    Args:
        recipe: Name of a shipped recipe, a YAML file such as the `config.yaml` of a run, or another configuration;
            None: the defaults.
        options: By their flag names, without dashes, as Python values.

    Raises:
        ConfigError: With every problem found: unknown options, wrong types, values out of range, contradictions.
    """
    given = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in options.items()}
    with named_as_in_python():
        layers: list[tuple[str, Mapping[str, Any]]] = [("", given)]
        if isinstance(recipe, RunConfig):
            layers.insert(0, (_EARLIER, recipe.flat()))
        elif recipe is not None:
            layers.insert(0, (f"the recipe {os.fspath(recipe)}", read_recipe(os.fspath(recipe))))
        values, problems = _values_of(layers, list(GROUPS.values()), trains=True)
        built = _built(list(GROUPS.values()), values, None, {})
        run = RunConfig(**{name: built[group] for name, group in GROUPS.items()})
        for group in (*built.values(), run):
            problems.extend(group.problems())
        if problems:
            raise ConfigError(problems)
    return run


def _built(
    known: Sequence[type[Any]], values: Mapping[str, Any], entry: type[Any] | None, base: Mapping[str, Any]
) -> dict[type[Any], Any]:
    """An instance of each group of options, with the values that are its own.

    None for an entry's own option leaves the run's option of that name as `base` has it.
    """
    own = {item.name for item in dataclasses.fields(entry)} if entry else set()
    said = {name: value for name, value in values.items() if name not in own or value is not None}
    of_run = {**{name: raw for name, raw in base.items() if name in own}, **said}
    built = {}
    for group in known:
        chosen = values if group is entry else of_run
        built[group] = group(
            **{item.name: chosen[item.name] for item in dataclasses.fields(group) if item.name in chosen}
        )
    return built


def _values_of(
    layers: Sequence[tuple[str, Mapping[str, Any]]], known: Sequence[type[Any]], *, trains: bool
) -> tuple[dict[str, Any], list[str]]:
    """The value of every option that some layer sets, the last one that does, and what is wrong in any layer.

    Args:
        layers: Name and raw values of each source of options; later ones override. The first holds no command's own.
        known: All groups of options.
        trains: Whether a run is to be trained with them: what only reads one takes it as it was trained.
    """
    fields = {item.name: item for group in known for item in dataclasses.fields(group)}
    common = {item.name: item for group in GROUPS.values() for item in dataclasses.fields(group)}
    hints = {name: hint for group in known for name, hint in typing.get_type_hints(group).items()}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for number, (where, layer) in enumerate(layers):
        allowed = fields if number else common
        for name in _superseded(layer):
            values.pop(name, None)
        for name, raw in layer.items():
            if was_removed(name) and (was_off(name, raw) or not trains):
                continue
            if name not in allowed:
                problems.append(_unknown(name, allowed, where))
                continue
            try:
                values[name] = _limited(fields[name], _convert(_word_of(fields[name], raw), hints[name]))
            except ValueError as error:
                problems.append(f"{where + ': ' if where else ''}--{name} {shown(raw)} {error}")
    return values, problems


def _missing(groups: Sequence[type[Any]], values: Mapping[str, Any], given: Set[str]) -> Iterator[str]:
    """A sentence for each required option that has no value and was not given."""
    for item in itertools.chain.from_iterable(dataclasses.fields(group) for group in groups):
        if item.metadata["required"] and values.get(item.name) is None and item.name not in given:
            yield f"--{item.name} is missing; give the {item.metadata['help']}"


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Raw options of all layers by name, the last value of each, without those that a later layer makes meaningless."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name in _superseded(layer):
            merged.pop(name, None)
        merged |= layer
    return merged


def _superseded(layer: Mapping[str, Any]) -> list[str]:
    """Options of lower layers that a choice in this one makes meaningless, so that they do not contradict it."""
    names: list[str] = []
    if _is_named(layer, "dataset_name"):
        names += ["dataset_config_name", "train_file", "validation_file"]
    elif _is_named(layer, "train_file") or _is_named(layer, "validation_file"):
        names += ["dataset_name", "dataset_config_name"]
    if layer.get("tuning") == "full":
        names += ADAPTER_OPTIONS
    if layer.get("mixed_precision") in ("no", "fp16"):
        names += ["residual_dtype"]
    if layer.get("mixed_precision") in ("bf16", "fp16"):
        names += ["tf32"]
    return names


def _is_named(layer: Mapping[str, Any], name: str) -> bool:
    """Whether a layer gives an option a value, and not the words for none."""
    return str(layer.get(name)).lower() not in ("none", "auto", "null")


def _read_flags(
    argv: Sequence[str], groups: Sequence[type[Any]], prog: str, description: str
) -> tuple[dict[str, Any], list[str]]:
    """Raw flag values by name, and complaints about words that are no flags of these groups."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        nargs="?",
        const=_NO_VALUE,
        default=argparse.SUPPRESS,
        help="a recipe: a YAML file, or the name of a shipped one",
    )
    for group in groups:
        section = parser.add_argument_group(f"{group.__name__.removesuffix('Config').lower()} options", group.__doc__)
        hints = typing.get_type_hints(group)
        for item in dataclasses.fields(group):
            boolean = item.metadata["booleans"] or bool in (hints[item.name], *typing.get_args(hints[item.name]))
            const = True if boolean else _NO_VALUE
            section.add_argument(
                f"--{item.name}",
                metavar=option_type(hints[item.name]),
                default=argparse.SUPPRESS,
                help=f"{item.metadata['help']} ({default_text(item)})".replace("%", "%%"),
                nargs="?",
                const=const,
            )
    problems: list[str] = []
    namespace, rest = parser.parse_known_args(list(argv))
    flags = vars(namespace)
    for name in [name for name, value in flags.items() if value is _NO_VALUE]:
        problems.append(
            f"--{name} has no value; write it behind the option, as --{name}=VALUE if it begins with a dash"
        )
        del flags[name]
    if sum(word == "--config" or word.startswith("--config=") for word in argv) > 1:
        problems.append("--config is given more than once; give one recipe, and what differs from it as flags")
    names = {item.name: item for group in groups for item in dataclasses.fields(group)}
    for position, word in enumerate(rest):
        if word.startswith("--"):
            problems.append(_unknown(word[2:].partition("=")[0], names, ""))
        elif not (position and rest[position - 1].startswith("-")):
            problems.append(f"{shown(word)} is not an option; every value follows the --name it belongs to")
    return flags, problems


def _unknown(name: str, names: Iterable[str], where: str) -> str:
    prefix = f"{where}: " if where else ""
    if was_removed(name):
        return prefix + removal(name)
    close = difflib.get_close_matches(name, list(names), n=1)
    hint = f"did you mean --{close[0]}?" if close else "see --help for all options"
    return f"{prefix}--{shown(name)} is no option here; {hint}"


def _word_of(item: "dataclasses.Field[Any]", raw: Any) -> Any:
    """`raw`, or what it stands for: true or false where the option was one or the other once, "none" of a list."""
    if item.default == () and isinstance(raw, str) and raw.lower() == "none":
        return ()
    try:
        return item.metadata["booleans"][_convert(raw, bool)] if item.metadata["booleans"] else raw
    except ValueError:
        return raw


def _convert(raw: Any, hint: Any) -> Any:
    """`raw`, a YAML value or the text of a flag, as the type of its option.

    Raises:
        ValueError: It is not of that type; the message continues "--name value ...".
    """
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        inner = next(part for part in typing.get_args(hint) if part is not type(None))
        if raw is None or (isinstance(raw, str) and raw.lower() in ("auto", "none", "null")):
            return None
        return _convert(raw, inner)
    if origin is Literal:
        choices = typing.get_args(hint)
        if raw not in choices:
            raise ValueError(f"is not one of {', '.join(choices)}")
        return raw
    if origin is tuple:
        if raw is None:
            return ()
        parts = raw if isinstance(raw, list | tuple) else raw.split(",") if isinstance(raw, str) else [raw]
        if not all(isinstance(part, str | int) and not isinstance(part, bool) for part in parts):
            raise ValueError("is not a list of names")
        return tuple(_text(str(part).strip()) for part in parts if str(part).strip())
    if hint is bool:
        if isinstance(raw, str) and raw.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0"):
            return raw.lower() in ("true", "yes", "on", "1")
        if not isinstance(raw, bool):
            raise ValueError("is not true or false")
        return raw
    if hint is str:
        if isinstance(raw, bool | float):
            raise ValueError("is not text; put it in quotes")
        if not isinstance(raw, str | int):
            raise ValueError("is not text")
        return _text(str(raw))
    if isinstance(raw, bool):
        raise ValueError(f"is not {'an integer' if hint is int else 'a number'}")
    if isinstance(raw, str) and raw.lstrip("+-").isdecimal() and len(raw) > _MAX_DIGITS:
        raise ValueError("has too many digits")
    try:
        number = float(raw)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"is not {'an integer' if hint is int else 'a number'}") from None
    if hint is int:
        if not number.is_integer():
            raise ValueError("is not an integer")
        return int(raw) if isinstance(raw, str) and raw.lstrip("+-").isdecimal() else int(number)
    return number


def _text(value: str) -> str:
    """`value`, or a ValueError if it is nothing, cannot be a name or path, or is what nobody else should read."""
    if not value:
        raise ValueError("is empty; give a value or leave the option out")
    if "\0" in value:
        raise ValueError("holds the character NUL, which no name or path can have")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8; rename what it names") from None
    if value.startswith("~") and os.path.expanduser(value) == value:
        raise ValueError("begins with the home folder of a user who does not exist; write ./~ for a name with a tilde")
    if masked(value) != value:
        raise ValueError(
            "holds what looks like an access token or password, which would be written into logs and results; give a "
            "token in the environment, as HF_TOKEN"
        )
    # The shell does so only where a word begins with it, and a recipe has no shell.
    return os.path.expanduser(value) if value.startswith("~") else value


def _limited(item: "dataclasses.Field[Any]", value: Any) -> Any:
    """`value`, or a ValueError that says which values the option allows."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return value
    limits = dict(item.metadata["limits"])
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        limits["maximum"] = limits["maximum"] or LARGEST_INTEGER
    allowed = []
    fits = math.isfinite(value) if isinstance(value, float) else True
    tests: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
        ("minimum", "at least", lambda limit: value >= limit),
        ("above", "above", lambda limit: value > limit),
        ("maximum", "at most", lambda limit: value <= limit),
        ("below", "below", lambda limit: value < limit),
    )
    for name, text, test in tests:
        if limits[name] is not None:
            allowed.append(f"{text} {limits[name]}")
            fits = fits and test(limits[name])
    if not fits:
        if allowed and isinstance(value, float) and not math.isfinite(value):
            allowed.append("finite")
        raise ValueError(f"is out of range; it must be {' and '.join(allowed) or 'a finite number'}")
    return value
