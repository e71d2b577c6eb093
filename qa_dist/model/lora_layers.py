"""peft's LoRA layers with a forward pass of our own: the same modules, names and state, in fewer products.

The layers stay peft's: only their class becomes a subclass. So peft saves, loads, merges and switches off adapters as
ever, and wherever it would not simply add one adapter, its own forward pass runs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from typing_extensions import override

from qa_dist.model.families import family_of
from qa_dist.model.lora_products import CastTogether, GroupProducts, plain_products
from qa_dist.model.span_model import SpanModel, transformers_model

READ_ONE_INPUT = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
"""Names of layers in one module that read the same tensor, in the order in which the module calls them."""

ADAPTER = "default"
"""peft's name for the one adapter of a model."""


class LoraGroup:
    """Layers that read one input, computed when the first of them is called.

    Attributes:
        layers: In the order of their calls; at least one has an adapter.
        adapted: Those with adapters, which are the first columns of the product.
        a_SI: The adapters' A one below the other, as of this pass.
        b_nOR: The adapters' B, as of this pass.
        bias_N: The biases of all layers as columns are, as of this pass where they are trained; None without any.
    """

    a_SI: torch.Tensor
    b_nOR: torch.Tensor
    bias_N: torch.Tensor | None

    def __init__(self, layers: Sequence[nn.Linear | PeftLinear]) -> None:
        self.layers = list(layers)
        self.adapted = [layer for layer in layers if isinstance(layer, PeftLinear)]
        in_columns = [*self.adapted, *(layer for layer in layers if not isinstance(layer, PeftLinear))]
        # Where the output of the i-th layer is among the pieces of the product.
        self._places = [in_columns.index(layer) for layer in layers]
        bases = [_base(layer) for layer in in_columns]
        self._sizes = [base.out_features for base in bases]
        self._scale = float(self.adapted[0].scaling[ADAPTER])
        drop = self.adapted[0].lora_dropout[ADAPTER]
        self._dropout = float(drop.p) if isinstance(drop, nn.Dropout) else 0.0
        self._weight_NI = _one_tensor([base.weight for base in bases])
        biases = [base.bias for base in bases if base.bias is not None]
        self._trained_biases = [bias for bias in biases if bias.requires_grad]
        self.bias_N = _one_tensor(biases) if biases and not self._trained_biases else None
        # The input that the first layer was called with, and the outputs of all.
        self._made: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None

    def parameters(self) -> list[nn.Parameter]:
        """The adapters' A, then their B, then the biases that are trained."""
        parts: list[Any] = [getattr(layer, name)[ADAPTER] for name in ("lora_A", "lora_B") for layer in self.adapted]
        return [*(part.weight for part in parts), *self._trained_biases]

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of `a_SI` and `b_nOR`, and of `bias_N` where it is trained."""
        layer = self.adapted[0]
        num_adapters, rank = len(self.adapted), layer.r[ADAPTER]
        shapes: list[tuple[int, ...]] = [
            (num_adapters * rank, layer.in_features),
            (num_adapters, layer.out_features, rank),
        ]
        return [*shapes, (sum(self._sizes),)] if self._trained_biases else shapes

    def begin_pass(self, pieces: Iterator[torch.Tensor]) -> None:
        """Take what `shapes` says from the tensors of this pass."""
        self.a_SI, self.b_nOR = next(pieces), next(pieces)
        if self._trained_biases:
            self.bias_N = next(pieces)

    def output(self, place: int, x: torch.Tensor) -> torch.Tensor | None:
        """Output of the layer called `place`-th; None if it has to compute its own.

        Args:
            place: The layer's number among `layers`.
            x: Its input [..., I].
        """
        if place == 0:
            if not all(_adds_one_adapter(layer) for layer in self.adapted):
                self._made = None
                return None
            outputs = self._compute(x)
            self._made = (x, outputs) if len(self.layers) > 1 else None
            return outputs[0]
        made = self._made
        if made is None or made[0] is not x:
            return None
        if place == len(self.layers) - 1:
            self._made = None
        return made[1][place]

    def _compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x_TI = x.reshape(-1, x.shape[-1]).to(self._weight_NI.dtype)
        dropout = self._dropout if self.adapted[0].training else 0.0
        compute: Callable[..., torch.Tensor] = plain_products if torch.compiler.is_compiling() else GroupProducts.apply
        y_TN = compute(x_TI, self._weight_NI, self.bias_N, self.a_SI, self.b_nOR, self._scale, dropout)
        y = y_TN.view(*x.shape[:-1], -1)
        if len(self.layers) == 1:
            # The backward pass of a split copies, of one piece too.
            return (y,)
        pieces = torch.split(y, self._sizes, -1)
        return tuple(pieces[place] for place in self._places)


class GroupedLora(PeftLinear):  # type: ignore[misc]
    """A layer with an adapter in a group; made of a peft layer by changing its class."""

    group: LoraGroup
    place: int

    @override
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = None if args or kwargs else self.group.output(self.place, x)
        return super().forward(x, *args, **kwargs) if output is None else output


class GroupedLinear(nn.Linear):
    """A layer without an adapter, of frozen weights, in a group; made of a linear layer by changing its class."""

    group: LoraGroup
    place: int

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self.group.output(self.place, input)
        return super().forward(input) if output is None else output


class GroupedAdapters:
    """All groups of a model, while they compute its layers."""

    def __init__(self, model: SpanModel, groups: Sequence[Sequence[nn.Linear | PeftLinear]]) -> None:
        self.groups = [LoraGroup(layers) for layers in groups]
        self._parameters = [each for group in self.groups for each in group.parameters()]
        self._shapes = [shape for group in self.groups for shape in group.shapes()]
        for group in self.groups:
            for place, layer in enumerate(group.layers):
                layer.__class__ = GroupedLora if isinstance(layer, PeftLinear) else GroupedLinear
                layer.group, layer.place = group, place
        self._model = model
        self._hook = model.register_forward_pre_hook(lambda *_: self.begin_pass())
        model.computes_in_groups = True

    def begin_pass(self) -> None:
        """Cast all adapters to the type of the products; every forward pass of the model begins with it."""
        dtype = _base(self.groups[0].layers[0]).weight.dtype
        cast: Callable[..., tuple[torch.Tensor, ...]] = CastTogether.apply
        pieces = iter(cast(dtype, self._shapes, *self._parameters))
        for group in self.groups:
            group.begin_pass(pieces)

    def remove(self) -> None:
        """Give the layers back to peft."""
        self._hook.remove()
        self._model.computes_in_groups = False
        for group in self.groups:
            for layer in group.layers:
                layer.__class__ = library_class(layer)
                del layer.group, layer.place


def library_class(layer: nn.Linear | PeftLinear) -> Any:
    """The class that a layer of a group has outside of it: peft's, or torch's where it has no adapter."""
    return PeftLinear if isinstance(layer, PeftLinear) else nn.Linear


@contextmanager
def computed_by_peft(model: nn.Module) -> Iterator[None]:
    """Context in which peft computes every layer, for who looks at what its parts do."""
    grouped: list[Any] = [layer for layer in model.modules() if isinstance(layer, GroupedLora | GroupedLinear)]
    kinds = [type(layer) for layer in grouped]
    for layer in grouped:
        layer.__class__ = library_class(layer)
    try:
        yield
    finally:
        for layer, kind in zip(grouped, kinds, strict=True):
            layer.__class__ = kind


def group_layers(model: SpanModel, dtype: torch.dtype) -> list[list[nn.Linear | PeftLinear]]:
    """The layers with adapters that can be computed here, those that read one input together; the others stay peft's.

    Args:
        model: The model, on its device.
        dtype: What products are computed in; frozen weights must be held in it.
    """
    plain = transformers_model(model.model)
    fits = [part for part in plain.modules() if isinstance(part, PeftLinear) and _can_be_grouped(part, dtype)]
    groups, together = [], set()
    # What is known to call its layers with one tensor; in other architectures they may read different ones.
    parents = plain.modules() if family_of(plain.config).unpadded else ()
    for layers in _siblings(parents):
        adapted = [layer for layer in layers if layer in fits]
        others = [layer for layer in layers if type(layer) is nn.Linear and _is_plain(layer, dtype)]
        if adapted and len(adapted) + len(others) == len(layers) and _is_alike(layers, adapted):
            groups.append(layers)
            together.update(adapted)
    return groups + [[layer] for layer in fits if layer not in together]


def _siblings(parents: Any) -> Iterator[list[Any]]:
    for parent in parents:
        children = dict(parent.named_children())
        yield from ([children[name] for name in names] for names in READ_ONE_INPUT if children.keys() >= set(names))


def _can_be_grouped(layer: PeftLinear, dtype: torch.dtype) -> bool:
    """Whether it adds one plain adapter of float32 to a frozen linear layer."""
    return (
        type(layer) is PeftLinear
        and list(layer.lora_A) == [ADAPTER]
        and _adds_one_adapter(layer)
        and not getattr(layer, "lora_variant", {})
        and not layer.fan_in_fan_out
        and type(layer.base_layer) is nn.Linear
        and _is_plain(layer.base_layer, dtype)
        and all(each.dtype == torch.float32 for part in (layer.lora_A, layer.lora_B) for each in part.parameters())
        # A bias of the adapter itself.
        and len(list(layer.lora_B.parameters())) == 1
    )


def _adds_one_adapter(layer: PeftLinear) -> bool:
    return not layer.merged and not layer.disable_adapters and layer.active_adapters == [ADAPTER]


def _is_plain(layer: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether its weights are frozen and held in this type; its bias may be that, or trained in float32."""
    bias: torch.Tensor | None = layer.bias
    fits = bias is None or bias.dtype == (torch.float32 if bias.requires_grad else dtype)
    return fits and layer.weight.dtype == dtype and not layer.weight.requires_grad


def _is_alike(layers: Sequence[Any], adapted: Sequence[PeftLinear]) -> bool:
    """Whether the layers can be one product, and their adapters one."""
    bases = [_base(layer) for layer in layers]
    of_adapters = {
        (layer.out_features, layer.r[ADAPTER], layer.scaling[ADAPTER], getattr(layer.lora_dropout[ADAPTER], "p", 0.0))
        for layer in adapted
    }
    kinds = {(base.in_features, base.bias is None, base.bias is not None and base.bias.requires_grad) for base in bases}
    return len(kinds) == 1 and len(of_adapters) == 1


def _base(layer: Any) -> nn.Linear:
    base: nn.Linear = layer.get_base_layer() if isinstance(layer, PeftLinear) else layer
    return base


def _one_tensor(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The frozen parameters one below the other; they become views of it, so that nothing is held twice."""
    with torch.no_grad():
        whole = torch.cat([each.detach() for each in parameters])
        for parameter, piece in zip(parameters, torch.split(whole, [len(each) for each in parameters]), strict=True):
            parameter.data = piece
    return whole
