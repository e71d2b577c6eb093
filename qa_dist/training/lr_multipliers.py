"""Which parameters learn slower than `--learning_rate` says."""

from qa_dist.config.options import TrainingConfig
from qa_dist.model.span_model import SpanModel, head_parameters


def lr_multipliers(model: SpanModel, training: TrainingConfig) -> dict[str, float]:
    """What the learning rate of each trainable parameter is multiplied by, by its name, where that is not 1.

    `--layer_decay` d gives layer i of n, counted from 1 at the bottom, the factor d^(n + 1 - i), what lies below the
    layers d^(n + 1), and what lies between them and the head d, as ELECTRA does (Clark et al. 2020, appendix A).
    """
    if training.layer_decay in (None, 1):
        return {}
    depths = {id(weight): depth for depth, block in enumerate(model.blocks(), 1) for weight in block.parameters()}
    num_layers = max(depths.values(), default=0)
    head = set(head_parameters(model))
    factors = {}
    reached = 0
    for name, weight in model.trainable():
        if name in head:
            continue
        # What follows the layers in the model's order is behind them.
        reached = num_layers if depths.get(id(weight)) else reached
        depth = depths.get(id(weight), reached)
        factors[name] = training.layer_decay ** (num_layers + 1 - depth)
    return factors
