"""Part A: single operations against oracles - attention, the families, the loss, the search for spans."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from qa_dist.benchmarking.gpu.items import Failed, Figures
from qa_dist.benchmarking.gpu.scene import Scene, alone, new_model, relative_error
from qa_dist.benchmarking.measuring import synchronize, synthetic_features
from qa_dist.evaluation.top_spans import pad_rows, top_spans
from qa_dist.features.collate import FeatureBatch
from qa_dist.features.rows import Row
from qa_dist.model.attention import unpadded_attention
from qa_dist.model.families import FAMILIES, model_types_unpadded
from qa_dist.model.precision import autocast
from qa_dist.model.span_model import SpanModel, span_loss, transformers_model

PEAK_BF16 = 989e12
"""Dense bf16 operations per second of an H100 SXM, NVIDIA's data sheet (H100 Tensor Core GPU, 2023)."""

LENGTHS = ([1], [384], [5, 1, 40, 17, 3], [384, 1, 200, 64, 33, 171])
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

OUTPUT_LIMITS = {"bf16": 1.6e-2, "fp16": 2e-3, "fp32": 2e-5}
GRADIENT_LIMITS = {"bf16": 4e-2, "fp16": 6e-3, "fp32": 1e-4}
"""Greatest error relative to the largest value. bf16 has 8 bits of mantissa, fp16 11; weights are rounded once more."""


