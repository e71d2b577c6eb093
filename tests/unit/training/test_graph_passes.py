"""Passes replayed as graphs, with a simulated graph that computes again what it recorded: what is kept, and when."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from qa_dist.benchmarking.synthetic import SyntheticStore
from qa_dist.common.errors import TrainingError
from qa_dist.config.options import DataConfig, ModelConfig, RunConfig, TrainingConfig
from qa_dist.distributed.graph_choice import graph_problem
from qa_dist.distributed.ranks import Ranks
from qa_dist.features import buckets
from qa_dist.model.building import build_model
from qa_dist.training import graph_passes, pass_choice, trainer
from qa_dist.training.graph_passes import GraphPasses
from qa_dist.training.pass_choice import choose_passes
from qa_dist.training.passes import EagerPasses
from qa_dist.training.run_state import RunState
from qa_dist.training.trainer import Trainer
from tests.support.simulated_graphs import Simulated
from tests.tiny import tiny_model
from tests.unit.trained import reset_accelerate

NUM_STEPS = 8
MAX_TOKENS = 384


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """Buckets for features that are as small as these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "TOKEN_STEP", 32)
        yield


class Scene:
    """Trainers of one tiny model on the same features, whose passes are graphs."""

    def __init__(self, folder: str, **training: Any) -> None:
        data = DataConfig(dataset_name="sample", max_seq_length=128, doc_stride=16)
        self.config = RunConfig(
            data=data,
            model=ModelConfig(model_name_or_path=folder, model_dropout=0.1),
            training=TrainingConfig(
                output_dir="none",
                global_batch_size=6,
                max_tokens_per_device=MAX_TOKENS,
                num_train_epochs=1,
                **training,
            ),
        )
        self.store: Any = SyntheticStore(6 * NUM_STEPS, seed=1, vocab_size=80, max_seq_length=128, doc_stride=16)
        self.recorder = Simulated()
        self.notices: list[str] = []

    def trainer(self, *, graphs: bool = True) -> Trainer:
        reset_accelerate()
        model, _ = build_model(self.config.model, seed=1, max_seq_length=128)

        def passes(config: Any, ranks: Any, engine: Any, model: Any, notice: Any) -> Any:
            return GraphPasses(ranks, engine, model, self.recorder, notice), None

        with pytest.MonkeyPatch.context() as patch:
            if graphs:
                patch.setattr(trainer, "choose_passes", passes)
            return Trainer(self.config, Ranks(), self.store, model, notice=self.notices.append)

    def run(self, made: Trainer, steps: Sequence[int] | range = range(NUM_STEPS)) -> dict[str, torch.Tensor]:
        """The weights after these steps."""
        for step in steps:
            made.step(step)
        return made.engine.weights()

    def launched(self) -> dict[str, torch.Tensor]:
        """The weights of a whole run on the same batches of which nothing is recorded."""
        kept, self.recorder, self.notices = (self.recorder, self.notices), Simulated(), []
        self.recorder.found = ["nothing is recorded where the device is waited for"]
        try:
            return self.run(self.trainer())
        finally:
            self.recorder, self.notices = kept


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model("bert", tmp_path_factory.mktemp("bert")))


@pytest.fixture
def scene(folder: str) -> Iterator[Scene]:
    yield Scene(folder)
    reset_accelerate()


@pytest.fixture(scope="module")
def launched(folder: str) -> dict[str, torch.Tensor]:
    return Scene(folder).launched()


def counts(made: Trainer) -> dict[str, Any]:
    return made.passes.describe()


def test_each_bucket_is_launched_twice_recorded_once_and_replayed_from_then_on(
    scene: Scene, launched: dict[str, torch.Tensor]
) -> None:
    made = scene.trainer()
    assert len(made.inputs.micro_batches(0, MAX_TOKENS)) > 1
    sizes = [each.batch.bucket for step in range(NUM_STEPS) for each in made.inputs.micro_batches(step, MAX_TOKENS)]  # type: ignore[union-attr]
    often = {size for size in sizes if sizes.count(size) > 1}
    weights = scene.run(made)
    assert same(weights, launched), "dropout and accumulation are those of launched passes, to the last bit"
    assert scene.recorder.records == len(often) > 0
    found = counts(made)
    assert found["graphs"] == len(often)
    assert found["launched"] == len(set(sizes)) + len(often)
    assert found["replayed"] == len(sizes) - found["launched"] > NUM_STEPS // 2
    # Beside these, each graph was replayed once to be looked at.
    assert scene.recorder.replays == found["replayed"] + len(often)
    assert (scene.notices, "problem" in found) == ([], False)


