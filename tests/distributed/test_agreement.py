"""Ranks that are missing, unlike or out of reach end a run at once, with the machine's name."""

import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from qa_dist.common.hosts import host_name
from qa_dist.distributed import agreement, rendezvous
from tests.distributed.forking import call_main, start_ranks, torchrun_store
from tests.distributed.launching import free_port
from tests.tiny import tiny_squad, tiny_training

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    words = tiny_training(tmp_path_factory.mktemp("inputs"), 12, longest=40)
    return [*words, "--disable_tqdm", "--max_train_steps", "1"]


def train_unlike(change: Callable[[list[str]], None], words: list[str], rank: int) -> int:
    """Train; rank 1 calls itself node7 and goes through a change first."""
    from qa_dist.train import main

    if rank == 1:
        for module in (agreement, rendezvous):
            module.host_name = lambda: "node7"
        change(words)
    return main(words)


def refused(change: Callable[[list[str]], None], words: list[str], folder: Path) -> str:
    """What two ranks say of which one has been changed, and which both end as after a user's mistake."""
    body = partial(train_unlike, change, [*words, "--output_dir", str(folder / "out")])
    group = start_ranks(body, folder / "log", num_processes=2)
    assert group.wait() == [2, 2], group.text()
    assert not (folder / "out" / "metrics.jsonl").exists(), "not a step is made"
    assert "Traceback" not in group.text()
    return group.text()


def another_version(words: list[str]) -> None:
    versions = agreement.versions
    agreement.versions = lambda: {**versions(), "transformers": "4.0.0"}


def test_another_version_is_told_with_the_name_of_the_machine(words: list[str], tmp_path: Path) -> None:
    text = refused(another_version, words, tmp_path)
    assert text.count("transformers is 4.0.0 on node7 (rank 1) but ") == 1, text
    assert f"on rank 0 ({host_name()}); install the same version" in text


def other_data(train_file: Path, words: list[str]) -> None:
    words[words.index("--train_file") + 1] = str(train_file)
    words[words.index("--store_dir") + 1] = str(train_file.with_name("store"))


def test_other_data_are_told_with_the_name_of_the_machine(words: list[str], tmp_path: Path) -> None:
    other = tiny_squad(tmp_path / "other.json", 12, seed=5, longest=40)
    text = refused(partial(other_data, other), words, tmp_path)
    assert text.count("the content of the train data is ") == 1, text
    assert "on node7 (rank 1) but" in text


def another_device(words: list[str]) -> None:
    rendezvous._facts = lambda: {"the kind of device": "a GPU"}


def test_a_machine_of_another_kind_is_told_before_there_is_a_group(words: list[str], tmp_path: Path) -> None:
    text = refused(another_device, words, tmp_path)
    assert text.count("the kind of device is a GPU on node7 (rank 1) but the CPU on rank 0") == 1, text


def train_unconnected(words: list[str], rank: int) -> int:
    """Train; rank 1 is called in the roll, and then stays away."""
    from qa_dist import train
    from qa_dist.distributed import ranks

    if rank == 1:
        ranks.Accelerator = lambda **_: time.sleep(600)
    return train.main(words)


def test_a_rank_that_never_connects_is_given_up(words: list[str], tmp_path: Path) -> None:
    body = partial(train_unconnected, [*words, "--output_dir", str(tmp_path / "out"), "--ddp_timeout", "6"])
    group = start_ranks(body, tmp_path / "log", num_processes=2)
    group.ranks[0].join(120)
    assert group.end(grace_seconds=0) == [2, -signal.SIGKILL]
    assert f"rank 0 on {host_name()} cannot exchange data with the other 1 ranks" in group.text(), group.text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_one_that_never_starts_says_so(rank: int, words: list[str], tmp_path: Path) -> None:
    port = str(free_port())
    alone = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    body = partial(call_main, "qa_dist.train", [*words, "--output_dir", str(tmp_path / "out"), "--ddp_timeout", "3"])
    group = start_ranks(body, tmp_path / "log", environment=alone)
    assert group.wait() == [2], group.text()
    if rank == 0:
        assert "after 3 seconds rank 1 of 2 has not started; started: " in group.text()
        assert f"{host_name()} (rank 0)" in group.text()
    else:
        assert f"rank 1 on {host_name()} cannot reach 127.0.0.1:{port}, where ranks meet" in group.text()
    assert "Traceback" not in group.text()


def test_an_interface_that_is_not_there_is_told(words: list[str], tmp_path: Path) -> None:
    body = partial(call_main, "qa_dist.train", [*words, "--output_dir", str(tmp_path / "out")])
    with torchrun_store() as meeting:
        variables = {**meeting, "GLOO_SOCKET_IFNAME": "nosuch0"}
        group = start_ranks(body, tmp_path / "log", num_processes=2, environment=variables)
        assert group.wait() == [2, 2], group.text()
    assert "cannot exchange data with the other 1 ranks" in group.text()
    assert "nosuch0" in group.text()


MEASURE = ["--launch", "--seconds", "0.5"]


def test_the_doctor_measures_the_processes_of_a_launcher(tmp_path: Path) -> None:
    group = start_ranks(partial(call_main, "qa_dist.doctor", MEASURE), tmp_path / "log", num_processes=2)
    assert group.wait() == [0, 0], group.text()
    assert f" on {host_name()} (ranks 0-1)" in group.text()
    assert group.text().count("GB/s, ") == 3


def test_the_doctor_measures_the_tasks_of_srun(tmp_path: Path) -> None:
    """Two tasks with the environment that `srun` gives them, on one machine."""
    common = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "MASTER_PORT": str(free_port()),
    }
    tasks = []
    for rank in ("0", "1"):
        own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURMD_NODENAME": f"n{rank}"}
        body = partial(call_main, "qa_dist.doctor", MEASURE)
        tasks.append(start_ranks(body, tmp_path / f"log-{rank}", environment={**common, **own}))
    for task in tasks:
        assert task.wait() == [0], task.text()
    assert " on n0, n1 (ranks 0-1)" in tasks[0].text()
    assert tasks[0].text().count("GB/s, ") == 3
    assert "GB/s" not in tasks[1].text(), "rank 0 prints"


def test_tasks_of_srun_that_answer_files_of_their_own_are_refused(tmp_path: Path) -> None:
    common = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(free_port())}
    tasks = []
    for rank in ("0", "1"):
        questions = tmp_path / f"{rank}.jsonl"
        questions.write_text('{"id": "1", "question": "a", "context": "b"}\n', encoding="utf-8")
        words = ["--model", "model", "--input_file", str(questions), "--output_file", str(tmp_path / f"{rank}.out")]
        own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        body = partial(call_main, "qa_dist.predict", words)
        tasks.append(start_ranks(body, tmp_path / f"log-{rank}", environment={**common, **own}))
    assert [task.wait() for task in tasks] == [[2], [2]], tasks[0].text()
    assert f"the command has {tmp_path}/1.jsonl on {host_name()} (rank 1) where it has" in tasks[0].text()
