"""What is installed works from an empty folder, without the repository: commands, recipes, configurations, scripts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT
from tests.support import forked_python

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed the package into: it builds a wheel from the repository's files, and unpacks it."""
    folder = tmp_path_factory.mktemp("package")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    # A copy: setuptools writes beside what it builds.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("qa_dist", "accelerate_configs", "ds_configs", "launch"):
        shutil.copytree(ROOT / name, source / name)
    # What an earlier build may have left: modules that are no more must not travel.
    stale = source / "build" / "lib" / "qa_dist"
    stale.mkdir(parents=True)
    (stale / "no_more.py").touch()
    target = folder / "installed"
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", str(target), str(source)], check=True)
    return target


def run(installed: Path, folder: Path, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with no other qa_dist to be found than the installed one."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHON": sys.executable, **changes}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


def succeed(installed: Path, folder: Path, *words: str, **changes: str) -> str:
    """Standard output of a command that must end with 0."""
    done = run(installed, folder, *words, **changes)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def recorder(tmp_path: Path) -> str:
    """An interpreter that writes down what a script starts; asked for a path, it is the real one."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\n[[ "$*" != *qa_dist.recipe_command* ]] || exec {sys.executable} "$@"\n'
        'printf "%s\\n" "$@" "deepspeed=${ACCELERATE_DEEPSPEED_CONFIG_FILE:-}"\n',
        encoding="utf-8",
    )
    python.chmod(0o755)
    return str(python)


def test_the_pages_of_the_server_travel_with_it(installed: Path) -> None:
    pages = installed / "qa_dist" / "answering" / "server"
    assert sorted(path.name for path in pages.glob("*.html")) == ["docs.html", "page.html"]


def test_the_wheel_holds_every_folder_and_nothing_of_an_earlier_build(installed: Path) -> None:
    package = installed / "qa_dist"
    for name in ("accelerate_configs", "ds_configs", "launch"):
        in_repository = {path.name: path.read_bytes() for path in (ROOT / name).iterdir()}
        assert {path.name: path.read_bytes() for path in (package / "shipped" / name).iterdir()} == in_repository
    recipes = {path.name for path in (ROOT / "qa_dist" / "recipes").iterdir()}
    assert {path.name for path in (package / "recipes").iterdir()} == recipes
    assert not (package / "no_more.py").exists()


def test_the_command_lists_shows_copies_and_checks_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    command = str(installed / "bin" / "qa-dist")
    where = succeed(installed, tmp_path, sys.executable, "-c", "import qa_dist; print(qa_dist.__file__)")
    assert Path(where).is_relative_to(installed)
    assert "\n  train " in succeed(installed, tmp_path, command, "--help")
    listed = succeed(installed, tmp_path, command, "recipes", "ls")
    assert all(
        name in listed for name in ("squad_minilm_small", "multinode_ddp.yaml", "zero3_offload.json", "slurm.sh")
    )
    recipe = (ROOT / "qa_dist" / "recipes" / "squad_minilm_small.yaml").read_text(encoding="utf-8")
    assert succeed(installed, tmp_path, command, "recipes", "show", "squad_minilm_small") == recipe
    assert succeed(installed, tmp_path, command, "recipes", "cp", "squad_minilm_small") == "squad_minilm_small.yaml\n"
    again = run(installed, tmp_path, command, "recipes", "cp", "squad_minilm_small")
    assert again.returncode == 2
    assert "squad_minilm_small.yaml is there already" in again.stderr
    # The one names ds_configs/zero2.json, which is not in this folder.
    files = ("squad_minilm_small.yaml", "accelerate_configs/zero2.yaml", "zero3.json", "local.sh")
    checked = succeed(installed, tmp_path, command, "recipes", "validate", *files)
    assert checked.splitlines() == [
        "squad_minilm_small.yaml: a recipe without problems",
        "accelerate_configs/zero2.yaml: a launcher configuration without problems",
        "zero3.json: a DeepSpeed configuration without problems",
        "local.sh: a script without problems",
    ]


def test_copied_scripts_find_configurations_in_the_package_until_there_are_own_ones(
    installed: Path, tmp_path: Path, recorder: str
) -> None:
    command = str(installed / "bin" / "qa-dist")
    shipped = installed / "qa_dist" / "shipped"
    folder = tmp_path / "own"
    folder.mkdir()
    for script in ("local", "deepspeed", "slurm"):
        succeed(installed, folder, command, "recipes", "cp", script, ".")
    start = {"PYTHON": recorder, "NUM_PROCESSES": "2", "NPROC_PER_NODE": "2"}
    assert str(shipped / "accelerate_configs" / "ddp.yaml") in succeed(installed, folder, "bash", "local.sh", **start)
    started = succeed(installed, folder, "bash", "deepspeed.sh", "--seed", "7", **start)
    assert "torch.distributed.run" in started
    assert f"qa_dist.train\n--seed\n7\ndeepspeed={shipped}/ds_configs/zero2.json\n" in started
    given = succeed(installed, folder, "bash", "deepspeed.sh", DS_CONFIG="ds_configs/zero3.json", **start)
    assert f"deepspeed={shipped}/ds_configs/zero3.json" in given
    succeed(installed, folder, command, "recipes", "cp", "accelerate_configs")
    succeed(installed, folder, command, "recipes", "cp", "ds_configs")
    assert str(folder / "accelerate_configs" / "ddp.yaml") in succeed(installed, folder, "bash", "local.sh", **start)
    own = succeed(installed, folder, "bash", "deepspeed.sh", **start)
    assert f"deepspeed={folder}/ds_configs/zero2.json" in own
    # As Slurm does, which runs a copy of the script in a folder of its own.
    scontrol, srun = tmp_path / "scontrol", tmp_path / "srun"
    scontrol.write_text(
        f'#!/bin/bash\n[ "$2" = job ] && echo Command={folder}/slurm.sh || echo node1\n', encoding="utf-8"
    )
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    for stub in (scontrol, srun):
        stub.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "PYTHON": recorder}
    job["PATH"] = os.pathsep.join((str(tmp_path), os.environ["PATH"]))
    assert str(shipped / "launch" / "torchrun.sh") in succeed(installed, folder, "bash", "slurm.sh", **job)


def test_the_local_script_starts_a_run(installed: Path, tmp_path: Path) -> None:
    script = installed / "qa_dist" / "shipped" / "launch" / "local.sh"
    started = forked_python.variables(NUM_PROCESSES="1")
    assert "--output_dir" in succeed(installed, tmp_path, "bash", str(script), "--help", **started)
