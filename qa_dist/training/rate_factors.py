"""Which parameters learn faster or slower than `--learning_rate` says."""

from qa_dist.config.options import TrainingConfig
from qa_dist.model.span_model import SpanModel, head_parameters


def rate_factors(model: SpanModel, training: TrainingConfig) -> dict[str, float]:
    """What the learning rate of each trainable parameter is multiplied with, by name, where it is not 1.

    `--loraplus_lr_ratio` is for the adapters' B (LoRA+, Hayou et al. 2024, section 4), `--head_lr_ratio` for the head.
    `--layer_decay` d gives layer i of n, counted from 1 at the bottom, the factor d^(n + 1 - i), what lies below the
    layers d^(n + 1), and what lies between them and the head d, as ELECTRA does (Clark et al. 2020, appendix A); it is
    multiplied with the others.
    """
    head = set(head_parameters(model))
    factors: dict[str, float] = {}
    for name, _ in model.trainable():
        if name in head:
            factors[name] = training.head_lr_ratio or 1.0
        elif ".lora_B." in name or ".lora_embedding_B." in name:
            factors[name] = training.loraplus_lr_ratio or 1.0
    if training.layer_decay is not None:
        for name, factor in _layer_factors(model, training.layer_decay, head).items():
            factors[name] = factors.get(name, 1.0) * factor
    return {name: factor for name, factor in factors.items() if factor != 1}


def _layer_factors(model: SpanModel, decay: float, head: set[str]) -> dict[str, float]:
    depths = {id(weight): depth for depth, block in enumerate(model.blocks(), 1) for weight in block.parameters()}
    num_layers = max(depths.values(), default=0)
    factors = {}
    reached = 0
    for name, weight in model.trainable():
        if name in head:
            continue
        # What follows the layers in the model's order is behind them.
        reached = num_layers if depths.get(id(weight)) else reached
        depth = depths.get(id(weight), reached)
        factors[name] = decay ** (num_layers + 1 - depth)
    return factors
