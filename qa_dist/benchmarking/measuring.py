"""What both sides of a comparison measure with."""

from collections.abc import Sequence
from statistics import median

import torch

from qa_dist.benchmarking.job import Job, Result
from qa_dist.benchmarking.synthetic import SyntheticStore
from qa_dist.config.options import RunConfig


def synthetic_store(job: Job, config: RunConfig, vocab_size: int) -> SyntheticStore:
    """The features that this job is measured on."""
    return synthetic_features(config, job.num_features * job.part[1], vocab_size, part=job.part)


def synthetic_features(
    config: RunConfig, num_features: int, vocab_size: int, part: tuple[int, int] = (0, 1)
) -> SyntheticStore:
    """One of several equal parts of as many features, as a run's options cut and draw them."""
    return SyntheticStore(
        num_features,
        seed=config.training.seed,
        vocab_size=vocab_size,
        max_seq_length=config.data.max_seq_length,
        doc_stride=config.data.doc_stride,
        part=part[0],
        num_parts=part[1],
    )


def rates(num_features: int, num_tokens: int, seconds: Sequence[float]) -> Result:
    """Throughput of steps that took so long."""
    total = sum(seconds)
    return {
        "num_features": num_features,
        "num_tokens": num_tokens,
        "seconds": total,
        "step_seconds": list(seconds),
        "median_step_seconds": median(seconds),
        "features_per_second": num_features / total,
        "tokens_per_second": num_tokens / total,
    }


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
