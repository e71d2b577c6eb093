"""The layers of the package: a module imports from its own layer's left or from layers below, never back."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "qa_dist"

ORDER = (
    # contracts
    "common/errors",
    "data/records",
    "common/parsers",
    "common/secrets",
    "config/options",
    "common/signals",
    "distributed/watchdog",
    "distributed/roll_call",
    "common/command",
    "machine/requirements",
    # pure
    "data/sample",
    "data/sources",
    "features/windows",
    "features/workers",
    "features/batching",
    "evaluation/answers",
    "evaluation/scoring",
    "training/optimizer",
    # ranks
    "distributed/launch_config",
    "distributed/strategies/choice",
    "distributed/ranks",
    # parts
    "model/pretrained",
    "features/store",
    "model/attention",
    "model/dropout",
    "model/quantization",
    "model/building",
    "features/token_budget",
    "memory/by_strategy",
    "memory/tracing",
    "model/saved",
    "training/checkpoints",
    "training/progress",
    "machine/checks",
    "distributed/bandwidth",
    # loops
    "evaluation/loop",
    "training/run",
    "distributed/agreement",
    "training/loop",
    # entries
    "prepare",
    "train",
    "evaluate",
    "merge",
    "estimate",
    "score",
    "bench",
    "doctor",
    "compatibility",
    "documentation",
    "cli",
)
PURE = (
    *("common/errors", "data/records", "common/parsers", "common/secrets", "config/options"),
    *(
        "data/sample",
        "data/sources",
        "features/windows",
        "features/batching",
        "evaluation/answers",
        "evaluation/scoring",
        "distributed/launch_config",
    ),
)
OTHERS = ("accelerate", "deepspeed")


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


def test_every_module_has_a_place() -> None:
    modules = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")}
    elsewhere = ("benchmarking/", "metrics/", "evaluation/metrics/")
    assert sorted(ORDER) == sorted(
        name for name in modules if not name.startswith(elsewhere) and Path(name).name != "__init__"
    )


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_one_way(module: str) -> None:
    ours = {name.removeprefix("qa_dist.").replace(".", "/") for name in imports(module) if name.startswith("qa_dist.")}
    later = {name for name in ours & set(ORDER) if ORDER.index(name) >= ORDER.index(module)}
    assert not later, f"{module} imports {later}, which lie above it"


@pytest.mark.parametrize("module", ORDER)
def test_only_distributed_and_strategies_talk_to_other_ranks(module: str) -> None:
    talking = {name.split(".")[0] for name in imports(module) if name.startswith(("torch.distributed", *OTHERS))}
    allowed = {"distributed/ranks": {"torch", "accelerate"}, "distributed/strategies/choice": {"torch", "deepspeed"}}
    assert talking == allowed.get(module, set())


@pytest.mark.parametrize("part", sorted(path.stem for path in (PACKAGE / "benchmarking").glob("*.py")))
def test_parts_of_the_benchmark_stand_on_parts_and_loops(part: str) -> None:
    found = imports(f"benchmarking/{part}")
    entries = {f"qa_dist.{module}" for module in ORDER[ORDER.index("prepare") :]}
    assert not found & entries, "an entry is started, not imported"
    assert not {name for name in found if name.startswith(("torch.distributed", "accelerate"))}


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_do_not_log(module: str) -> None:
    assert "logging" not in imports(module)
