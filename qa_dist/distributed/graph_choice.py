"""Whether passes of a run, or of an evaluation, are replayed as CUDA graphs: one answer for all of them."""

from qa_dist.config.options import RunConfig
from qa_dist.distributed.ranks import Ranks


def wants_graphs(config: RunConfig, ranks: Ranks) -> bool:
    """Whether there is anything to choose: on a CPU, or with `--cuda_graphs no`, there is not."""
    return config.training.cuda_graphs != "no" and ranks.device.type == "cuda"


def graph_problem(config: RunConfig, strategy: str, padding: str, *, is_training: bool = True) -> str | None:
    """Why the passes of a run on CUDA cannot be graphs, as a clause; None if nothing is known to be in the way.

    Args:
        config: The run's options.
        strategy: How its ranks hold the model.
        padding: How its batches are computed, as `SpanModel.padding` says.
        is_training: Whether the passes are those of training, or of an evaluation.
    """
    if strategy != "ddp":
        return f"{strategy} gathers or exchanges tensors inside a pass"
    if padding != "unpadded":
        return "batches of this model are padded, each to a size of its own"
    if config.model.quantization != "no":
        return f"--quantization {config.model.quantization} computes in layers of bitsandbytes, which were not tried"
    if is_training and config.training.rdrop_alpha:
        return "--rdrop_alpha computes every feature twice, which was not tried in graphs"
    if is_training and config.training.gradient_checkpointing:
        return "--gradient_checkpointing reads in a pass where random numbers are, which torch refuses while recording"
    return None


def uses_graphs(config: RunConfig, strategy: str, padding: str) -> bool:
    """Whether a run on CUDA begins with graphs; what it meets may make it go on without them."""
    return config.training.cuda_graphs != "no" and graph_problem(config, strategy, padding) is None