def test_without_dropout_steps_are_those_of_plain_passes(folder: str) -> None:
    scene = Scene(folder, adam_epsilon=1e-3)
    object.__setattr__(scene.config.model, "model_dropout", 0.0)
    object.__setattr__(scene.config.model, "lora_dropout", 0.0)
    plain, graphs = scene.trainer(graphs=False), scene.trainer()
    for step in range(NUM_STEPS):
        wanted, found = plain.step(step), graphs.step(step)
        assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-4)
    assert scene.recorder.replays > 0
    weights = graphs.engine.weights()
    for name, weight in plain.engine.weights().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5, msg=name)
    reset_accelerate()


def test_a_run_that_goes_on_ends_with_the_same_weights(scene: Scene, launched: dict[str, torch.Tensor]) -> None:
    made = scene.trainer()
    scene.run(made, range(4))
    state = RunState(world_size=1, max_tokens_per_device=MAX_TOKENS)
    checkpoint = made.checkpoint(4, None, state)
    # An evaluation leaves the model in another mode, and what is launched behind it must drop all the same.
    made.model.eval()
    made.passes.release()
    assert same(scene.run(made, range(4, NUM_STEPS)), launched)
    again = scene.trainer()
    again.restore(checkpoint)
    assert same(scene.run(again, range(4, NUM_STEPS)), launched)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), "cannot be recorded .*not permitted"),
        (torch.OutOfMemoryError("CUDA out of memory"), "cannot be recorded .there is no memory for them"),
    ],
    ids=["unsupported", "memory"],
)
def test_what_cannot_be_recorded_is_launched_and_said_once(
    scene: Scene, launched: dict[str, torch.Tensor], error: RuntimeError, said: str
) -> None:
    scene.recorder.error = error
    made = scene.trainer()
    assert same(scene.run(made), launched)
    assert (scene.recorder.records, scene.recorder.replays, len(scene.notices)) == (1, 0, 1)
    assert re.search(said, scene.notices[0])
    assert counts(made)["problem"] in scene.notices[0]


def test_what_waits_for_the_device_is_not_recorded(scene: Scene, launched: dict[str, torch.Tensor]) -> None:
    scene.recorder.found = ["attention.py, line 12"]
    assert same(scene.run(scene.trainer()), launched)
    assert scene.recorder.records == 0
    assert scene.notices == [
        "CUDA graphs are not used from here on: the device is waited for in a pass (attention.py, line 12)"
    ]


@pytest.mark.parametrize("what", ["gradient", "losses", "not a number"])
def test_a_replay_that_differs_is_not_trusted(scene: Scene, launched: dict[str, torch.Tensor], what: str) -> None:
    made = scene.trainer()
    weight = made.model.trainable()[0][1]

    def spoil() -> None:
        assert weight.grad is not None
        if what == "losses":
            next(iter(made.passes._graphs.values())).losses_S.mul_(1.01)  # type: ignore[attr-defined]
        else:
            weight.grad.add_(math.nan if what == "not a number" else 0.01)

    scene.recorder.spoil = spoil
    assert same(scene.run(made), launched), "nothing of the replay is left"
    assert (scene.recorder.records, scene.recorder.replays, scene.recorder.resets) == (1, 1, 1)
    assert re.search("a replay differs by .* from what it replays, and rounding explains 0.001", scene.notices[0])


def test_with_deterministic_algorithms_a_replay_must_be_the_same_to_the_last_bit(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    for is_deterministic in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: is_deterministic)  # noqa: B023
        made = scene.trainer()
        weight = made.model.trainable()[-2][1]
        scene.recorder.spoil = lambda: weight.grad.mul_(1 + 1e-6)  # type: ignore[union-attr] # noqa: B023
        scene.run(made, range(4))
        assert scene.recorder.records > 0
        assert len(scene.notices) == is_deterministic
    assert scene.notices[0].endswith("and rounding explains 0")


def test_the_graph_that_was_not_replayed_for_longest_makes_room(
    scene: Scene, launched: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_passes, "MAX_GRAPHS", 1)
    made = scene.trainer()
    assert same(scene.run(made), launched)
    assert scene.recorder.records > 1
    assert scene.recorder.resets == scene.recorder.records - 1
    assert counts(made)["graphs"] == 1