def machine(scene: Scene) -> Figures:
    """Rates of plain copies and products: what no program on this device exceeds."""
    figures: Figures = {"copy_bytes_per_second": _copy_rate(scene)}
    size = scene.choose(8192, 256)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        figures[f"{name}_flops_per_second"] = product_rate(scene, dtype, size if name != "fp32" else size // 2)
    if scene.is_cuda:
        free, total = torch.cuda.mem_get_info(scene.device)
        properties = torch.cuda.get_device_properties(scene.device)
        figures |= {"memory_bytes": total, "free_bytes": free, "multiprocessors": properties.multi_processor_count}
        figures["capability"] = ".".join(map(str, torch.cuda.get_device_capability(scene.device)))
        figures["fraction_of_989"] = figures["bf16_flops_per_second"] / PEAK_BF16
    return figures


def product_rate(scene: Scene, dtype: torch.dtype, size: int) -> float:
    """Operations per second of square matrix products of random numbers; the median of ten."""
    left, right = (torch.randn(size, size, dtype=dtype, device=scene.device) for _ in range(2))
    result = torch.empty_like(left)
    return 2 * size**3 / _median_seconds(scene, lambda: torch.mm(left, right, out=result))


def _copy_rate(scene: Scene) -> float:
    """Bytes read and written per second."""
    source = torch.empty(scene.choose(2**30, 2**20), device=scene.device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _median_seconds(scene, lambda: target.copy_(source))


def _median_seconds(scene: Scene, work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    seconds = []
    for _ in range(10):
        synchronize(scene.device)
        begin = time.perf_counter()
        work()
        synchronize(scene.device)
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


# -------------------------------------------------------------------------------------------------------- attention


def attention(scene: Scene) -> Figures:
    """Outputs and gradients of unpadded attention against softmax in float64, feature by feature."""
    worst: dict[str, float] = {}
    wrong: list[str] = []
    cases = list(itertools.product((16, 32, 64), (None, 9, 65), range(len(LENGTHS)), DTYPES))
    cases = scene.choose(cases, cases[::7])
    differing = 0
    for head, window, which, name in cases:
        case = f"{name}, head {head}, window {window}, lengths {LENGTHS[which]}"
        inputs = _inputs(LENGTHS[which], head, DTYPES[name], seed=head + which)
        try:
            found, again = (_attended(inputs, LENGTHS[which], window, scene.device) for _ in range(2))
        except Exception as raised:
            wrong.append(f"{case}: {type(raised).__name__}: {raised!s:.200}")
            continue
        wanted = _oracle(inputs, LENGTHS[which], window)
        # Those of query and key are nothing but rounding where a feature has one token.
        least = max(float(gradient.abs().max()) for gradient in wanted[1:]) / 10
        errors = [relative_error(ours, theirs, least) for ours, theirs in zip(found[1:], wanted[1:], strict=True)]
        for kind, error, limit in (
            ("output", relative_error(found[0], wanted[0]), OUTPUT_LIMITS[name]),
            ("gradient", max(errors), GRADIENT_LIMITS[name]),
        ):
            worst[f"{name}_{kind}_error"] = max(worst.get(f"{name}_{kind}_error", 0.0), error)
            if not error <= limit:
                wrong.append(f"{case}: {kind} is off by {error:.3g}, more than {limit:g}")
        if not torch.equal(found[0], again[0]):
            wrong.append(f"{case}: the output of the second call differs")
        differing += not all(map(torch.equal, found[1:], again[1:]))
    figures: Figures = {"cases": len(cases), **worst}
    figures["cases_whose_gradients_differ_when_repeated"] = differing
    if wrong:
        raise Failed(f"{len(wrong)} cases: " + "; ".join(wrong[:6]), figures | {"wrong": wrong})
    return figures


def _inputs(lengths: Sequence[int], head: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, [1, T, H, D] on the CPU, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, sum(lengths), 3, head, generator=generator).to(dtype) for _ in range(4)]


def _attended(
    inputs: Sequence[torch.Tensor], lengths: Sequence[int], window: int | None, device: torch.device
) -> list[torch.Tensor]:
    """Output and gradients of query, key and value, [1, T, H, D]."""
    *tensors, gradient = (tensor.to(device) for tensor in inputs)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
    output, _ = unpadded_attention(
        torch.nn.Identity(),
        query,
        key,
        value,
        None,
        sliding_window=window,
        cumulative=Row.of(lengths, device).cumulative,
        longest=384,
    )
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def _oracle(inputs: Sequence[torch.Tensor], lengths: Sequence[int], window: int | None) -> list[torch.Tensor]:
    """The same in float64, with softmax written out."""
    query, key, value, gradient = (tensor.double() for tensor in inputs)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    pieces = []
    for q, k, v in zip(*(torch.split(leaf[0].transpose(0, 1), list(lengths), dim=1) for leaf in leaves), strict=True):
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        places = torch.arange(q.shape[1])
        if window is not None:
            scores = scores.masked_fill((places[:, None] - places[None]).abs() >= window, float("-inf"))
        pieces.append(scores.softmax(-1) @ v)
    output = torch.cat(pieces, dim=1).transpose(0, 1)[None]
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


# --------------------------------------------------------------------------------------------------------- families

LOGIT_LIMITS = {"no": 2e-4, "bf16": 6e-2}
WEIGHT_LIMITS = {"no": 2e-3, "bf16": 2e-1}
"""Greatest error of logits, and of gradients of weights, relative to the largest value: padded against unpadded. Both
sides round, and over layers roundings add up."""


def families(scene: Scene) -> Figures:
    """Every family that runs unpadded, against the same weights in padded batches through transformers' attention."""
    figures: Figures = {}
    wrong: list[str] = []
    for model_type, precision in itertools.product(model_types_unpadded(), ("no", "bf16")):
        if precision != "no" and not FAMILIES[model_type].half_precision:
            continue
        try:
            logits, gradients = _unpadded_against_padded(scene, model_type, precision)
        except Exception as error:
            wrong.append(f"{model_type}, {precision}: {type(error).__name__}: {error!s:.200}")
            continue
        figures[f"{model_type}_{precision}_logits"], figures[f"{model_type}_{precision}_gradients"] = logits, gradients
        if not (logits <= LOGIT_LIMITS[precision] and gradients <= WEIGHT_LIMITS[precision]):
            wrong.append(f"{model_type}, {precision}: logits are off by {logits:.3g}, gradients by {gradients:.3g}")
    if wrong:
        raise Failed("; ".join(wrong), figures)
    return figures


def _unpadded_against_padded(scene: Scene, model_type: str, precision: Any) -> tuple[float, float]:
    """Greatest relative errors of the logits and of the weights' gradients."""
    config = scene.config(model_config=str(scene.small_model(model_type)), tuning="full", mixed_precision=precision)
    logits: list[torch.Tensor] = []
    gradients: list[dict[str, torch.Tensor]] = []
    with alone(config) as ranks:
        for padding in ("unpadded", "sorted"):
            changed = dataclasses.replace(config, model=dataclasses.replace(config.model, padding=padding))
            model = new_model(changed, ranks).to(scene.device)
            store = synthetic_features(config, 6, int(transformers_model(model.model).config.vocab_size))
            batch = FeatureBatch.of(store, np.arange(6), scene.device)
            start_T, end_T = _logits(model, batch, precision)
            span_loss(start_T, end_T, batch.lengths, batch.labels_B2, batch.row).mean().backward()  # type: ignore[no-untyped-call]
            logits.append(torch.stack((start_T, end_T)).detach())
            gradients.append({name: weight.grad for name, weight in model.trainable() if weight.grad is not None})
    # Rounding of the whole decides about weights whose own gradient is nearly nothing.
    largest = max(float(gradient.abs().max()) for gradient in gradients[1].values())
    if gradients[0].keys() != gradients[1].keys():
        raise AssertionError("not the same weights have gradients")
    error = max(relative_error(gradients[0][name], wanted, largest / 10) for name, wanted in gradients[1].items())
    return relative_error(logits[0], logits[1]), error


def _logits(model: SpanModel, batch: FeatureBatch, precision: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with autocast(batch.input_ids_T.device.type, precision):
        start_T, end_T = model(batch.input_ids_T, batch.token_type_ids_T, batch.lengths, batch.row)
    return start_T, end_T


# ----------------------------------------------------------------------------------------------------- loss and spans


def loss(scene: Scene) -> Figures:
    """The loss of every feature and its gradient, against cross-entropy in float64, feature by feature."""
    worst = {"loss_error": 0.0, "gradient_error": 0.0}
    for lengths, scale in itertools.product(([1], [384, 1, 64], [7] * 40, list(range(1, 100, 3))), (1.0, 300.0)):
        generator = torch.Generator().manual_seed(len(lengths))
        logits = torch.randn(2, sum(lengths), generator=generator) * scale
        labels = torch.tensor([[length // 3, length - 1] for length in lengths])
        weights = torch.rand(len(lengths), generator=generator)
        ours = logits.detach().clone().to(scene.device).requires_grad_()
        theirs = logits.detach().cpu().double().requires_grad_()
        start_T, end_T = ours.unbind(0)
        found = span_loss(start_T, end_T, tuple(lengths), labels.to(scene.device))
        wanted = torch.stack(
            [
                torch.stack([-piece.log_softmax(1)[side, label[side]] for side in (0, 1)]).mean()
                for piece, label in zip(torch.split(theirs, lengths, dim=1), labels.tolist(), strict=True)
            ]
        )
        (found * weights.to(scene.device)).sum().backward()  # type: ignore[no-untyped-call]
        (wanted * weights).sum().backward()  # type: ignore[no-untyped-call]
        assert ours.grad is not None
        assert theirs.grad is not None
        worst["loss_error"] = max(worst["loss_error"], relative_error(found, wanted))
        worst["gradient_error"] = max(worst["gradient_error"], relative_error(ours.grad, theirs.grad))
    if not max(worst.values()) <= 1e-5:
        raise Failed("the loss or its gradient is off by more than 1e-5", dict(worst))
    return dict(worst)


def spans(scene: Scene) -> Figures:
    """The best spans found on the device against those found on the CPU, on the same logits; many of them are equal."""
    checked = 0
    for search, coarse in itertools.product(("span", "n_best"), (False, True)):
        generator = torch.Generator().manual_seed(checked)
        lengths = torch.randint(8, scene.choose(385, 65), (64,), generator=generator)
        start_T, end_T = torch.randn(2, int(lengths.sum()), generator=generator) * 4
        if coarse:
            start_T, end_T = start_T.round(), end_T.round()
        tables = []
        for device in (scene.device, torch.device("cpu")):
            start_BL, end_BL = (pad_rows(logits.to(device), lengths.to(device)) for logits in (start_T, end_T))
            tables.append(
                top_spans(
                    np.arange(64),
                    start_BL,
                    end_BL,
                    (lengths // 4).to(device),
                    (lengths - 1).to(device),
                    torch.zeros_like(lengths).to(device),
                    lengths.to(device),
                    num_candidates=20,
                    max_answer_length=30,
                    search=search,
                )
            )
        for item in dataclasses.fields(tables[0]):
            ours, theirs = (np.asarray(getattr(table, item.name)) for table in tables)
            if ours.tobytes() != theirs.tobytes():
                raise Failed(f"{item.name} of {search} differs between {scene.device.type} and the CPU")
        checked += 64
    return {"features": checked}
