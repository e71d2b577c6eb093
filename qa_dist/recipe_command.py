"""Recipes, launcher configurations and scripts that come with the package: `qa-dist recipes ls|show|cp|validate|path`.

ls                   what there is, and what each is for
show NAME            print a file
cp NAME [DEST]       copy a file, or a whole folder such as launch, to own and change; DEST is a folder or a new file
validate FILE ...    check recipes, launcher configurations (accelerate's YAML, DeepSpeed's JSON) and scripts, and say
                     every problem at once; files named together are checked together. No model is loaded
path NAME            where a file lies, as in: accelerate launch --config_file "$(qa-dist recipes path ddp)" ...

NAME is as `ls` shows it, or without its folder and ending: squad_minilm_small, ddp, launch/local.sh.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qa_dist.common.command import Parser, run_command
from qa_dist.common.errors import ConfigError, UserError
from qa_dist.common.parsers import ParseError, read_yaml
from qa_dist.common.shipped import FOLDERS, SeveralShippedError, find_shipped, shipped_files
from qa_dist.config.options import RunConfig
from qa_dist.config.parsing import parse
from qa_dist.distributed.launch_config import Strategy, read_launch_config, recipe_problems

PROG = "qa_dist.recipe_command"

Kind = Literal["recipe", "launcher configuration", "DeepSpeed configuration", "script"]

_LAUNCHER_KEYS = {"compute_environment", "distributed_type", "deepspeed_config", "fsdp_config", "num_machines"}
"""Keys of accelerate's configuration files, none of which is an option of a recipe."""

_LONGEST_PURPOSE = 90

_OFFLOADS = {"offload_optimizer": "the optimiser's state", "offload_param": "the weights"}

_USES = {
    "recipes": "what trains: --config NAME",
    "accelerate_configs": "where it runs: accelerate launch --config_file FILE",
    "ds_configs": "what DeepSpeed is told: --deepspeed_config_file FILE, or DS_CONFIG=FILE of the scripts",
    "launch": "scripts that join the two: bash FILE",
}


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 for names that mean nothing, files that are in the way, and configurations with problems."""
    return run_command(PROG, lambda: _recipes(sys.argv[1:] if argv is None else argv))


def _recipes(argv: Sequence[str]) -> int:
    parser = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="ls|show|cp|validate|path", required=True, prog=PROG)
    commands.add_parser("ls")
    commands.add_parser("show").add_argument("name", metavar="NAME")
    commands.add_parser("path").add_argument("name", metavar="NAME")
    copying = commands.add_parser("cp")
    copying.add_argument("name", metavar="NAME")
    copying.add_argument("destination", metavar="DEST", nargs="?")
    commands.add_parser("validate").add_argument("files", metavar="FILE", nargs="+")
    options = parser.parse_args(list(argv))
    if options.command == "ls":
        sys.stdout.write(listing())
    elif options.command == "show":
        sys.stdout.write(find_shipped(options.name)[1].read_text(encoding="utf-8"))
    elif options.command == "path":
        sys.stdout.write(f"{find_shipped(options.name)[1]}\n")
    elif options.command == "cp":
        sys.stdout.writelines(f"{path}\n" for path in copy(options.name, options.destination))
    else:
        sys.stdout.writelines(f"{line}\n" for line in validate(options.files))
    return 0


def listing() -> str:
    """Every shipped file, by folder, with what it is for."""
    files = shipped_files()
    lines: list[str] = []
    for folder in FOLDERS:
        lines += ["", f"{folder}/  {_USES[folder]}"]
        for name, path in files.items():
            if name.startswith(f"{folder}/") and path.suffix != ".md":
                lines.append(f"  {_short(name):<24}{_purpose(path)}")
    return "\n".join(lines[1:]) + "\n"


def _short(name: str) -> str:
    """A recipe as --config takes it, another file by its own name."""
    return Path(name).stem if name.startswith("recipes/") else Path(name).name


def _purpose(path: Path) -> str:
    """The first sentence of what a file says of itself."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        zero = json.loads(text)["zero_optimization"]
        offloaded = " and ".join(what for key, what in _OFFLOADS.items() if key in zero)
        return f"ZeRO stage {zero['stage']}" + (f", {offloaded} in the host's memory" if offloaded else "")
    comment = [line[1:].strip() for line in text.splitlines() if line.startswith("#") and not line.startswith("#!")]
    said = " ".join(comment).removeprefix("Purpose:").strip()
    sentence = said.partition(". ")[0].rstrip(".")
    return sentence if len(sentence) <= _LONGEST_PURPOSE else sentence.partition(":")[0]


def copy(name: str, destination: str | None) -> list[Path]:
    """Copy what `name` means to a place of the user's own; returns the files written.

    Args:
        name: A file, or one of FOLDERS for all that is in it.
        destination: A folder that exists, or ends with a slash, or the name of the new file or folder. None: the name
            that the file has in the package, below the folder of the command, so that commands of the documentation
            find it; a recipe goes into that folder itself.

    Raises:
        ConfigError: Nothing has this name, or files are in the way; nothing is written then.
        UserError: The place cannot be written to.
    """
    folder = name.removeprefix("./").rstrip("/")
    # What asks for a place in os.path takes a name that is too long for one that is not there; writing there says it.
    if folder in FOLDERS:
        sources = {whole: path for whole, path in shipped_files().items() if whole.startswith(f"{folder}/")}
        target = Path(destination or folder)
        if destination and (os.path.isdir(target) or destination.endswith("/")):
            target /= folder
        copies = {path: target / path.name for path in sources.values()}
    else:
        whole, source = find_shipped(name)
        own = Path(source.name if whole.startswith("recipes/") else whole)
        target = Path(destination) if destination else own
        if destination and (os.path.isdir(target) or destination.endswith("/")):
            target /= source.name
        copies = {source: target}
    in_the_way = [str(path) for path in copies.values() if os.path.lexists(path)]
    if in_the_way:
        are = "is" if len(in_the_way) == 1 else "are"
        raise ConfigError(
            [f"{', '.join(in_the_way)} {are} there already; give another name behind {name}, or move what is there"]
        )
    for source, target in copies.items():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        except OSError as error:
            raise UserError(f"{target} cannot be written: {error.strerror}; choose another place") from error
    return list(copies.values())


