"""LoRA in few products: the layers that read one input are one product, and so are their adapters.

peft computes x W' + b, x A', (x A') B', a scale and a sum for every layer, and autocast casts x and the adapters for
each of them. Here the layers of a group, which read the same x, share one product with their weights one below the
other; their adapters, Hu et al. 2022 (LoRA), equation 3, are added to it in place; and all adapters of the model are
cast together once a pass. In half precision that rounds less often than peft does.

Legend: T tokens, I input features, N output features of all layers of a group, of which the first n layers have
adapters of rank R and O output features each; S = n R.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class GroupProducts(torch.autograd.Function):
    """What a group of layers makes of one input: [T, N], the adapters' part in its first n O columns.

    Products are asked for in place, into memory of the right layout: so none is followed by a sum or a copy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        weight_NI: torch.Tensor,
        bias_N: torch.Tensor | None,
        a_SI: torch.Tensor,
        b_nOR: torch.Tensor,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        num_adapters, _, rank = b_nOR.shape
        weight_IN = weight_NI.t()
        y_TN = torch.mm(x_TI, weight_IN) if bias_N is None else torch.addmm(bias_N, x_TI, weight_IN)
        if dropout:
            # A mask for each adapter, as peft draws them, in one operation.
            x_nTI, mask_nTI = torch.native_dropout(x_TI.expand(num_adapters, *x_TI.shape), dropout, True)
            z_nTR = torch.bmm(x_nTI, _each(a_SI, num_adapters).transpose(1, 2))
            ctx.save_for_backward(x_nTI, weight_NI, a_SI, b_nOR, z_nTR, mask_nTI)
        else:
            z_nTR = _by_adapter(torch.mm(x_TI, a_SI.t()), num_adapters, rank)
            ctx.save_for_backward(x_TI, weight_NI, a_SI, b_nOR, z_nTR)
        _adapted(y_TN, b_nOR).baddbmm_(z_nTR, b_nOR.transpose(1, 2), alpha=scale)
        ctx.scale, ctx.dropout = scale, dropout
        return y_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy_TN,) = gradients
        x, weight_NI, a_SI, b_nOR, z_nTR, *masks = ctx.saved_tensors
        num_adapters, _, rank = b_nOR.shape
        dy_nTO = _adapted(dy_TN, b_nOR)
        db_nOR = torch.empty_like(b_nOR).baddbmm_(dy_nTO.transpose(1, 2), z_nTR, beta=0, alpha=ctx.scale)
        dx_TI = torch.mm(dy_TN, weight_NI) if ctx.needs_input_grad[0] else None
        dbias_N = dy_TN.sum(0) if ctx.needs_input_grad[2] else None
        if masks:
            dz_nTR = torch.empty_like(z_nTR).baddbmm_(dy_nTO, b_nOR, beta=0, alpha=ctx.scale)
            da_SI = torch.bmm(dz_nTR.transpose(1, 2), x).view_as(a_SI)
            if dx_TI is not None:
                dx_nTI = torch.bmm(dz_nTR, _each(a_SI, num_adapters))
                kept = 1 / (1 - ctx.dropout)
                dx_nTI = torch.ops.aten.native_dropout_backward(dx_nTI, masks[0], kept)
                dx_TI.add_(dx_nTI.squeeze(0) if num_adapters == 1 else dx_nTI.sum(0))
        else:
            dz_TS = dy_TN.new_empty(dy_TN.shape[0], a_SI.shape[0])
            _by_adapter(dz_TS, num_adapters, rank).baddbmm_(dy_nTO, b_nOR, beta=0, alpha=ctx.scale)
            da_SI = torch.mm(dz_TS.t(), x)
            if dx_TI is not None:
                dx_TI.addmm_(dz_TS, a_SI)
        return dx_TI, None, dbias_N, da_SI, db_nOR, None, None


def plain_products(
    x_TI: torch.Tensor,
    weight_NI: torch.Tensor,
    bias_N: torch.Tensor | None,
    a_SI: torch.Tensor,
    b_nOR: torch.Tensor,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """`GroupProducts` as the formula says it, for a compiler, which has no use for memory of a certain layout."""
    num_adapters, height, rank = b_nOR.shape
    y_TN = torch.nn.functional.linear(x_TI, weight_NI, bias_N)
    if dropout:
        x_nTI, _ = torch.native_dropout(x_TI.expand(num_adapters, *x_TI.shape), dropout, True)
        z_nTR = torch.bmm(x_nTI, _each(a_SI, num_adapters).transpose(1, 2))
    else:
        z_nTR = _by_adapter(torch.mm(x_TI, a_SI.t()), num_adapters, rank)
    added = scale * torch.bmm(z_nTR, b_nOR.transpose(1, 2)).transpose(0, 1).flatten(1)
    return y_TN + torch.nn.functional.pad(added, (0, y_TN.shape[1] - num_adapters * height))


def _by_adapter(tensor_TS: torch.Tensor, num_adapters: int, size: int) -> torch.Tensor:
    """[n, T, size], without a copy, of the first columns of a matrix that holds the adapters side by side."""
    columns = tensor_TS[:, : num_adapters * size]
    return columns.view(len(columns), num_adapters, size).transpose(0, 1)


def _adapted(tensor_TN: torch.Tensor, b_nOR: torch.Tensor) -> torch.Tensor:
    return _by_adapter(tensor_TN, b_nOR.shape[0], b_nOR.shape[1])


def _each(a_SI: torch.Tensor, num_adapters: int) -> torch.Tensor:
    return a_SI.view(num_adapters, -1, a_SI.shape[1])


class CastTogether(torch.autograd.Function):
    """Tensors of given shapes, one behind the other from the numbers of the parameters, in another type.

    The gradients of the parameters are, likewise, views of one tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shapes, ctx.parameters = shapes, [(each.shape, each.dtype) for each in parameters]
        flat = torch.cat([each.reshape(-1) for each in parameters]).to(dtype)
        return _pieces(flat, shapes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        known = next(each for each in gradients if each is not None)
        # A layer that the pass left out has none.
        whole = [
            known.new_zeros(shape) if each is None else each for each, shape in zip(gradients, ctx.shapes, strict=True)
        ]
        flat = torch.cat([each.reshape(-1) for each in whole]).to(ctx.parameters[0][1])
        return None, None, *_pieces(flat, [tuple(shape) for shape, _ in ctx.parameters])


def _pieces(flat: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, ...]:
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return tuple(piece.view(shape) for piece, shape in zip(torch.split(flat, sizes), shapes, strict=True))
