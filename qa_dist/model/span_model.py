"""The encoder with its span head, over one row of real tokens; the loss.

`SpanModel` is what training and evaluation call: features go in as one row of real tokens and logits come out as one
row, whether the architecture computes the row as it is or padded.

Legend: B features, T real tokens of all of them, L tokens of the longest.
"""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from qa_dist.common.errors import ConfigError
from qa_dist.features.rows import Row
from qa_dist.model.families import family_of
from qa_dist.model.quantization import num_elements

Weights = dict[str, torch.Tensor]
"""Tensors by name."""

Padding = Literal["unpadded", "sorted", "max_length"]

_MAX_RECOMPILES = 64
"""Graphs that torch may make of the layers of all models of a process; ModernBERT's, of three kinds, need nine."""


class SpanModel(nn.Module):
    """A question-answering model that reads and writes rows of real tokens.

    Attributes:
        model: the transformers model, inside a peft model if adapters are trained.
        padding: how the row is computed.
        notes: what the user should know about choices made here, one sentence each.
        takes_token_types: whether the model reads token types.
        computes_in_groups: whether layers share what they compute (`qa_dist.model.lora_layers`).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        padding: Padding,
        max_seq_length: int,
        tokenizer_pads_left: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.padding = padding
        self.notes = tuple(notes)
        config: Any = model.config
        plain = transformers_model(model)
        # Adapters are layers inside the transformers model. It is called directly: peft's question-answering wrapper
        # (0.21) swallows token_type_ids and position_ids.
        self._call: Callable[..., Any] = plain.__call__
        family = family_of(config)
        self.takes_token_types = (
            family.token_types
            and "token_type_ids" in inspect.signature(plain.forward).parameters
            # RoBERTa has a table of one token type, and tokenizers that number two.
            and getattr(config, "type_vocab_size", 2) > 1
        )
        self._first_position = family.first_position(config)
        self._separator = config.sep_token_id if family.global_question else None
        self._pad_token_id = config.pad_token_id or 0
        self._padded_length = max_seq_length if padding == "max_length" else None
        self._max_seq_length = max_seq_length
        self._pads_left = tokenizer_pads_left
        self._is_compiled = False
        self.computes_in_groups = False

    def forward(
        self,
        input_ids_T: torch.Tensor,
        token_type_ids_T: torch.Tensor,
        lengths: tuple[int, ...],
        row: Row | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Start and end logits of every token, both float32 [T].

        Args:
            input_ids_T: int64 [T], the features one behind the other.
            token_type_ids_T: int64 [T].
            lengths: Tokens of each feature; they add up to T.
            row: Their layout on the same device; None: it is made.
        """
        row = Row.of(lengths, input_ids_T.device) if row is None else row
        if self.padding == "unpadded":
            output = self._compute_row(input_ids_T, token_type_ids_T, row)
            # Squeezed, not indexed: the backward pass of an index fills a tensor with zeros and copies.
            start_T, end_T = output.start_logits.squeeze(0), output.end_logits.squeeze(0)
        else:
            real, output = self._compute_padded(input_ids_T, token_type_ids_T, row)
            start_T, end_T = output.start_logits[real], output.end_logits[real]
        return start_T.float(), end_T.float()

    def _compute_row(self, input_ids_T: torch.Tensor, token_type_ids_T: torch.Tensor, row: Row) -> Any:
        positions_T = row.positions_T + self._first_position if self._first_position else row.positions_T
        inputs = {"token_type_ids": token_type_ids_T[None]} if self.takes_token_types else {}
        return self._call(
            input_ids=input_ids_T[None],
            position_ids=positions_T[None],
            cumulative=row.cumulative,
            longest=self._max_seq_length,
            **inputs,
        )

    def _compute_padded(
        self, input_ids_T: torch.Tensor, token_type_ids_T: torch.Tensor, row: Row
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], Any]:
        """Row and column of every real token, both int64 [T], and the model's output."""
        num_features, longest = row.places_BL.shape
        width = self._padded_length or longest
        rows_T = (row.padded_T - row.positions_T) // longest
        columns_T = row.positions_T
        if self._pads_left:
            columns_T = columns_T + (width - row.cumulative.diff())[rows_T]
        # Places as numbers: with a mask in their stead the device would have to say how many there are.
        real = rows_T, columns_T
        attention_mask_BL = torch.zeros(num_features, width, dtype=torch.long, device=input_ids_T.device)
        attention_mask_BL[real] = 1
        input_ids_BL = torch.full_like(attention_mask_BL, self._pad_token_id)
        input_ids_BL[real] = input_ids_T
        inputs = {"input_ids": input_ids_BL, "attention_mask": attention_mask_BL}
        if self.takes_token_types:
            token_type_ids_BL = torch.zeros_like(input_ids_BL)
            token_type_ids_BL[real] = token_type_ids_T
            inputs["token_type_ids"] = token_type_ids_BL
        if self._separator is not None:
            # As transformers' own, which also wants exactly three separators: all that stands before the first one.
            inputs["global_attention_mask"] = ((input_ids_BL == self._separator).cumsum(1) == 0) * attention_mask_BL
        return real, self._call(**inputs)

    @property
    def padded_length(self) -> int | None:
        """Length that every feature is padded to, if it is a fixed one."""
        return self._padded_length

    def compile_encoder(self, backend: str = "inductor") -> None:
        """Compile the model once for rows of any length.

        Shapes are symbolic and the boundaries of the features are data, so that a new batch does not compile again.
        """
        self._call = torch.compile(transformers_model(self.model).forward, dynamic=True, backend=backend)
        self._is_compiled = True

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile every layer of the encoder, all by one graph for rows of any length (`qa_dist.model.compiling`).

        Names of tensors stay as they are. The first call of a layer in training, and in evaluation, compiles.

        Raises:
            RuntimeError: When a layer is called: it cannot be compiled as a whole, or this version of torch cannot.
        """
        layers = self.blocks()
        # All models of a process share a limit, as all layers share the function that transformers calls them through.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, _MAX_RECOMPILES)
        for layer in layers:
            layer.compile(dynamic=True, fullgraph=True, backend=backend)
        compiled = layers[0]._compiled_call_impl
        assert compiled is not None
        layers[0]._compiled_call_impl = partial(_with_gradient, compiled)
        self._is_compiled = True

    def leave_layers(self) -> None:
        """Let the layers compute as they did before `compile_layers`."""
        for layer in self.blocks():
            layer._compiled_call_impl = None
        self._is_compiled = False

    @property
    def max_seq_length(self) -> int:
        """Most tokens that a feature has."""
        return self._max_seq_length

    @property
    def is_thread_safe(self) -> bool:
        """Whether several threads may call the model at once, in evaluation.

        Quantised layers of bitsandbytes and layers in groups keep what they computed last, and what is compiled may
        have to be again.
        """
        is_quantized = getattr(transformers_model(self.model), "is_quantized", False)
        return not (self._is_compiled or self.computes_in_groups or is_quantized)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Name and tensor of every trainable parameter, in the model's order."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def blocks(self) -> list[nn.Module]:
        """The encoder's layers, from the first to the last."""
        lists = [part for part in transformers_model(self.model).modules() if isinstance(part, nn.ModuleList)]
        return list(max(lists, key=lambda part: sum(weight.numel() for weight in part.parameters()), default=()))

    def shift_invariant_biases(self) -> dict[str, nn.Parameter]:
        """Trainable biases, by name, that shift alike all that a softmax sees: the head's two, and `without_effect`.

        A softmax does not change with such a shift, so their gradient is zero but for rounding - and Adam divides a
        gradient by its own size, which would turn that rounding into steps as long as any other, and other ones at
        another world size. So it is set to zero.
        """
        heads = set(head_parameters(self))
        config = transformers_model(self.model).config
        patterns = [each.replace("{last}", str(len(self.blocks()) - 1)) for each in family_of(config).without_effect]
        return {
            name: weight
            for name, weight in self.trainable()
            if (name in heads and tuple(weight.shape) == (2,))
            # peft puts a layer with an adapter one deeper.
            or any(re.search(f"{pattern}$", name.replace(".base_layer.", ".")) for pattern in patterns)
        }


