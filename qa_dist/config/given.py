"""What a command line gives, before or beside what `parse` makes of all of it."""

import os
from collections.abc import Collection, Sequence

from qa_dist.common.errors import ConfigError
from qa_dist.config.model_options import ADAPTER_OPTIONS


def peek(argv: Sequence[str], flag: str) -> str | None:
    """Value of one flag, the last one as in `parse`, before all of the command line is read; None if it is absent."""
    found = None
    for position, word in enumerate(argv):
        if word == f"--{flag}" and position + 1 < len(argv):
            found = argv[position + 1]
        if word.startswith(f"--{flag}="):
            found = word.partition("=")[2]
    return None if found is None else os.path.expanduser(found)


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks what can be said, before anything that it names is looked for."""
    return not {"-h", "--help"}.isdisjoint(argv)


def given_flags(argv: Sequence[str]) -> list[str]:
    """Names of the options of a command line, without dashes, in their order."""
    return list(dict.fromkeys(word[2:].partition("=")[0] for word in argv if word.startswith("--")))


def require_named(value: str | None, argv: Sequence[str], flag: str) -> None:
    """Make sure that the model stands on the command line, where it is looked for before a recipe is read.

    Raises:
        ConfigError: It stands in a recipe alone.
    """
    if value is not None and peek(argv, flag) is None:
        raise ConfigError([f"--{flag} {value} stands in a recipe, before which the model is looked for; give the flag"])


def refuse_trained_options(argv: Sequence[str]) -> None:
    """Refuse flags that say how a model is trained, to a command whose model is.

    Raises:
        ConfigError: There are some.
    """
    names = {*ADAPTER_OPTIONS, "tuning", "init_adapter", "model_dropout", "show_structure"} - {"lora_implementation"}
    refuse_without_effect(argv, names, "the model is trained, with values of its own that stay", "leave it out here")


def refuse_without_effect(argv: Sequence[str], names: Collection[str], why: str, remedy: str = "leave it out") -> None:
    """Refuse flags that a command takes along with others of their group, and does nothing with.

    Args:
        argv: The command line.
        names: Names of the options.
        why: Why they have no effect, for the message.
        remedy: What to do, for the message.

    Raises:
        ConfigError: There are some.
    """
    if given := [f"--{name}" for name in given_flags(argv) if name in names]:
        raise ConfigError([f"{', '.join(given)}: {why}; {remedy}"])
