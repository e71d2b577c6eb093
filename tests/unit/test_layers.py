"""The floor plan: files at the top are commands, folders are rooms, and a room imports only rooms above it.

"Above" is in the order of ROOMS. Commands import rooms and no command but those that they stand for; importing
accelerate, torch.distributed and DeepSpeed is left to the room of the ranks.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "qa_dist"

ROOMS = (
    "common",
    "config",
    "machine",
    "data",
    "features",
    "model",
    "distributed",
    "evaluation",
    "training",
    "memory",
    "benchmarking",
)
COMMANDS = ("train", "prepare", "evaluate", "score", "merge", "estimate", "doctor", "bench")
ENTRIES = (*COMMANDS, "recipe_command", "cli", "documentation")
"""The files at the top: the commands, what holds them under one name, and what writes the generated tables."""

MAY_IMPORT = {
    "torch.distributed": ("distributed/",),
    "accelerate": ("distributed/",),
    "deepspeed": ("distributed/strategies/",),
}
"""Who may import what only few should know."""

PURE = ("common", "config", "data", "features/windows", "features/batching", "evaluation/candidates")
PURE = (*PURE, "evaluation/answers", "evaluation/scoring", "distributed/launch_config")
"""Places whose code returns what it has to say."""

MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))


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


def test_every_folder_is_a_room_and_every_file_at_the_top_a_command() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(ROOMS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ENTRIES, "__init__"}


@pytest.mark.parametrize("module", [module for module in MODULES if "/" in module])
def test_a_room_imports_only_rooms_above_it(module: str) -> None:
    room = module.partition("/")[0]
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    assert not rooms_of(imports(module)) - allowed, f"{module} imports what lies below {room}, or a command"


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


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("library", MAY_IMPORT)
def test_only_the_room_of_the_ranks_talks_to_other_ranks(module: str, library: str) -> None:
    names = {name for name in imports(module) if name == library or name.startswith(f"{library}.")}
    assert not names or module.startswith(MAY_IMPORT[library])


# What holds back the log lines of libraries has none of its own.
@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(PURE) and name != "common/libraries"])
def test_pure_modules_do_not_log(module: str) -> None:
    assert "logging" not in imports(module)
