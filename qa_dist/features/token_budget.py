"""How many tokens a pass of a rank may hold: constants on a CPU and in evaluation, measured for training on CUDA."""

import math
from collections.abc import Callable, Sequence

import torch

CPU_TOKENS = 1024
"""Budget on a CPU: longer rows leave the caches and take more memory, and matrix products gain nothing from them.

MiniLM-L6 with LoRA on all linear layers, torch 2.13, one AVX2 core: 0.85 ms per token, against 0.95 with 4096 and 0.96
with 512 (processor time; `bench budgets`).
"""

EVALUATION_TOKENS = {"cpu": 576, "cuda": 16384}
"""Budget of a forward pass in evaluation, by device type; constant, so that scores do not depend on free memory.

On a CPU, blocks of other sizes in every pass leave gaps in glibc's heap, as large as the blocks, and longer rows leave
the caches. The reader of `bench answering` (500 questions of SQuAD dev, MiniLM-L6, one thread and two) peaks at 503 and
547 MiB with 768 tokens and at 495 and 529 MiB with 576, with 1.10 and 1.41, and 1.10 and 1.35 times the speed of the
fastest of the others (docs/answer-speed.md). With 2,048 tokens and two AVX2 cores, `qa-dist predict
--eval_tokens_per_device N` took 37 and 24 s, and 34 and 21 s with 768.
"""

MARGIN = 0.1
"""Share of a CUDA device's memory left free: fragmentation, and features that cost more than their tokens suggest."""


def tokens_that_fit(peaks: Sequence[tuple[int, int]], available_bytes: int) -> int:
    """Tokens whose pass peaks at `available_bytes`, by the line through two measured peaks.

    Args:
        peaks: Two pairs (tokens, peak bytes) of passes of different size.
        available_bytes: What a pass may take.

    Returns:
        A number of tokens, at least 0. Memory is linear in tokens on the unpadded path: no tensor grows with the square
        of a length, since the attention kernels do not store their scores.
    """
    (few, low), (many, high) = sorted(peaks)
    slope = (high - low) / (many - few)
    if slope <= 0:
        return many
    return max(0, math.floor(few + (available_bytes - low) / slope))


def measured_budget(
    run_pass: Callable[[int], int | None],
    *,
    longest: int,
    most: int,
    device: torch.device,
    reserved_bytes: int,
    num_passes: int = 1,
) -> int:
    """The token budget of this rank's CUDA device, from the memory that two small passes take.

    Args:
        run_pass: Runs a forward and backward pass of about so many tokens, drops its gradients, and returns the tokens
            it really had; None if it ran out of memory.
        longest: Tokens of the longest feature; the least that the budget may be.
        most: Tokens that a pass can have at all.
        device: The CUDA device.
        reserved_bytes: Memory that a step takes besides: gradients, the optimiser's moments, what it makes in a step.
        num_passes: Passes whose memory is held at the same time.
    """
    peaks: list[tuple[int, int]] = []
    resting = torch.cuda.memory_allocated(device)
    for wanted in (4 * longest, 16 * longest):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        tokens = run_pass(min(wanted, most))
        if tokens is None:
            most = min(wanted, most) - 1
            break
        peaks.append((tokens, torch.cuda.max_memory_allocated(device)))
        if tokens >= most:
            if num_passes == 1:
                # Everything fits into one pass; there is nothing to find.
                return most
            break
    if not peaks:
        return longest
    if len(peaks) == 1:
        # A GPU that is small, or shared: what there is without a pass is the other point of the line.
        peaks.append((0, resting))
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    available = int((free + torch.cuda.memory_reserved(device)) * (1 - MARGIN)) - reserved_bytes
    # What is beside a pass is there once.
    available = resting + (available - resting) // num_passes
    return max(longest, min(most, tokens_that_fit(peaks, available)))
