"""A launcher's variables that do not go together are said at once, and nothing waits for ranks that cannot be."""

import pytest

from qa_dist import train
from qa_dist.common.errors import ConfigError
from qa_dist.distributed.failures import failures_named
from qa_dist.distributed.launch_variables import require_consistent_launch
from tests.refusals import refusal

MEETING = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"MASTER_PORT": "29500"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEETING},
        {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", **MEETING},
    ],
    ids=str,
)
def test_one_process_and_what_launchers_set_pass(variables: dict[str, str]) -> None:
    require_consistent_launch(variables)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"RANK": "1"}, "RANK=1 is set but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 is set but not RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **MEETING}, "RANK=1 is not below WORLD_SIZE=1"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2", **MEETING},
            "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2",
        ),
        ({"RANK": "x"}, "RANK=x is not a whole number from 0 to 1000000"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE= is not a whole number from 1 to 1000000"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEETING, "MASTER_PORT": "99999"},
            "MASTER_PORT=99999 is not a whole number from 1 to 65535",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], found: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *MEETING):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught, failures_named():
        pytest.fail("a command would have begun")
    assert str(caught.value) == (
        f"the environment describes no process of a run ({found}); start with torchrun or accelerate launch, which set "
        "all of these variables, or unset them to start one process alone"
    )


def test_a_command_says_it_in_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "first")
    assert "RANK=first is not a whole number" in refusal(train.main, ["--output_dir", "out"], capsys)
