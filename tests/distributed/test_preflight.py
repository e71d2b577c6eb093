"""Ranks that are missing, unlike or out of reach end a run at once, with the machine's name."""

import sys
from pathlib import Path

import pytest

from qa_dist.nodes import host_name
from tests.distributed.launching import ROOT, free_port, run, succeed, together, torchrun
from tests.tiny import tiny_model, tiny_squad

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    words = ["--model_name_or_path", str(tiny_model("bert", folder / "bert")), "--disable_tqdm"]
    words += ["--train_file", str(tiny_squad(folder / "train.json", 12, seed=1, longest=40)), "--eval_steps", "no"]
    words += ["--store_dir", str(folder / "store"), "--max_seq_length", "64", "--doc_stride", "16"]
    return [*words, "--max_train_steps", "1"]


def unlike(folder: Path, body: str, words: list[str]) -> tuple[int, str]:
    """Exit code and error output of a run of two whose rank 1 executes `body` first."""
    text = f"import os, sys\nif os.environ['RANK'] == '1':\n{body}\nfrom qa_dist.train import main\nsys.exit(main())\n"
    (folder / "unlike_train.py").write_text(text, encoding="utf-8")
    command = torchrun(2, "unlike_train", [*words, "--output_dir", str(folder / "out")])
    done = run(command, PYTHONPATH=f"{folder}:{ROOT}")
    assert not (folder / "out" / "metrics.jsonl").exists(), "not a step is made"
    return done.returncode, done.stderr


def test_another_version_is_told_with_the_name_of_the_machine(words: list[str], tmp_path: Path) -> None:
    body = """
    import qa_dist.preflight as preflight
    versions = preflight.versions
    preflight.versions = lambda: {**versions(), "transformers": "4.0.0"}
    preflight.host_name = lambda: "node7"
"""
    code, stderr = unlike(tmp_path, body, words)
    assert code != 0
    assert "exitcode  : 2" in stderr
    assert stderr.count("transformers is 4.0.0 on node7 (rank 1) but ") == 1, stderr
    assert f"on rank 0 ({host_name()}); install the same version" in stderr
    assert "Traceback" not in stderr.partition("exitcode")[0]


def test_other_data_are_told_with_the_name_of_the_machine(words: list[str], tmp_path: Path) -> None:
    other = tiny_squad(tmp_path / "other.json", 12, seed=5, longest=40)
    body = f"""
    sys.argv[sys.argv.index("--train_file") + 1] = {str(other)!r}
    sys.argv[sys.argv.index("--store_dir") + 1] = {str(tmp_path / "store")!r}
    import qa_dist.preflight as preflight
    preflight.host_name = lambda: "node7"
"""
    code, stderr = unlike(tmp_path, body, words)
    assert code != 0
    assert "exitcode  : 2" in stderr
    assert stderr.count("the content of the train data is ") == 1, stderr
    assert "on node7 (rank 1) but" in stderr


def test_a_machine_of_another_kind_is_told_before_there_is_a_group(words: list[str], tmp_path: Path) -> None:
    body = """
    import qa_dist.distributed as distributed
    distributed._facts = lambda: {"the kind of device": "a GPU"}
    distributed.host_name = lambda: "node7"
"""
    code, stderr = unlike(tmp_path, body, words)
    assert code != 0
    assert "exitcode  : 2" in stderr
    assert stderr.count("the kind of device is a GPU on node7 (rank 1) but the CPU on rank 0") == 1, stderr


def test_a_rank_that_never_connects_is_given_up(words: list[str], tmp_path: Path) -> None:
    body = """
    import time
    import qa_dist.distributed as distributed
    distributed.Accelerator = lambda **_: time.sleep(600)
"""
    code, stderr = unlike(tmp_path, body, [*words, "--ddp_timeout", "6"])
    assert code != 0
    assert "exitcode  : 2" in stderr
    assert f"rank 0 on {host_name()} cannot exchange data with the other 1 ranks" in stderr, stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_one_that_never_starts_says_so(rank: int, words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qa_dist.train", *words, "--output_dir", str(tmp_path), "--ddp_timeout", "3"]
    port = str(free_port())
    done = run(command, RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert done.returncode == 2, done.stderr
    if rank == 0:
        assert "after 3 seconds rank 1 of 2 has not started; started: " in done.stderr
        assert f"{host_name()} (rank 0)" in done.stderr
    else:
        assert f"rank 1 on {host_name()} cannot reach 127.0.0.1:{port}, where ranks meet" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interface_that_is_not_there_is_told(words: list[str], tmp_path: Path) -> None:
    command = torchrun(2, "qa_dist.train", [*words, "--output_dir", str(tmp_path)])
    done = run(command, GLOO_SOCKET_IFNAME="nosuch0")
    assert done.returncode != 0
    assert "exitcode  : 2" in done.stderr, done.stderr
    assert "cannot exchange data with the other 1 ranks" in done.stderr
    assert "nosuch0" in done.stderr


MEASURE = ["--launch", "--seconds", "0.5"]


def test_the_doctor_measures_the_processes_of_a_launcher() -> None:
    done = succeed(torchrun(2, "qa_dist.doctor", MEASURE))
    assert f" on {host_name()} (ranks 0-1)" in done.stdout
    assert done.stdout.count("GB/s, ") == 3


def test_the_doctor_measures_the_tasks_of_srun() -> None:
    """Two tasks with the environment that `srun` gives them, on one machine."""
    task = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-m", "qa_dist.doctor", *MEASURE]
    ranks = ("0", "1")
    outputs = together(
        [command] * 2,
        [{**task, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURMD_NODENAME": f"n{rank}"} for rank in ranks],
    )
    assert " on n0, n1 (ranks 0-1)" in outputs[0]
    assert "GB/s" not in outputs[1], "rank 0 prints"
