"""Which way of computing passes a run takes, in training and in its evaluations."""

from collections.abc import Callable

from qa_dist.config.options import RunConfig
from qa_dist.distributed.engine import Engine
from qa_dist.distributed.graph_choice import graph_problem, wants_graphs
from qa_dist.distributed.ranks import Ranks
from qa_dist.evaluation.graph_passes import EvaluationGraphs, choose_evaluation_graphs
from qa_dist.machine.cuda_graphs import CudaRecorder
from qa_dist.model.span_model import SpanModel
from qa_dist.training.graph_passes import GraphPasses
from qa_dist.training.passes import EagerPasses, Passes


def choose_passes(
    config: RunConfig, ranks: Ranks, engine: Engine, model: SpanModel, notice: Callable[[str], object]
) -> tuple[Passes, EvaluationGraphs | None]:
    """CUDA graphs where they are wanted and can be; else operation by operation, with a notice if graphs were wanted.

    All ranks of a run choose alike. On a CPU there is nothing to choose.

    Returns:
        The passes of training, and the graphs of evaluations; None where these are launched. Both record with one
        recorder, so that their graphs share memory: none of them runs while another one does.
    """
    passes: Passes = EagerPasses(ranks, engine, rdrop_alpha=config.training.rdrop_alpha)
    if not wants_graphs(config, ranks):
        return passes, None
    recorder = CudaRecorder(ranks.device)
    problem = graph_problem(config, ranks.launch_config.strategy, model.padding)
    if problem is not None:
        notice(f"CUDA graphs are not used in training: {problem}")
    else:
        passes = GraphPasses(ranks, engine, model, recorder, notice)
    return passes, choose_evaluation_graphs(config, ranks, model, notice, recorder)
