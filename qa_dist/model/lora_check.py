"""Grouped adapters against peft's own forward pass, on random inputs and adapters, before a run trusts them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from qa_dist.model.equality import largest_difference
from qa_dist.model.lora_layers import GroupedAdapters, LoraGroup, library_class

NUM_TOKENS = 64
"""Rows of the inputs that are compared."""


def difference_from_peft(adapters: GroupedAdapters, autocast: AbstractContextManager[object]) -> float:
    """Largest difference of outputs and gradients from what peft's layers give, as a share of the largest number.

    Every group is compared, without dropout. The adapters' own numbers will not do: as training begins, B is zero, and
    with it the gradient of A. They are put back.

    Args:
        adapters: The groups, on the device.
        autocast: What the model is called in; entered once.
    """
    device = adapters.groups[0].parameters()[0].device
    generator = torch.Generator(device).manual_seed(0)
    with _random_numbers(adapters, generator), _without_dropout(adapters):
        inputs = [
            torch.randn(1, NUM_TOKENS, group.adapted[0].in_features, generator=generator, device=device)
            for group in adapters.groups
        ]
        for each in inputs:
            each.requires_grad_()
        with autocast:
            adapters.begin_pass()
            pairs = [pair for group, x in zip(adapters.groups, inputs, strict=True) for pair in _outputs(group, x)]
        found, expected = ([pair[side] for pair in pairs] for side in (0, 1))
        weights = [torch.randn(each.shape, generator=generator, device=device).to(each.dtype) for each in expected]
        # Of a model that only answers, adapters are frozen.
        adapted = [each for group in adapters.groups for each in group.parameters() if each.requires_grad]
        leaves = [*inputs, *adapted]
        gradients = (torch.autograd.grad(outputs, leaves, weights) for outputs in (found, expected))
        return largest_difference([*pairs, *zip(*gradients, strict=True)])


def _outputs(group: LoraGroup, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Output of each layer as the group gives it, and as peft does."""
    found = [layer(x) for layer in group.layers]
    for layer, output in zip(group.layers, found, strict=True):
        yield output, library_class(layer).forward(layer, x)


@contextmanager
def _random_numbers(adapters: GroupedAdapters, generator: torch.Generator) -> Iterator[None]:
    """Context in which adapters add about as much to an output as the layer itself."""
    parameters = [each for group in adapters.groups for each in group.parameters()]
    kept = [each.detach().clone() for each in parameters]
    try:
        with torch.no_grad():
            for each in parameters:
                each.normal_(std=each.shape[-1] ** -0.5, generator=generator)
        yield
    finally:
        with torch.no_grad():
            for each, numbers in zip(parameters, kept, strict=True):
                each.copy_(numbers)


@contextmanager
def _without_dropout(adapters: GroupedAdapters) -> Iterator[None]:
    modules = [part for group in adapters.groups for layer in group.layers for part in layer.modules()]
    modes = [part.training for part in modules]
    try:
        for part in modules:
            part.training = False
        yield
    finally:
        for part, mode in zip(modules, modes, strict=True):
            part.training = mode
