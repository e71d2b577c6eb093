"""Ranks that share one GPU, and a process that is the only rank of several runs: for checks and measurements."""

import os

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState


def join_over_gloo() -> None:
    """Make the process group that the launcher describes, through gloo, before `Ranks` would make another.

    NCCL refuses two ranks on one GPU; gloo copies through the host's memory and does not. Every rank of a machine then
    computes on its first GPU.
    """
    dist.init_process_group("gloo")
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = "0"


def forget_accelerate() -> None:
    """Let the next user of accelerate in this process set it up anew.

    Its state is one for the process: precision and device of the first user hold for all others, or are refused.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
