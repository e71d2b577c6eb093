"""A step in one process: its report is read once, at its end, and nothing before it waits for a number."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qa_dist.config.options import DataConfig, ModelConfig, RunConfig, TrainingConfig
from qa_dist.distributed.ranks import Ranks
from qa_dist.features.building import prepare_store
from qa_dist.model.building import build_model
from qa_dist.model.pretrained import load_tokenizer
from qa_dist.training import trainer
from qa_dist.training.run_state import RunState
from qa_dist.training.step_report import StepReport
from qa_dist.training.trainer import Trainer
from tests.tiny import tiny_model, tiny_squad
from tests.unit.trained import reset_accelerate
from tests.waiting import reads


def test_what_reads_is_counted() -> None:
    tensor = torch.ones(3)
    with reads() as found:
        tensor.sum().add_(1).isfinite()
        tensor[torch.tensor([0, 2])] = torch.zeros(2)
    assert found == []
    with reads() as found:
        assert bool((tensor < 1).any())
        assert float(tensor.sum()) == 1
        assert len(tensor[tensor > 0]) == 1
    assert found == ["_local_scalar_dense", "_local_scalar_dense", "index"]


class TwoRanks:
    """This rank and another one, which says this much about a step of three features."""

    is_asked_to_stop = False

    def __init__(self, *said: float) -> None:
        self.said = torch.tensor(said, dtype=torch.float64)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.add_(self.said)


@pytest.mark.parametrize(
    ("said", "spoiled", "out_of_memory", "stop"),
    [
        ((0, 0, 1.5, 0, 0), False, False, False),
        ((0, 0, 1.5, 0, 1), False, False, True),
        ((0, 0, 1.5, math.inf, 0), True, True, False),
        ((0, 0, math.nan, 0, 0), True, False, False),
        ((0, 0, math.inf, math.inf, 1), True, True, True),
    ],
)
def test_what_the_ranks_say_decides_whether_a_step_counts(
    said: tuple[float, ...], spoiled: bool, out_of_memory: bool, stop: bool
) -> None:
    report, others = StepReport(3, torch.device("cpu")), TwoRanks(*said)
    with reads() as found:
        report.add_losses(torch.tensor([1, 0]), torch.tensor([0.5, 0.25], requires_grad=True))
        report.exchange(others)  # type: ignore[arg-type]
        check = report.check()
        report.note_norm(torch.tensor(2.0))
    assert found == []
    outcome = report.read()
    assert math.isfinite(check) != spoiled
    assert (outcome.is_out_of_memory, outcome.stop, outcome.grad_norm) == (out_of_memory, stop, 2.0)
    np.testing.assert_equal(outcome.losses.numpy(), [0.25, 0.5, said[2]])


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trainer of a tiny model whose optimiser is fused, as on a GPU."""
    reset_accelerate()
    config = RunConfig(
        data=DataConfig(
            train_file=str(tiny_squad(tmp_path / "train.json", 12, seed=1, longest=40)),
            store_dir=str(tmp_path / "store"),
            max_seq_length=64,
            doc_stride=16,
        ),
        model=ModelConfig(model_name_or_path=str(tiny_model("bert", tmp_path / "bert"))),
        training=TrainingConfig(output_dir=str(tmp_path), global_batch_size=8, max_tokens_per_device=256),
    )
    model, _ = build_model(config.model, seed=1, max_seq_length=64)
    monkeypatch.setattr(trainer, "is_fused", lambda *_: True)
    store = prepare_store(config, "train", tokenizer=load_tokenizer(config.model), progress=False)
    yield Trainer(config, Ranks(), store, model)
    reset_accelerate()


def test_a_step_reads_nothing_before_its_report(prepared: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(2):
        prepared.step(step)
    assert len(prepared.inputs.micro_batches(2, prepared.max_tokens)) > 1
    before: list[int] = []
    read = StepReport.read
    with reads() as found:
        monkeypatch.setattr(StepReport, "read", lambda report: before.append(len(found)) or read(report))
        prepared.step(2)
    assert before == [0], found


def test_every_part_of_the_model_is_training_in_the_first_step_and_after_an_evaluation(prepared: Trainer) -> None:
    # As transformers returns what it has loaded: its parts do not drop anything, and the model around it does not know.
    for module in prepared.model.model.modules():
        module.training = False
    seen: list[bool] = []
    prepared.model.register_forward_pre_hook(
        lambda model, _: seen.append(all(module.training for module in model.modules()))
    )
    prepared.step(0)
    prepared.model.eval()
    prepared.step(1)
    assert len(seen) >= 2
    assert all(seen)


def test_a_step_that_runs_out_of_memory_is_taken_with_half_the_budget_and_leaves_no_trace(
    prepared: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = {name: weight.clone() for name, weight in prepared.engine.weights().items()}
    computing: Any = prepared.passes
    loss = computing._loss

    def limited(start_T: torch.Tensor, end_T: torch.Tensor, lengths: Any, *rest: Any) -> torch.Tensor:
        if sum(lengths) > 128:
            assert all(torch.equal(weight, start[name]) for name, weight in prepared.engine.weights().items())
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
        return loss(start_T, end_T, lengths, *rest)

    monkeypatch.setattr(computing, "_loss", limited)
    prepared.step(0)
    assert prepared.max_tokens == 128
    state = prepared.engine.optimizer_tensors()
    assert {float(tensor) for key, tensor in state.items() if key.startswith("step/")} == {1.0}


@pytest.mark.parametrize(
    ("wanted", "of_run", "halved", "goes_on_with"),
    [(None, None, 128, 128), (256, 256, 128, 128), (256, None, 128, 256), (256, 512, 128, 256), (256, 256, 16, 16)],
    ids=["auto", "the same", "auto before", "another", "less than the longest feature of another step"],
)
def test_a_budget_that_was_halved_stays_so_while_the_same_one_is_wanted(
    prepared: Trainer, wanted: int | None, of_run: int | None, halved: int, goes_on_with: int
) -> None:
    assert prepared.inputs.longest > 16
    state = RunState(world_size=1, max_tokens_per_device=halved, wanted_tokens_per_device=of_run)
    checkpoint = prepared.checkpoint(0, None, state)
    training = dataclasses.replace(prepared.config.training, max_tokens_per_device=wanted)
    prepared.config = dataclasses.replace(prepared.config, training=training)
    prepared.max_tokens = 256
    prepared.restore(checkpoint)
    assert prepared.max_tokens == goes_on_with


def test_inputs_are_prepared_once_and_only_for_the_step_and_budget_that_follow(
    prepared: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = prepared.inputs
    made: list[int] = []
    several = trainer.StepInputs.global_batch
    monkeypatch.setattr(trainer.StepInputs, "global_batch", lambda self, step: made.append(step) or several(self, step))
    monkeypatch.setattr(inputs, "_device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(
        "qa_dist.training.step_inputs.FeatureBatch.several", lambda store, groups, device: [None] * len(groups)
    )
    inputs.prepare(3, 256)
    inputs.micro_batches(3, 256)
    assert made == [3]
    inputs.prepare(4, 256)
    inputs.micro_batches(4, 128)
    assert made == [3, 4, 4], "the budget was halved"
    inputs.prepare(inputs.num_steps, 256)
    assert made == [3, 4, 4], "the run is over"
