"""Which way of computing passes a run takes."""

from collections.abc import Callable

from qa_dist.config.options import RunConfig
from qa_dist.distributed.engine import Engine
from qa_dist.distributed.ranks import Ranks
from qa_dist.model.span_model import SpanModel
from qa_dist.training.cuda_graphs import CudaRecorder
from qa_dist.training.graph_passes import GraphPasses
from qa_dist.training.passes import EagerPasses, Passes


def choose_passes(
    config: RunConfig, ranks: Ranks, engine: Engine, model: SpanModel, notice: Callable[[str], object]
) -> Passes:
    """CUDA graphs where they are wanted and can be; else operation by operation, with a notice if graphs were wanted.

    All ranks of a run choose alike. On a CPU there is nothing to choose.
    """
    if config.training.cuda_graphs == "no" or ranks.device.type != "cuda":
        return EagerPasses(ranks, engine)
    problem = graph_problem(config, ranks.launch_config.strategy, model.padding)
    if problem is not None:
        notice(f"CUDA graphs are not used: {problem}")
        return EagerPasses(ranks, engine)
    return GraphPasses(ranks, engine, model, CudaRecorder(ranks.device), notice)


def uses_graphs(config: RunConfig, strategy: str, padding: str) -> bool:
    """Whether a run on CUDA begins with graphs; what it meets may make it go on without them."""
    return config.training.cuda_graphs != "no" and graph_problem(config, strategy, padding) is None


def graph_problem(config: RunConfig, strategy: str, padding: str) -> str | None:
    """Why the passes of a run on CUDA cannot be graphs, as a clause; None if nothing is known to be in the way."""
    if strategy != "ddp":
        return f"{strategy} gathers or exchanges tensors inside a pass"
    if padding != "unpadded":
        return "batches of this model are padded, each to a size of its own"
    if config.model.quantization != "no":
        return f"--quantization {config.model.quantization} computes in layers of bitsandbytes, which were not tried"
    if config.training.gradient_checkpointing:
        return "--gradient_checkpointing reads in a pass where random numbers are, which torch refuses while recording"
    return None
