"""The state in a checkpoint: what earlier versions wrote is read and written byte for byte; all else is refused."""

import dataclasses
import json
import math
from typing import Any

import pytest

from qa_dist.common.errors import CheckpointError
from qa_dist.training.run_state import BestScore, RunState
from tests.unit.data_fixtures import FIXTURES

FULL = RunState(
    evaluation_pending=True,
    evaluations_without_best=1,
    best=BestScore(78.125, 40),
    evaluations=(
        {"step": 0, "loss": 5.5, "exact_match": 0.0, "f1": 1.5, "num_examples": 12},
        {"step": 40, "loss": 1.25, "exact_match": 70.0, "f1": 78.125, "num_examples": 12},
    ),
    resumed_at_steps=(5, 35),
    skipped_steps=3,
    world_size=2,
    max_tokens_per_device=1024,
    gradient_scaler={"scale": 1024.0, "growth_factor": 2.0, "growth_interval": 2000, "_growth_tracker": 7},
)
BEGINS = RunState(world_size=1, max_tokens_per_device=64)

WRITTEN_BEFORE = """{
 "evaluation_pending": true,
 "evaluations_without_best": 1,
 "best": {
  "value": 78.125,
  "step": 40
 },
 "evaluations": [
  {
   "step": 0,
   "loss": 5.5,
   "exact_match": 0.0,
   "f1": 1.5,
   "num_examples": 12
  },
  {
   "step": 40,
   "loss": 1.25,
   "exact_match": 70.0,
   "f1": 78.125,
   "num_examples": 12
  }
 ],
 "resumed_at_steps": [
  5,
  35
 ],
 "skipped_steps": 3,
 "world_size": 2,
 "max_tokens_per_device": 1024,
 "gradient_scaler": {
  "scale": 1024.0,
  "growth_factor": 2.0,
  "growth_interval": 2000,
  "_growth_tracker": 7
 }
}"""


def read(text: str) -> RunState:
    return RunState.from_json(json.loads(text), "state.json")


def test_what_earlier_versions_wrote_is_read_and_written_byte_for_byte() -> None:
    assert read(WRITTEN_BEFORE) == FULL
    assert json.dumps(FULL.to_json(), indent=1) == WRITTEN_BEFORE
    (path,) = (FIXTURES / "earlier" / "run" / "checkpoints").glob("step-*/state.json")
    position = json.loads(path.read_bytes())
    state = RunState.from_json(position["progress"], path)
    again = {**position, "progress": state.to_json()}
    assert json.dumps(again, indent=1).encode() == path.read_bytes()


LIMITED = dataclasses.replace(FULL, wanted_tokens_per_device=4096)


@pytest.mark.parametrize("state", [FULL, BEGINS, LIMITED], ids=["full", "begins", "limited"])
def test_a_state_is_read_back_as_it_was(state: RunState) -> None:
    assert read(json.dumps(state.to_json())) == state


def test_a_loss_that_is_not_finite_is_read_back() -> None:
    state = dataclasses.replace(FULL, evaluations=({"step": 4, "loss": math.inf},), best=BestScore(-math.inf, 4))
    assert read(json.dumps(state.to_json())) == state


@pytest.mark.parametrize("name", sorted(FULL.to_json()))
def test_a_missing_key_is_named(name: str) -> None:
    value = FULL.to_json()
    del value[name]
    with pytest.raises(CheckpointError, match=f"^state.json: progress lacks {name}; use the version"):
        RunState.from_json(value, "state.json")


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"^state.json: progress has the unknown mood; use the version"):
        RunState.from_json({**FULL.to_json(), "mood": "good"}, "state.json")


WRONG: list[tuple[str, Any]] = [
    ("evaluation_pending", 1),
    ("evaluations_without_best", -1),
    ("evaluations_without_best", True),
    ("best", 78.125),
    ("best", {"value": 78.125}),
    ("best", {"value": "78", "step": 40}),
    ("best", {"value": 78.125, "step": 40, "more": 1}),
    ("best", {"value": 78.125, "step": 0.5}),
    ("evaluations", {}),
    ("evaluations", [{"step": 0}]),
    ("evaluations", [{"step": 0.5, "loss": 1.0}]),
    ("evaluations", [{"step": 0, "loss": 1.0, "f1": None}]),
    ("resumed_at_steps", None),
    ("resumed_at_steps", [1, "2"]),
    ("skipped_steps", 1.5),
    ("world_size", 0),
    ("max_tokens_per_device", None),
    ("wanted_tokens_per_device", 0),
    ("gradient_scaler", {"scale": "large"}),
    ("gradient_scaler", [1024.0]),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_a_value_of_another_type_is_named_with_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"^state.json: {name} is .* and must be .*; the file is damaged$"):
        RunState.from_json({**FULL.to_json(), name: value}, "state.json")


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(CheckpointError, match="progress is not a JSON object"):
        RunState.from_json([FULL.to_json()], "state.json")