def _with_gradient(layer: Callable[..., Any], hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
    """Call the first layer of a compiled encoder with an input that wants a gradient in training, as the others' does.

    Frozen embeddings give one that does not, for which torch would compile a graph of its own: that takes longer than
    the three products that its backward pass leaves out, one percent of a step.
    """
    if torch.is_grad_enabled() and not hidden_states.requires_grad:
        hidden_states = hidden_states.detach().requires_grad_()
    return layer(hidden_states, *args, **options)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trainable or not."""
    return sum(num_elements(parameter) for parameter in model.parameters())


def transformers_model(model: nn.Module) -> Any:
    """The transformers model inside `model`, which may be it or a peft model around it."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model else model


def head_names(model: Any) -> tuple[str, ...]:
    """Top-level modules of a question-answering model that are not its encoder: `qa_outputs`, `classifier`, ...

    Raises:
        ConfigError: The model has nothing but an encoder.
    """
    names = tuple(
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    )
    if not names:
        raise ConfigError([f"{type(model).__name__} has no question-answering head; choose an encoder that has one"])
    return names


def head_parameters(model: SpanModel) -> list[str]:
    """Names of the head's trainable parameters, as in `SpanModel.trainable`."""
    heads = head_names(transformers_model(model.model))
    return [name for name, _ in model.trainable() if name.removeprefix("base_model.model.").split(".")[0] in heads]


def span_loss(
    start_T: torch.Tensor,
    end_T: torch.Tensor,
    lengths: Sequence[int],
    labels_B2: torch.Tensor,
    row: Row | None = None,
) -> torch.Tensor:
    """Loss of every feature, float32 [B]: the mean of the cross-entropies of its start and end token.

    Args:
        start_T: Start logits, float32 [T], the features one behind the other.
        end_T: End logits, float32 [T].
        lengths: Tokens of each feature.
        labels_B2: int64 [B, 2], start and end token inside the feature.
        row: The features' layout on the same device; None: it is made.
    """
    padded_2BL = pad_logits(start_T, end_T, Row.of(lengths, start_T.device) if row is None else row)
    targets = labels_B2.t().reshape(-1)
    losses = nn.functional.cross_entropy(padded_2BL.flatten(0, 1), targets, reduction="none")
    return losses.view(2, -1).mean(0)


def pad_logits(start_T: torch.Tensor, end_T: torch.Tensor, row: Row) -> torch.Tensor:
    """Start and end logits, float32 [T] each, as a padded batch [2, B, L] with -inf for padding."""
    pad: Callable[..., torch.Tensor] = _PadLogits.apply
    return pad(start_T, end_T, row.places_BL, row.padded_T)


class _PadLogits(torch.autograd.Function):
    """Start and end logits of a row as a padded batch [2, B, L] with -inf for padding.

    The operators are as many for any number of features. In the backward pass, too, every number is read from its one
    place: nothing is added up, so that the order of threads cannot change the result.
    """

    @staticmethod
    def forward(
        ctx: Any, start_T: torch.Tensor, end_T: torch.Tensor, places_BL: torch.Tensor, padded_T: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(padded_T)
        padding = start_T.new_full((1,), -math.inf)
        logits = torch.cat((start_T, padding, end_T, padding)).view(2, -1)
        return logits[:, places_BL]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (padded_T,) = ctx.saved_tensors
        start_T, end_T = gradients[0].flatten(1)[:, padded_T]
        return start_T, end_T, None, None