def test_out_of_memory_in_a_step_lets_graphs_go_and_they_come_back(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene.trainer()
    scene.run(made, range(4))
    kept = counts(made)["graphs"]
    assert kept
    forward, calls = GraphPasses._launch, iter(range(100))
    made.passes._graphs.popitem()[1].graph.reset()  # type: ignore[attr-defined]
    monkeypatch.setattr(made.passes._graphs, "seen", set())

    def short(self: GraphPasses, batch: Any) -> torch.Tensor:
        if next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(GraphPasses, "_launch", short)
    step = next(
        step
        for step in range(4, NUM_STEPS)
        if any(each.batch.bucket not in made.passes._graphs for each in made.inputs.micro_batches(step, MAX_TOKENS))  # type: ignore[attr-defined,union-attr]
    )
    before = made.engine.weights()
    made.step(step)
    assert made.max_tokens == MAX_TOKENS // 2
    assert scene.recorder.resets == kept
    assert not same(made.engine.weights(), before)
    for again in range(step, NUM_STEPS):
        made.step(again)
    assert counts(made)["graphs"] > 0


def test_gradients_that_were_dropped_elsewhere_make_graphs_anew(
    scene: Scene, launched: dict[str, torch.Tensor]
) -> None:
    made = scene.trainer()
    scene.run(made, range(4))
    kept = counts(made)["graphs"]
    made.model.zero_grad(set_to_none=True)
    assert same(scene.run(made, range(4, NUM_STEPS)), launched)
    assert scene.recorder.resets == kept > 0


def test_a_pass_whose_gradient_overflows_is_not_recorded_and_the_next_one_is(
    scene: Scene, launched: dict[str, torch.Tensor]
) -> None:
    made = scene.trainer()
    norm = graph_passes.norm
    overflowing = iter([torch.tensor(math.inf)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_passes, "norm", lambda tensors: next(overflowing, norm(tensors)))
        weights = scene.run(made)
    assert same(weights, launched)
    assert scene.recorder.records > 0
    assert scene.notices == []


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_recorded(scene: Scene) -> None:
    made = scene.trainer()
    with torch.no_grad():
        made.model.trainable()[-1][1].fill_(math.nan)
    with pytest.raises(TrainingError, match="is not finite"):
        scene.run(made)
    assert scene.recorder.records == 0


@pytest.mark.parametrize(
    ("options", "strategy", "padding", "said"),
    [
        ({}, "ddp", "unpadded", None),
        ({}, "fsdp2", "unpadded", "fsdp2 gathers"),
        ({}, "zero1", "unpadded", "zero1 gathers"),
        ({}, "ddp", "sorted", "padded"),
        ({"gradient_checkpointing": True}, "ddp", "unpadded", "--gradient_checkpointing"),
        ({"rdrop_alpha": 1.0}, "ddp", "unpadded", "--rdrop_alpha"),
        ({"quantization": "4bit"}, "ddp", "unpadded", "--quantization 4bit"),
    ],
)
def test_what_is_known_not_to_work_is_not_tried(
    options: dict[str, Any], strategy: str, padding: str, said: str | None
) -> None:
    model = {name: value for name, value in options.items() if name == "quantization"}
    training = {name: value for name, value in options.items() if name not in model}
    config = RunConfig(model=ModelConfig(**model), training=TrainingConfig(**training))
    problem = graph_problem(config, strategy, padding)
    assert problem is None if said is None else said in str(problem)


@pytest.mark.parametrize("wanted", ["auto", "no"])
def test_a_cpu_has_none_and_nothing_is_said(scene: Scene, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    object.__setattr__(scene.config.training, "cuda_graphs", wanted)
    made = scene.trainer(graphs=False)
    assert type(made.passes) is EagerPasses
    assert not made.inputs.uses_buckets
    assert not made.engine.keeps_gradients
    assert made.evaluation_graphs is None
    assert (scene.notices, made.describe_passes()) == ([], {})
    cuda: Any = type("OnCuda", (), {"device": torch.device("cuda"), "launch_config": made.ranks.launch_config})
    object.__setattr__(scene.config.training, "gradient_checkpointing", True)
    monkeypatch.setattr(pass_choice, "CudaRecorder", lambda device: scene.recorder)
    chosen, of_evaluation = choose_passes(scene.config, cuda, made.engine, made.model, scene.notices.append)
    assert type(chosen) is EagerPasses
    # An evaluation keeps no activations that could be computed again.
    assert (of_evaluation is not None) == (wanted == "auto")
    assert len(scene.notices) == (wanted == "auto")
