"""Training with grouped LoRA layers: the steps are peft's within rounding, and what is wrong is not used."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear

from qa_dist.common.errors import ConfigError
from qa_dist.config.options import DataConfig, ModelConfig, RunConfig, TrainingConfig
from qa_dist.distributed.lora_choice import group_adapters, group_for_evaluation
from qa_dist.distributed.ranks import Ranks
from qa_dist.features.building import prepare_store
from qa_dist.model import lora_check
from qa_dist.model.building import build_model
from qa_dist.model.lora_layers import GroupedLora
from qa_dist.model.precision import autocast
from qa_dist.model.pretrained import load_tokenizer
from qa_dist.model.saved import load_trained, save_trained
from qa_dist.model.span_model import SpanModel
from qa_dist.training.run_state import RunState
from qa_dist.training.trainer import Trainer
from tests.tiny import tiny_model, tiny_squad
from tests.unit.trained import reset_accelerate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    tiny_squad(folder / "train.json", 12, seed=1, longest=40)
    tiny_model("bert", folder / "bert")
    return folder


def run_config(folder: Path, implementation: Any, **options: Any) -> RunConfig:
    data = DataConfig(
        train_file=str(folder / "train.json"), store_dir=str(folder / "store"), max_seq_length=64, doc_stride=16
    )
    model = {"model_name_or_path": str(folder / "bert"), "lora_implementation": implementation, **options}
    # With the usual epsilon, Adam makes a whole step of a gradient that is nothing but rounding.
    training = TrainingConfig(
        output_dir=str(folder), global_batch_size=8, max_tokens_per_device=256, learning_rate=1e-3, adam_epsilon=1e-3
    )
    return RunConfig(data=data, model=ModelConfig(**model), training=training)


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Trainer]]:
    reset_accelerate()
    ranks = Ranks()

    def started(implementation: str, **options: Any) -> Trainer:
        config = run_config(folder, implementation, lora_target_modules=("all-linear",), **options)
        model, _ = build_model(config.model, seed=1, max_seq_length=64)
        store = prepare_store(config, "train", tokenizer=load_tokenizer(config.model), progress=False)
        return Trainer(config, ranks, store, model)

    yield started
    reset_accelerate()


def kinds(model: SpanModel) -> set[type]:
    return {type(part) for part in model.modules() if isinstance(part, PeftLinear)}


def test_steps_are_those_of_peft(start: Callable[..., Trainer]) -> None:
    theirs, ours = (start(each, lora_dropout=0.0) for each in ("peft", "grouped"))
    assert (kinds(theirs.model), kinds(ours.model)) == ({PeftLinear}, {GroupedLora})
    for step in range(4):
        expected, found = theirs.step(step), ours.step(step)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    expected_weights = theirs.engine.weights()
    for name, weight in ours.engine.weights().items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=0, atol=1e-6, msg=name)


def test_a_run_goes_on_bit_for_bit_and_either_way_goes_on_from_the_other(start: Callable[..., Trainer]) -> None:
    first = start("grouped")
    losses = [first.step(step).loss for step in range(2)]
    saved = first.checkpoint(2, None, RunState(world_size=1, max_tokens_per_device=256, gradient_scaler=None))
    losses = [first.step(step).loss for step in range(2, 4)]
    for implementation, difference in (("grouped", 0.0), ("peft", 1e-2)):
        again = start(implementation)
        again.restore(saved)
        found = [again.step(step).loss for step in range(2, 4)]
        # Masks are not drawn in peft's order.
        assert found == pytest.approx(losses, rel=difference, abs=0)


def test_a_loaded_model_answers_as_the_one_that_was_trained(start: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = start("grouped")
    trainer.step(0)
    folder, config = str(tmp_path / "adapter"), trainer.config
    save_trained(trainer.model, trainer.engine.weights(), load_tokenizer(config.model), Path(folder))
    loaded = load_trained(config.model, folder, max_seq_length=64, tokenizer_pads_left=False)
    input_ids_T = torch.arange(40) % 40 + 5
    found = []
    for model in (trainer.model, loaded):
        if model is loaded:
            assert group_for_evaluation(config, trainer.ranks, loaded) > 0
        with torch.inference_mode():
            found.append(torch.stack(model.eval()(input_ids_T, torch.zeros_like(input_ids_T), (25, 15))))
    assert kinds(loaded) == {GroupedLora}
    assert torch.equal(*found)
    auto = run_config(tmp_path, "auto")
    assert group_for_evaluation(auto, trainer.ranks, loaded) == 0, "a CPU leaves them to peft"


def test_a_cpu_leaves_layers_to_peft(start: Callable[..., Trainer]) -> None:
    assert kinds(start("auto").model) == {PeftLinear}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1"])
def test_on_cuda_they_are_grouped_where_ranks_hold_whole_models(folder: Path, strategy: str) -> None:
    config = run_config(folder, "auto")
    model, _ = build_model(config.model, seed=1, max_seq_length=64)
    notices: list[str] = []
    assert group_adapters(config, cuda_ranks(strategy), model, notices.append) == (2 if strategy == "ddp" else 0)
    assert notices == []


def test_what_does_not_agree_with_peft_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_check, "difference_from_peft", lambda *_: 0.25)
    config = run_config(folder, "auto")
    model, _ = build_model(config.model, seed=1, max_seq_length=64)
    notices: list[str] = []
    assert group_adapters(config, cuda_ranks(), model, notices.append) == 0
    assert kinds(model) == {PeftLinear}
    assert notices == [
        "grouped LoRA layers differ from peft's by 2.5e-01 of the largest number, more than 1e-05 here or on another "
        "rank: peft's are used"
    ]
    with pytest.raises(ConfigError, match=r"grouped LoRA layers differ from peft's by 2\.5e-01"):
        group_adapters(run_config(folder, "grouped"), cuda_ranks(), model, notices.append)


def test_all_ranks_compute_alike(folder: Path) -> None:
    config = run_config(folder, "auto")
    model, _ = build_model(config.model, seed=1, max_seq_length=64)
    notices: list[str] = []
    assert group_adapters(config, cuda_ranks(minimum=lambda value: 0), model, notices.append) == 0
    assert kinds(model) == {PeftLinear}
    assert len(notices) == 1


def test_groups_that_there_are_not_are_refused(folder: Path) -> None:
    config = run_config(folder, "grouped", lora_target_modules=("query",))
    plain, _ = build_model(run_config(folder, "auto", use_dora=True).model, seed=1, max_seq_length=64)
    with pytest.raises(ConfigError, match="no layer of this model has a plain adapter; use auto or peft"):
        group_adapters(config, cuda_ranks(), plain, print)


def cuda_ranks(strategy: str = "ddp", minimum: Callable[[int], int] = lambda value: value) -> Any:
    """What ranks on GPUs say of themselves; their tensors are on the CPU."""
    return SimpleNamespace(
        device=torch.device("cuda"),
        launch_config=SimpleNamespace(strategy=strategy),
        autocast=lambda: autocast("cpu", "no"),
        products=nullcontext,
        minimum=minimum,
    )
