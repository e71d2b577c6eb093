"""Evaluation batches replayed as graphs, with a simulated graph: what is kept, and that no result changes."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qa_dist import evaluate
from qa_dist.benchmarking.synthetic import SyntheticStore
from qa_dist.config.options import ModelConfig, RunConfig, TrainingConfig
from qa_dist.distributed.ranks import Ranks
from qa_dist.evaluation import graph_passes
from qa_dist.evaluation import trained as of_folder
from qa_dist.evaluation.graph_passes import EvaluationGraphs, choose_evaluation_graphs
from qa_dist.evaluation.passes import BatchLogits, logits_of
from qa_dist.features import buckets
from qa_dist.features.batching import evaluation_batches
from qa_dist.model.building import build_model
from tests.refusals import contents
from tests.support.simulated_graphs import Simulated
from tests.tiny import tiny_model
from tests.unit.trained import reset_accelerate

MAX_TOKENS = 256
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """Buckets for features that are as small as these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "TOKEN_STEP", 32)
        yield


class Scene:
    """A tiny model and features to evaluate it on, with graphs."""

    def __init__(self, folder: Path) -> None:
        config = ModelConfig(model_name_or_path=str(folder), model_dropout=0.1)
        self.model, _ = build_model(config, seed=1, max_seq_length=128)
        self.store: Any = SyntheticStore(60, seed=1, vocab_size=80, max_seq_length=128, doc_stride=16)
        self.batches = evaluation_batches(self.store.lengths, MAX_TOKENS)
        self.recorder, self.notices = Simulated(), list[str]()
        self.ranks = Ranks()
        self.graphs = self.new_graphs()

    def new_graphs(self) -> EvaluationGraphs:
        return EvaluationGraphs(self.model, self.ranks, self.recorder, self.notices.append, max_tokens=MAX_TOKENS)

    def buckets(self) -> list[buckets.Bucket]:
        lengths = [self.store.lengths[batch].tolist() for batch in self.batches]
        return [buckets.Bucket.of(each, longest=128, max_tokens=MAX_TOKENS) for each in lengths]

    def run(self, graphs: EvaluationGraphs | None = None) -> list[BatchLogits]:
        computed = logits_of(
            self.model, self.store, self.batches, CPU, autocast=self.ranks.autocast, with_losses=True, graphs=graphs
        )
        return list(computed)

    def launched(self) -> list[BatchLogits]:
        """Results of the same buckets of which nothing is recorded."""
        recorder = Simulated()
        recorder.found = ["nothing is recorded where the device is waited for"]
        said = list[str]()
        graphs = EvaluationGraphs(self.model, self.ranks, recorder, said.append, max_tokens=MAX_TOKENS)
        found = self.run(graphs)
        assert (recorder.records, len(said)) == (0, 1)
        return found


def same(found: Sequence[BatchLogits], wanted: Sequence[BatchLogits]) -> bool:
    return len(found) == len(wanted) and all(
        np.array_equal(ours.batch.indices, theirs.batch.indices) and all(map(torch.equal, ours[1:], theirs[1:]))
        for ours, theirs in zip(found, wanted, strict=True)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def scene(folder: Path) -> Iterator[Scene]:
    reset_accelerate()
    yield Scene(folder)
    reset_accelerate()


def test_each_bucket_is_recorded_once_and_replayed_from_then_on(scene: Scene) -> None:
    sizes = scene.buckets()
    often = {size for size in sizes if sizes.count(size) > 1}
    found = scene.run(scene.graphs)
    assert scene.recorder.records == len(often) > 0
    counts = scene.graphs.describe()
    assert counts["launched"] == len(set(sizes)) + len(often)
    assert counts["replayed"] == len(sizes) - counts["launched"] > 0
    # Beside these, each graph was replayed once to be looked at.
    assert scene.recorder.replays == counts["replayed"] + len(often)
    assert same(found, scene.launched())
    # An evaluation later on finds the graphs.
    assert same(scene.run(scene.graphs), found)
    assert scene.recorder.records == len(set(sizes))
    assert (scene.notices, scene.graphs.describe()["graphs"]) == ([], len(set(sizes)))


def test_results_are_those_of_batches_as_they_are(scene: Scene) -> None:
    for found, wanted in zip(scene.run(scene.graphs), scene.run(), strict=True):
        assert found.losses_B.dtype == wanted.losses_B.dtype
        for ours, theirs in zip(found[1:], wanted[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_weights_that_change_are_read_and_those_that_move_make_graphs_anew(scene: Scene) -> None:
    scene.run(scene.graphs)
    kept, weight = scene.graphs.describe()["graphs"], scene.model.trainable()[-1][1]
    with torch.no_grad():
        weight.add_(1)
    again = scene.run(scene.graphs)
    assert same(again, scene.launched())
    assert scene.recorder.resets == 0
    weight.data = weight.data.clone() + 1
    moved = scene.run(scene.graphs)
    assert same(moved, scene.launched())
    assert not same(moved, again)
    assert scene.recorder.resets >= kept


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), "cannot be recorded .*not permitted"),
        (torch.OutOfMemoryError("CUDA out of memory"), "cannot be recorded .there is no memory for them"),
    ],
    ids=["unsupported", "memory"],
)
def test_what_cannot_be_recorded_is_launched_and_said_once(scene: Scene, error: RuntimeError, said: str) -> None:
    scene.recorder.error = error
    before = torch.get_rng_state()
    assert same(scene.run(scene.graphs), scene.launched())
    assert torch.equal(torch.get_rng_state(), before)
    assert (scene.recorder.records, scene.recorder.replays, len(scene.notices)) == (1, 0, 1)
    assert re.search(f"^CUDA graphs are not used in evaluation from here on: one {said}", scene.notices[0])
    assert scene.graphs.describe()["problem"] in scene.notices[0]


