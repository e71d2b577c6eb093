"""What ranks compare before the first step."""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qa_dist.common.errors import ConfigError
from qa_dist.config.options import RunConfig
from qa_dist.distributed import agreement
from qa_dist.distributed.launch_config import LaunchConfig
from qa_dist.distributed.roll_call import Member


def store(content: str = "c" * 64, tokenizer: str = "d" * 64, fingerprint: str = "f" * 64) -> Any:
    ingredients = {"content_sha256": content, "tokenizer_sha256": tokenizer}
    return SimpleNamespace(fingerprint=fingerprint, ingredients=ingredients)


class Two:
    """Rank 0 of two, the other of which is a copy of it on node1 with some facts changed and eyes open or shut."""

    world_size, rank, is_main = 2, 0, True
    launch_config = LaunchConfig(strategy="zero2", deepspeed={"gradient_clipping": 1.0})

    def __init__(self, *, sees: bool = True, **changed: Any) -> None:
        self.sees = sees
        self.changed = changed

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, Member):
            return [value, Member(1, "node1", {**value.facts, **self.changed})]
        own, _ = value
        return [value, (Member(1, "node1", own.facts), self.sees)]

    def broadcast(self, value: Any) -> Any:
        return value


def check(ranks: Any, tmp_path: Path, config: RunConfig | None = None) -> list[str]:
    return agreement.require_agreement(config or RunConfig(), ranks, {"train": store(), "validation": None}, tmp_path)


def problems(tmp_path: Path, **changed: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        check(Two(**changed), tmp_path)
    return raised.value.problems


def test_equal_ranks_pass_and_leave_nothing_behind(tmp_path: Path) -> None:
    assert check(Two(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_one_process_has_nothing_to_compare(tmp_path: Path) -> None:
    assert check(SimpleNamespace(world_size=1), tmp_path / "missing") == []


def test_another_version_names_the_machine_and_what_to_do(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, **{"package torch": "0.0.1"})
    assert problem.startswith("torch is 0.0.1 on node1 (rank 1) but ")
    assert "on rank 0 (" in problem
    assert "install the same version on all machines" in problem
    (problem,) = problems(tmp_path, **{"package peft": None})
    assert problem.startswith("peft is missing on node1 (rank 1) but ")


def test_another_python_program_or_option(tmp_path: Path) -> None:
    found = problems(
        tmp_path, **{"package python": "3.9.1", "program": "0.0.9 with digest 0", "option --learning_rate": 1.0}
    )
    assert [problem.partition(" is ")[0] for problem in found] == ["python", "the code of qa_dist", "--learning_rate"]
    assert "same command and the same recipe" in found[2]
    assert "1.0 on node1 (rank 1) but 0.0003 on rank 0" in found[2]


def test_another_launch_configuration(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, **{"launcher strategy": "ddp"})
    assert problem.startswith("the launcher's strategy is ddp on node1 (rank 1) but zero2 on rank 0")
    assert "same launch configuration" in problem
    (problem,) = problems(tmp_path, **{"launcher settings": "{}"})
    assert '{"gradient_clipping": 1.0}' in problem


def test_other_data_are_named_by_their_cause(tmp_path: Path) -> None:
    everything = {"bytes train": "0" * 64, "features train": "1" * 64}
    (problem,) = problems(tmp_path, **everything)
    assert problem.startswith(
        "the content of the train data is 000000000000... on node1 (rank 1) but cccccccccccc... on rank 0"
    )
    (problem,) = problems(tmp_path, **{"tokenizer train": "0" * 64, "features train": "1" * 64})
    assert problem.startswith("the tokenizer of the train data is")
    (problem,) = problems(tmp_path, **{"features train": "1" * 64})
    assert problem.startswith("the digest of the train features is 111111111111...")
    (problem,) = problems(tmp_path, **{"bytes validation": "0" * 64})
    assert "but missing on rank 0" in problem


def test_machines_may_keep_their_copies_in_their_own_places() -> None:
    config = RunConfig()
    moved = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train_file="/scratch/3/train.json", store_dir="/scratch/3"),
        model=dataclasses.replace(config.model, cache_dir="/scratch/3"),
        training=dataclasses.replace(config.training, output_dir="/scratch/3/out"),
    )
    stores = {"train": store(), "validation": store()}
    assert agreement.facts(moved, stores) == agreement.facts(config, stores)
    other = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=7))
    assert agreement.facts(other, stores) != agreement.facts(config, stores)


def test_the_digest_follows_the_code(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    module = tmp_path / "part" / "module.py"
    module.write_text("answer = 42\n")
    first = agreement.program(tmp_path)
    assert first == agreement.program(tmp_path)
    module.write_text("answer = 43\n")
    assert agreement.program(tmp_path) != first
    assert agreement.program() != first


def test_a_machine_that_does_not_see_the_folder_is_told_about(tmp_path: Path) -> None:
    (note,) = check(Two(sees=False), tmp_path)
    assert note.startswith(f"note: --output_dir {tmp_path} of rank 0")
    assert "is not seen from node1 (rank 1)" in note
    assert "a resumed run needs rank 0 there again" in note
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_rank_0_cannot_write_to_stops_all(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    with pytest.raises(ConfigError, match=f"--output_dir {folder} cannot be used: No such file or directory"):
        agreement.require_agreement(RunConfig(), Two(), {}, folder)  # type: ignore[arg-type]


def test_host_names_are_those_of_this_machine() -> None:
    assert agreement.host_name() == os.environ.get("SLURMD_NODENAME", os.uname().nodename)
