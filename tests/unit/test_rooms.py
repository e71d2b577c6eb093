"""The floor plan: files at the top are commands, folders are rooms, and a room imports only rooms above it.

"Above" is in the order of ROOMS. Commands import rooms and no other command; importing
accelerate, torch.distributed and DeepSpeed is left to the room of the ranks.
"""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from qa_dist.cli import COMMANDS
from qa_dist.documentation import own_options

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qa_dist"

ROOMS = (
    "common",
    "config",
    "machine",
    "data",
    "features",
    "model",
    "distributed",
    "evaluation",
    "answering",
    "training",
    "reporting",
    "memory",
    "benchmarking",
    "sweeping",
)
BESIDE_COMMANDS = ("__init__", "cli", "documentation")
"""Files at the top that are no commands: `cli` holds those under one name, `documentation` writes generated tables."""

MAY_IMPORT = {
    "torch.distributed": ("distributed/",),
    "accelerate": ("distributed/",),
    "deepspeed": ("distributed/strategies/",),
}
"""Who may import what only few should know."""

PURE = ("common", "config", "data", "features/tokenizer", "features/windows", "features/batching")
PURE = (*PURE, "evaluation/candidates", "evaluation/searches", "evaluation/top_spans", "evaluation/answers")
PURE = (*PURE, "evaluation/scoring", "evaluation/normalization", "evaluation/ceiling", "distributed/launch_config")
PURE = (*PURE, "distributed/zero_section")
"""Places whose code returns what it has to say."""

LONGER = {"answering/reader": ("__init__",)}
"""Functions that may have more than 60 lines: a reader's 14 options alone take 46, with what each of them means."""

MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))


@cache
def imports(module: str) -> set[str]:
    """Full names of everything a module imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def rooms_of(names: set[str]) -> set[str]:
    """Rooms and commands of the package among what is imported; `qa_dist.__version__` is in none."""
    inside = {name.split(".")[1] for name in names if name.startswith("qa_dist.")}
    return inside - {"__version__"}


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or a word in one: strings and prose name them where no import does."""
    place = PACKAGE
    for part in name.split(".")[1:]:
        if (place / part).is_dir():
            place = place / part
        elif (place / f"{part}.py").is_file():
            place = place / f"{part}.py"
        else:
            file = place / "__init__.py" if place.is_dir() else place
            return re.search(rf"\b{part}\b", file.read_text(encoding="utf-8")) is not None
    return True


def test_modules_that_strings_name_are_there() -> None:
    texts = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "launch").glob("*.sh")]
    gone = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in (*texts, ROOT / "Makefile", ROOT / "pyproject.toml")
        for name in sorted(set(re.findall(r"\bqa_dist(?:\.[a-z]\w*)+", path.read_text(encoding="utf-8"))))
        if not is_there(name)
    ]
    assert gone == []


def test_every_folder_is_a_room() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


def lacks_of_command(module: str) -> list[str]:
    """What a file at the top of the package has not got and a command needs."""
    text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    names = [name for name, command in COMMANDS.items() if command.module == f"qa_dist.{module}"]
    if not names:
        return ["a row in cli.COMMANDS"]
    (name,) = names
    heading = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    entry = re.search(r"\bentry=(\w+)", text)
    options = own_options().get(f"{name} only")
    has = {
        "a summary without a full stop": not COMMANDS[name].summary.endswith("."),
        f'PROG = "qa_dist.{module}"': f'\nPROG = "qa_dist.{module}"\n' in text,
        "main(argv)": "\ndef main(argv: Sequence[str] | None = None) -> int:\n" in text,
        "sys.exit(main()) at its end": text.endswith('\n\nif __name__ == "__main__":\n    sys.exit(main())\n'),
        "its command line in the first line of its docstring": f"qa_dist.{module}" in heading
        or f"qa-dist {name}" in heading,
        f"options called {name.capitalize()}Config": not entry
        or entry[1] == "None"
        or (options and options.__name__ == entry[1]),
        "a row in README's table (make docs)": f"| `qa-dist {name}` | "
        in (ROOT / "README.md").read_text(encoding="utf-8"),
    }
    return [what for what, is_there in has.items() if not is_there]


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in PACKAGE.glob("*/**/__init__.py")), ids=lambda path: path.name
)
def test_the_guide_to_a_room_has_a_line_for_each_module_and_names_nothing_else(folder: Path) -> None:
    guide = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    there = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    there -= {"__init__"}
    assert sorted(re.findall(r"^ *`(\w+)`: \w", guide, re.MULTILINE)) == sorted(there)
    assert set(re.findall(r"`([a-z_]+)`", guide)) <= there


@pytest.mark.parametrize("module", sorted({path.stem for path in PACKAGE.glob("*.py")} - {*BESIDE_COMMANDS}))
def test_a_command_has_all_that_one_needs(module: str) -> None:
    lacks = lacks_of_command(module)
    assert not lacks, f"the command {module} lacks {'; '.join(lacks)}"


def test_every_command_has_a_module() -> None:
    assert [
        name for name, command in COMMANDS.items() if not (ROOT / f"{command.module.replace('.', '/')}.py").exists()
    ] == []


def commands_imported(module: str) -> set[str]:
    """Files at the top of the package, other than itself, that a module imports."""
    files = {name for name in MODULES if "/" not in name}
    return rooms_of(imports(module)) & files - {module}


# `cli` imports the command that is asked for, by its name, and `documentation` reads the table of all of them.
@pytest.mark.parametrize(
    "module", [name for name in MODULES if "/" not in name and name not in ("cli", "documentation")]
)
def test_a_command_imports_no_command(module: str) -> None:
    assert commands_imported(module) == set(), f"what {module} takes from there belongs in a room"


def test_imports_of_commands_are_noticed() -> None:
    assert commands_imported("documentation") == {"cli"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    modules = [module for module in MODULES if module.startswith(f"{room}/")]
    assert modules
    wrong = {module: sorted(below) for module in modules if (below := rooms_of(imports(module)) - allowed)}
    assert not wrong, f"these import what lies below {room}, or commands: {wrong}"


def test_modules_form_no_circle() -> None:
    names = {f"qa_dist.{module.replace('/', '.')}" for module in MODULES}
    graph = {
        f"qa_dist.{module.replace('/', '.')}": imports(module) & names - {f"qa_dist.{module.replace('/', '.')}"}
        for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' > '.join(error.args[1])}")


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_only_the_room_of_the_ranks_talks_to_other_ranks(library: str) -> None:
    users = {name for name in MODULES if any(f"{found}.".startswith(f"{library}.") for found in imports(name))}
    assert users
    assert {name for name in users if not name.startswith(MAY_IMPORT[library])} == set()


def test_functions_have_at_most_60_lines_and_files_450() -> None:
    tests = sorted((PACKAGE.parent / "tests").rglob("*.py"))
    long = [str(path) for path in tests if len(path.read_text(encoding="utf-8").splitlines()) > 450]
    for module in MODULES:
        text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
        long += [module] if len(text.splitlines()) > 450 else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in LONGER.get(module, ()):
                long += [f"{module}.{node.name}"] if (node.end_lineno or 0) - node.lineno >= 60 else []
    assert long == []


def test_pure_modules_do_not_log() -> None:
    pure = [name for name in MODULES if name.startswith(PURE)]
    assert all(any(name.startswith(place) for name in pure) for place in PURE)
    # What holds back the log lines of libraries has none of its own.
    assert [name for name in pure if "logging" in imports(name)] == ["common/libraries"]