def test_a_replay_that_differs_by_a_bit_is_not_trusted(scene: Scene) -> None:
    def spoil() -> None:
        recorded = list(scene.graphs._graphs.values())[-1]
        recorded.outputs[1].mul_(1 + 1e-6)

    scene.recorder.spoil = spoil
    assert same(scene.run(scene.graphs), scene.launched())
    assert (scene.recorder.records, scene.recorder.replays, scene.recorder.resets) == (1, 1, 1)
    assert re.search("a replay differs by up to .* from what it replays, and must be the same", scene.notices[0])


def test_the_graph_that_was_not_replayed_for_longest_makes_room(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_passes, "MAX_GRAPHS", 1)
    assert same(scene.run(scene.graphs), scene.launched())
    assert scene.recorder.records > 1
    assert scene.recorder.resets == scene.recorder.records - 1
    assert scene.graphs.describe()["graphs"] == 1


def failing(forward: Callable[..., Any], call: int) -> Callable[..., Any]:
    """A forward pass of which one call runs out of memory."""
    calls = iter(range(1, 1000))

    def short(*inputs: Any) -> Any:
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*inputs)

    return short


def test_a_pass_without_memory_is_tried_again_without_the_graphs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = scene.launched()
    scene.run(scene.graphs)
    scene.run(scene.graphs)
    # The first batch has to be launched again, beside the graphs of the others.
    first = scene.buckets()[0]
    scene.graphs._graphs.pop(first).graph.reset()
    scene.graphs._graphs.seen.discard(first)
    monkeypatch.setattr(scene.model, "forward", failing(scene.model.forward, 1))
    assert same(scene.run(scene.graphs), wanted)
    assert scene.recorder.resets == scene.recorder.records
    said = "CUDA graphs are not used in evaluation from here on: there is no memory for them beside a pass"
    assert scene.notices == [said]


def test_without_graphs_to_let_go_a_pass_without_memory_fails(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene.model, "forward", failing(scene.model.forward, 1))
    with pytest.raises(torch.OutOfMemoryError):
        scene.run(scene.graphs)


def test_logits_that_are_no_numbers_are_passed_on_and_not_recorded(scene: Scene) -> None:
    with torch.no_grad():
        scene.model.trainable()[-1][1].fill_(float("nan"))
    found = scene.run(scene.graphs)
    assert all(logits.start_T.isnan().any() for logits in found)
    assert (scene.recorder.records, scene.notices) == (0, [])


@pytest.mark.parametrize(
    ("options", "device", "is_chosen"),
    [
        ({}, "cpu", False),
        ({}, "cuda", True),
        ({"cuda_graphs": "no"}, "cuda", False),
        ({"gradient_checkpointing": True}, "cuda", True),
    ],
)
def test_they_are_chosen_on_cuda(scene: Scene, options: dict[str, Any], device: str, is_chosen: bool) -> None:
    ranks: Any = type("At", (), {"device": torch.device(device), "launch_config": scene.ranks.launch_config})
    config = RunConfig(training=TrainingConfig(**options))
    chosen = choose_evaluation_graphs(config, ranks, scene.model, scene.notices.append, scene.recorder)
    assert (chosen is not None) == is_chosen
    scene.model.padding = "sorted"
    assert choose_evaluation_graphs(config, ranks, scene.model, scene.notices.append, scene.recorder) is None
    assert scene.notices == []


def test_the_files_of_an_evaluation_are_the_same_bytes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Simulated()

    def chosen(config: Any, ranks: Any, model: Any, notice: Any) -> EvaluationGraphs:
        return EvaluationGraphs(model, ranks, recorder, notice, max_tokens=64)

    words = ["--adapter", str(trained / "adapter"), "--eval_tokens_per_device", "64", "--results_dir"]
    for name in ("launched", "replayed"):
        if name == "replayed":
            monkeypatch.setattr(of_folder, "choose_evaluation_graphs", chosen)
        reset_accelerate()
        assert evaluate.main([*words, str(tmp_path / name)]) == 0
    assert recorder.replays > recorder.records > 0
    assert contents(tmp_path / "replayed") == contents(tmp_path / "launched")
