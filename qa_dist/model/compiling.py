"""Layers of the encoder compiled by torch: one graph for all of them, used only where it was seen to compute the same.

What a layer does beside its matrix products - norms, dropout, residuals, casts, activations - is a dozen passes over
memory and as many launches; compiled it is a few. Shapes are symbolic, boundaries of features are data and weights are
inputs of the graph, so that it serves every layer of one kind and rows of any length: one graph for training, one for
evaluation, and none is made after the start.
"""

import importlib.util
import itertools
import math
import os
import shutil
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qa_dist.common.errors import UserError
from qa_dist.common.libraries import reason
from qa_dist.config.options import RunConfig
from qa_dist.features.rows import Row
from qa_dist.machine.usage import is_out_of_memory
from qa_dist.model.dropout import has_dropout
from qa_dist.model.precision import Precision, autocast
from qa_dist.model.span_model import SpanModel, span_loss, transformers_model

_UNIT_ROUNDOFF: dict[Precision, float] = {"no": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""Largest relative error of one rounding: of float32, float16 and bfloat16."""

_ROUNDINGS = 10
"""How many times the effect of one rounding before each layer the difference may be. A layer rounds about ten times
between its input and its output, and compiled it leaves some of these out."""

_LEAST = 1e-4
"""Relative difference that is always taken for rounding: of sums of thousands of numbers in another order."""

_MOST = 0.25
"""Relative difference that is never taken for rounding."""


def obstacle(model: SpanModel, config: RunConfig, device: torch.device, strategy: str) -> str | None:
    """Why the layers of a model are not compiled, as a clause; None if nothing is known to be in the way.

    It is the same on all ranks of a run whose machines are alike.
    """
    if model.padding != "unpadded":
        return "batches of this model are padded"
    if config.model.quantization != "no":
        return f"layers in {config.model.quantization.replace('bit', ' bits')} are those of bitsandbytes"
    if config.training.gradient_checkpointing:
        return "--gradient_checkpointing computes them twice"
    if strategy in ("zero3", "fsdp2"):
        return f"{strategy} gathers weights between the operations"
    if not model.blocks():
        return "the encoder has none"
    return missing_tool(device.type)


def missing_tool(device_type: str) -> str | None:
    """What a machine lacks to compile for a kind of device, as a clause; None: nothing that can be seen."""
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    # Triton compiles how its kernels are started as C, torch's compiler for CPUs writes C++.
    variable, names = ("CC", ("gcc", "clang", "cc")) if device_type == "cuda" else ("CXX", ("g++", "clang++"))
    if not any(map(shutil.which, filter(None, (os.environ.get(variable), *names)))):
        return f"there is no {'C' if device_type == 'cuda' else 'C++'} compiler ({names[0]})"
    return None


def try_layers(model: SpanModel, precision: Precision, device: torch.device, backend: str = "inductor") -> str | None:
    """Compile a model's layers, for training and for evaluation, and compare them with what they were.

    Logits and gradients of one small batch, without dropout, are compared; adapters that are zero are filled with
    noise while that is done. Weights, gradients and random numbers are afterwards what they were.

    Returns:
        What is wrong, as a clause, and the layers are as they were; None if they are compiled.
    """
    try:
        with _untouched(model, device), warnings.catch_warnings():
            # torch's compiler looks at the gradient of every input.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
            problem = _compiled_and_compared(model, precision, device, backend)
    except UserError:
        raise
    except Exception as error:  # compilers raise whatever they like, and the layers work without one
        fails = "there is too little memory to compare them" if is_out_of_memory(error) else "torch.compile fails"
        problem = f"{fails} ({type(error).__name__}: {reason(error)})"
    if problem is not None:
        model.leave_layers()
    return problem


def _compiled_and_compared(model: SpanModel, precision: Precision, device: torch.device, backend: str) -> str | None:
    batch = _small_batch(model, device)
    drops = has_dropout(model)
    # Without dropout the graph that is compared is the one that trains.
    model.train(not drops)
    with _filled(model):
        wanted = _results(model, batch, precision)
        with _rounded_once_more(model, precision):
            rounded = _results(model, batch, precision)
        model.compile_layers(backend)
        found = _results(model, batch, precision)
    problem = difference(found, wanted, rounded, precision)
    if problem is None:
        if drops:
            model.train()
            _results(model, batch, precision)
        model.eval()
        with torch.no_grad(), autocast(device.type, precision):
            model(batch.input_ids_T, torch.zeros_like(batch.input_ids_T), batch.lengths, batch.row)
    return problem


@dataclass(frozen=True, slots=True)
class _Batch:
    input_ids_T: torch.Tensor
    lengths: tuple[int, ...]
    labels_B2: torch.Tensor
    row: Row


def _small_batch(model: SpanModel, device: torch.device) -> _Batch:
    """Features of random tokens, long and short ones, about as many tokens as four of the longest.

    Neither the number of tokens nor that of boundaries is another size in the model: torch's compiler takes sizes that
    are equal the first time for the same size, and would compile again for the first row in which they differ. Sizes in
    a model are those of its weights, or multiples of them; these numbers are primes.
    """
    longest = model.max_seq_length
    taken = {size for weight in model.parameters() for size in weight.shape} | {longest}
    lengths = [longest, longest, longest // 2, longest // 3, longest // 5]
    lengths += [5] * (_prime_from(11, taken) - 1 - len(lengths))
    lengths[-1] += _prime_from(sum(lengths), taken) - sum(lengths)
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(transformers_model(model.model).config.vocab_size)
    tokens = torch.randint(vocabulary, (sum(lengths),), generator=generator)
    labels = [[length // 3, length // 2] for length in lengths]
    return _Batch(
        tokens.to(device), tuple(lengths), torch.tensor(labels, device=device), Row.of(tuple(lengths), device)
    )


def _prime_from(least: int, taken: Collection[int]) -> int:
    """The smallest prime from `least` on that is not taken."""
    return next(
        number
        for number in itertools.count(least)
        if number not in taken and all(number % factor for factor in range(2, math.isqrt(number) + 1))
    )


Results = dict[str, torch.Tensor]
"""Tensors to compare, by what a sentence calls them."""


def _results(model: SpanModel, batch: _Batch, precision: Precision) -> Results:
    """Logits of the batch, and the gradients of its loss by all that is trained."""
    with autocast(batch.input_ids_T.device.type, precision):
        start_T, end_T = model(batch.input_ids_T, torch.zeros_like(batch.input_ids_T), batch.lengths, batch.row)
    loss = span_loss(start_T, end_T, batch.lengths, batch.labels_B2, batch.row).sum()
    names, weights = zip(*model.trainable(), strict=True)
    # As float16 is trained: unscaled, small gradients vanish. Not `backward`: strategies wait for that to happen.
    scale = 1024 if precision == "fp16" else 1
    gradients = torch.autograd.grad(loss * scale, weights, allow_unused=True)
    named = {f"the gradient of {name}": each for name, each in zip(names, gradients, strict=True) if each is not None}
    return {"the logits": torch.stack((start_T, end_T)).detach(), **named}


def difference(found: Results, wanted: Results, rounded: Results, precision: Precision) -> str | None:
    """Where `found` is further from `wanted` than rounding explains, as a clause; None: nowhere.

    Distances are those of whole tensors, as Euclidean norms. `rounded` are the same results with one rounding more
    before each layer: what a rounding does to each of them is measured and not guessed, so that a gradient which is
    nothing but rounding (as of the bias of a norm that no softmax sees) is no difference.
    """
    if found.keys() != wanted.keys():
        return f"gradients are missing or too many ({', '.join(sorted(found.keys() ^ wanted.keys())[:3])})"

    def norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([tensor.float().norm() for tensor in tensors])

    names = list(wanted)
    sizes = norms([wanted[name] for name in names])
    distances = norms([found[name].float() - wanted[name].float() for name in names])
    roundings = norms([rounded[name].float() - wanted[name].float() for name in names])
    # A gradient much smaller than the others matters as little.
    gradients = sizes[1:]
    sizes = torch.cat((sizes[:1], gradients.maximum(0.1 * gradients.square().mean().sqrt())))
    least = max(_LEAST, 2 * _UNIT_ROUNDOFF[precision])
    limits = (_ROUNDINGS * roundings).clamp(least * sizes, _MOST * sizes)
    # Not greater than: neither is a number that is none.
    for place in (~(distances <= limits)).nonzero().flatten().tolist():
        share, limit = float(distances[place] / sizes[place]), float(limits[place] / sizes[place])
        return f"{names[place]} would differ by {share:.2g} of it, and rounding explains {limit:.2g}"
    return None


@contextmanager
def _untouched(model: SpanModel, device: torch.device) -> Iterator[None]:
    """Context after which random numbers and the mode of every part of a model are as before."""
    modes = {part: part.training for part in model.modules()}
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def _filled(model: SpanModel) -> Iterator[None]:
    """Context in which trained tensors that are all zero, as new adapters' second matrices are, hold small noise."""
    zeros = [weight for _, weight in model.trainable() if not weight.count_nonzero()]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in zeros:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight in zeros:
                weight.zero_()


@contextmanager
def _rounded_once_more(model: SpanModel, precision: Precision) -> Iterator[None]:
    """Context in which the input of every layer is as wrong as a rounding makes it."""
    unit = _UNIT_ROUNDOFF[precision]

    def disturb(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        generator = torch.Generator(inputs[0].device).manual_seed(2)
        noise = torch.rand(inputs[0].shape, generator=generator, device=inputs[0].device) * 2 - 1
        return inputs[0] * (1 + unit * noise), *inputs[1:]

    handles = [block.register_forward_pre_hook(disturb) for block in model.blocks()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