@dataclass(frozen=True, slots=True)
class _File:
    """A file to check: what the user called it, where it is, and what it is."""

    name: str
    path: Path
    kind: Kind


def validate(names: Sequence[str]) -> list[str]:
    """A line for each file that is all right.

    Launcher and DeepSpeed configurations are compared with the recipes that are named beside them, or else with the
    defaults: they may repeat a value but not contradict it.

    Raises:
        ConfigError: With every problem of every file.
    """
    problems: list[str] = []
    files: list[_File] = []
    for name in names:
        try:
            files.append(_recognised(name))
        except ConfigError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    recipes: dict[str, RunConfig] = {}
    for file in files:
        if file.kind == "recipe":
            try:
                recipes[file.name] = _recipe(file.path)
            except ConfigError as error:
                prefix = f"--config {file.path}: "
                problems += [f"{file.name}: {problem.removeprefix(prefix)}" for problem in error.problems]
        elif file.kind == "script":
            problems += [f"{file.name}: {problem}" for problem in _script_problems(file.path)]
    for file in files:
        if file.kind in ("launcher configuration", "DeepSpeed configuration"):
            problems += [f"{file.name}{problem}" for problem in _launch_problems(file, recipes)]
    if problems:
        raise ConfigError(problems)
    return [f"{file.name}: a {file.kind} without problems" for file in files]


def _recognised(name: str) -> _File:
    """A file, or a shipped one that is called so, and what it is, by what is in it.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    path = Path(name)
    # Unlike Path.is_file, this takes a name that is too long for that of a file that is not there.
    if not os.path.isfile(path):
        try:
            path = find_shipped(name)[1]
        except SeveralShippedError as error:
            raise ConfigError([problem.removeprefix(f"{name} ") for problem in error.problems]) from error
        except ConfigError as error:
            raise ConfigError([_why_no_file(name)]) from error
    if path.suffix == ".sh":
        return _File(name, path, "script")
    if path.suffix == ".json":
        return _File(name, path, "DeepSpeed configuration")
    try:
        values: Any = read_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, ParseError):
        # Read again as a recipe, it is told what is wrong with it.
        values = None
    is_launcher = isinstance(values, dict) and not _LAUNCHER_KEYS.isdisjoint(values)
    return _File(name, path, "launcher configuration" if is_launcher else "recipe")


def _why_no_file(name: str) -> str:
    """What a name is that is neither a file nor that of a shipped one."""
    if os.path.isdir(name) or name.removeprefix("./").rstrip("/") in FOLDERS:
        return "is a folder; name a file in it"
    if os.path.exists(name):
        return "is a device or a pipe and no file; name a file"
    return "there is no such file, and none of that name is shipped; see qa-dist recipes ls"


def _recipe(path: Path) -> RunConfig:
    """The configuration that a recipe makes of the defaults.

    Raises:
        ConfigError: With all its problems: options that are none, or contradict each other, or no strategy honours.
    """
    # The output folder is named on the command line.
    config, _ = parse(["--config", str(path)], prog=PROG, description="", base={"output_dir": "outputs"})
    problems = [list(recipe_problems(strategy, config)) for strategy in typing.get_args(Strategy)]
    if all(problems):
        raise ConfigError(list(dict.fromkeys(itertools.chain(*problems))))
    return config


def _script_problems(path: Path) -> Iterable[str]:
    """What bash says of a script that it only reads."""
    try:
        # A name that begins with a dash is no option, and what bash quotes of a script may be no UTF-8.
        done = subprocess.run(
            ["bash", "-n", "--", str(path)], capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        yield f"there is no bash to check it with ({error.strerror})"
        return
    for line in done.stderr.splitlines():
        yield line.removeprefix(f"{path}: ")


def _launch_problems(file: _File, recipes: dict[str, RunConfig]) -> Iterable[str]:
    """Problems of a launcher's or DeepSpeed's configuration, each behind the recipes it is about, if not about all."""
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file.path)}
    if file.kind == "launcher configuration":
        from qa_dist.distributed.launcher_file import launcher_environment

        try:
            environment = launcher_environment(file.path)
        except ConfigError as error:
            yield from (f": {problem}" for problem in error.problems)
            return
    recipes_by_problem: dict[str, list[str]] = {}
    for name, config in (recipes or {"": RunConfig()}).items():
        try:
            read_launch_config(environment, config)
        except ConfigError as error:
            for problem in error.problems:
                recipes_by_problem.setdefault(problem.removeprefix(f"{file.path}: "), []).append(name)
    for problem, names in recipes_by_problem.items():
        # What is wrong with every recipe is wrong with the file.
        beside = f" with {', '.join(names)}" if any(names) and len(names) < len(recipes) else ""
        yield f"{beside}: {problem}"


if __name__ == "__main__":
    sys.exit(main())
