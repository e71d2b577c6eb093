"""R-Drop: every feature twice in a pass, each time with other dropout, and a loss on how far the two are apart.

The loss is that of Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks" (arXiv:2106.14448), equation
4, halved, so that with a weight of 0 it is the mean over both copies. That of a span is the mean of start and end.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from qa_dist.common.errors import ConfigError
from qa_dist.features.rows import Row
from qa_dist.model.dropout import has_dropout
from qa_dist.model.span_model import SpanModel, pad_logits, span_loss

COPIES = 2
"""How often a feature is in a pass."""


def copies(alpha: float) -> int:
    """How often a feature is in a pass with this weight of the divergence; once where there is none."""
    return COPIES if alpha else 1


def require_dropout(alpha: float, model: SpanModel) -> None:
    """Make sure that the copies of a feature can differ, if there are copies.

    Raises:
        ConfigError: On every rank, if the model drops nothing.
    """
    if alpha and not has_dropout(model):
        raise ConfigError(
            [
                "--rdrop_alpha compares what a feature gives with other dropout, and this model drops nothing; set "
                "--model_dropout 0.1, or leave --rdrop_alpha out"
            ],
            on_all_ranks=True,
        )


def loss_of(alpha: float) -> Callable[..., torch.Tensor]:
    """The loss of a run with this weight of the divergence: `rdrop_loss`, or `span_loss` where it is 0."""
    return partial(rdrop_loss, alpha=alpha) if alpha else span_loss


def rdrop_loss(
    start_T: torch.Tensor,
    end_T: torch.Tensor,
    lengths: Sequence[int],
    labels_B2: torch.Tensor,
    row: Row | None = None,
    *,
    alpha: float,
) -> torch.Tensor:
    """Loss of every feature, float32 [B / 2], of a row that holds all of them once and then all of them again.

    It is the mean over the copies of `span_loss`, and `alpha` / 4 times the sum of both Kullback-Leibler divergences
    between what the copies say, for start and end on average.

    Args:
        start_T: Start logits, float32 [T].
        end_T: End logits, float32 [T].
        lengths: Tokens of each feature, B of them: the second half repeats the first.
        labels_B2: int64 [B, 2], start and end token inside the feature.
        row: The features' layout on the same device; None: it is made.
        alpha: Weight of the divergence.
    """
    row = Row.of(lengths, start_T.device) if row is None else row
    logits_2BL = pad_logits(start_T, end_T, row)
    log_probs_2BL = logits_2BL.log_softmax(-1)
    targets_2B = labels_B2.t()
    losses_2B = -log_probs_2BL.gather(-1, targets_2B[..., None]).squeeze(-1)
    # Padding has a log-probability of -inf, and the difference of two of them would be NaN.
    log_probs_2BL = log_probs_2BL.masked_fill(logits_2BL.isinf(), 0.0)
    log_p, log_q = log_probs_2BL.chunk(COPIES, dim=1)
    p, q = logits_2BL.softmax(-1).chunk(COPIES, dim=1)
    # KL(p || q) + KL(q || p), of starts and of ends; b features.
    symmetric_kl_2b = ((p - q) * (log_p - log_q)).sum(-1)
    losses_of_copies = torch.stack(losses_2B.mean(0).chunk(COPIES))
    return losses_of_copies.mean(0) + alpha / 4 * symmetric_kl_2b.mean(0)
