"""Evaluation batches replayed as CUDA graphs: the logits of launched ones, and what both take."""

import time
from collections.abc import Sequence

import torch

from qa_dist.benchmarking.gpu.items import Failed, Figures
from qa_dist.benchmarking.gpu.scene import Scene, alone, new_model
from qa_dist.benchmarking.measuring import synchronize, synthetic_features
from qa_dist.config.options import RunConfig
from qa_dist.distributed.lora_choice import group_for_evaluation
from qa_dist.distributed.ranks import Ranks
from qa_dist.evaluation.graph_passes import EvaluationGraphs, choose_evaluation_graphs
from qa_dist.evaluation.passes import BatchLogits, logits_of
from qa_dist.features.batching import evaluation_batches
from qa_dist.features.table import FeatureTable
from qa_dist.model.span_model import SpanModel, transformers_model

_LIMIT = 2e-2
"""How far logits may be from those of batches that are not filled up, as a share of their norm: other shapes take other
kernels, which round bfloat16 elsewhere."""

_REPEATS = 3


def evaluation_graphs(scene: Scene) -> Figures:
    """Large and small batches of a BERT base in bf16, LoRA on query and value, launched and replayed.

    A rehearsal, for which no graph can be recorded, launches them.
    """
    figures: Figures = {}
    for num_tokens in scene.choose((16384, 2048), (256,)):
        config = scene.config(
            **scene.choose({"model_config": "bert-base"}, {}),
            eval_tokens_per_device=num_tokens,
            mixed_precision="bf16",
            cuda_graphs="auto",
        )
        with alone(config) as ranks:
            figures |= _compared(scene, config, ranks, num_tokens, figures)
    return figures


def _compared(scene: Scene, config: RunConfig, ranks: Ranks, num_tokens: int, before: Figures) -> Figures:
    """Milliseconds a batch of so many tokens, and how far the logits of graphs are from launched ones."""
    model = new_model(config, ranks).to(scene.device)
    group_for_evaluation(config, ranks, model)
    vocab_size = int(transformers_model(model.model).config.vocab_size)
    features = synthetic_features(config, scene.choose(2000, 12), vocab_size)
    wanted, seconds = _timed(model, features, ranks, num_tokens, None)
    figures: Figures = {f"launched_ms_{num_tokens}": 1e3 * seconds / len(wanted)}
    said = list[str]()
    graphs = choose_evaluation_graphs(config, ranks, model, said.append)
    if graphs is None:
        if scene.is_cuda:
            raise Failed("no graphs were chosen", before | figures)
        return figures
    # Each bucket is launched, and recorded when it comes again.
    _timed(model, features, ranks, num_tokens, graphs)
    found, seconds = _timed(model, features, ranks, num_tokens, graphs)
    figures[f"replayed_ms_{num_tokens}"] = 1e3 * seconds / len(found)
    figures[f"error_{num_tokens}"] = error = _furthest(found, wanted)
    figures |= {f"{name}_{num_tokens}": value for name, value in graphs.describe().items()}
    graphs.release()
    if said or not error <= _LIMIT:
        raise Failed(said[0] if said else f"logits are {error:.3g} from launched ones", before | figures)
    return figures


def _timed(
    model: SpanModel, features: FeatureTable, ranks: Ranks, num_tokens: int, graphs: EvaluationGraphs | None
) -> tuple[list[BatchLogits], float]:
    """The results of all batches, and the least seconds that they took."""
    batches, seconds = evaluation_batches(features.lengths, num_tokens), list[float]()
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        computed = logits_of(
            model, features, batches, ranks.device, autocast=ranks.autocast, with_losses=True, graphs=graphs
        )
        found = list(computed)
        synchronize(ranks.device)
        seconds.append(time.perf_counter() - begin)
    return found, min(seconds)


def _furthest(found: Sequence[BatchLogits], wanted: Sequence[BatchLogits]) -> float:
    """The greatest distance of a batch's logits from what they should be, as a share of their norm."""

    def distance(ours: BatchLogits, theirs: BatchLogits) -> float:
        logits = torch.cat((theirs.start_T, theirs.end_T))
        return float((torch.cat((ours.start_T, ours.end_T)) - logits).norm() / logits.norm())

    return max(map(distance, found, wanted))
