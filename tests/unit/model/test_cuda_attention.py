"""Attention as CUDA computes it, with torch's CUDA kernels replaced by plain ones that run on a CPU."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from qa_dist.common.errors import UserError
from qa_dist.features.rows import Row
from qa_dist.model import cuda_attention
from qa_dist.model.attention import drops_weights

LENGTHS = [5, 1, 40, 17, 3]
LONGEST = 64
HEADS, SIZE = 3, 8
OFFSET = 7
"""Of the random numbers that the plain kernels pretend to have drawn."""

FLASH_SCHEMAS = {
    "2.10 to 2.12": (
        "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
        "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
        "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, "
        "Tensor? alibi_slopes=None) -> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, "
        "Tensor debug_attn_mask)"
    ),
    "another": (
        "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
        "SymInt max_q, SymInt max_k, bool is_causal, float dropout_p, *, float? scale=None) -> Tensor"
    ),
}


def block_mask(cumulative: torch.Tensor, reach: int) -> torch.Tensor:
    """Who attends to whom in the whole row, [T, T]."""
    feature = torch.repeat_interleave(torch.arange(len(cumulative) - 1), cumulative.diff())
    places = torch.arange(len(feature))
    mask = feature[:, None] == feature[None]
    return mask if reach < 0 else mask & ((places[:, None] - places[None]).abs() <= reach)


def block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cumulative: torch.Tensor, scale: float, reach: int
) -> torch.Tensor:
    """One attention over the whole row with a mask of blocks, [T, H, D] in and out."""
    rows = [tensor.transpose(0, 1) for tensor in (query, key, value)]
    output = scaled_dot_product_attention(*rows, attn_mask=block_mask(cumulative, reach), scale=scale)
    return output.transpose(0, 1)


def block_gradients(
    gradient: torch.Tensor, tensors: tuple[torch.Tensor, ...], cumulative: torch.Tensor, scale: float, reach: int
) -> tuple[torch.Tensor, ...]:
    """Gradients of `block_attention` by the chain rule: kernels are called where autograd is off."""
    query, key, value, out = (tensor.double().transpose(0, 1) for tensor in (*tensors, gradient))
    scores = (query @ key.mT * scale).masked_fill(~block_mask(cumulative, reach), float("-inf"))
    weights = scores.softmax(-1)
    of_weights = out @ value.mT
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    found = of_scores @ key, of_scores.mT @ query, weights.mT @ out
    return tuple(tensor.transpose(0, 1).to(gradient.dtype).contiguous() for tensor in found)


class PlainKernels:
    """torch's two CUDA kernels in plain mathematics; what they were asked for is in `calls`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []

    def flash(self, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *rest: Any, **options: Any):
        dropout, is_causal, debug = rest
        assert torch.equal(cu_q, cu_k)
        assert cu_q.dtype == torch.int32
        assert max_q == max_k >= int(cu_q.diff().max())
        assert not is_causal
        assert not debug
        assert options["window_size_left"] == options["window_size_right"]
        assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
        self.calls.append(("flash", dropout))
        output = block_attention(q, k, v, cu_q, options["scale"], options["window_size_left"])
        state = torch.tensor([1, OFFSET], dtype=torch.uint64)
        return output.contiguous(), q.new_zeros(q.shape[1], q.shape[0]), state, state[0], q.new_zeros(0)

    def flash_backward(self, gradient: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any, **options: Any):
        cu_q, cu_k, max_q, max_k, dropout, is_causal, state, _ = rest
        assert int(state[1]) == OFFSET
        assert not is_causal
        assert max_q == max_k
        assert torch.equal(cu_q, cu_k)
        self.calls.append(("flash backward", dropout))
        return block_gradients(gradient, (q, k, v), cu_q, options["scale"], options["window_size_left"])

    def efficient(self, q: Any, k: Any, v: Any, bias: Any, cu_q: Any, cu_k: Any, *rest: Any, **options: Any):
        max_q, max_k, dropout, mask_type, with_lse = rest
        assert bias is None
        assert torch.equal(cu_q, cu_k)
        assert with_lse
        assert mask_type == 0
        assert q.shape[0] == 1
        assert int(cu_q.diff().max()) <= max_q == max_k <= q.shape[1]
        self.calls.append(("efficient", dropout))
        output = block_attention(q[0], k[0], v[0], cu_q, options["scale"], -1)[None]
        lse = torch.zeros(len(cu_q) - 1, q.shape[2], -(-max_q // 32) * 32)
        return output.contiguous(), lse, torch.tensor(1), torch.tensor(OFFSET), max_q, max_k

    def efficient_backward(
        self, gradient: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, *rest: Any, **options: Any
    ):
        cu_q, _, max_q, max_k, _, dropout, _, offset, mask_type, bias_requires_grad = rest
        assert int(offset) == OFFSET
        assert bias is None
        assert mask_type == 0
        assert not bias_requires_grad
        assert max_q == max_k <= q.shape[1]
        self.calls.append(("efficient backward", dropout))
        inner = block_gradients(gradient[0], (q[0], k[0], v[0]), cu_q, options["scale"], -1)
        return (*(tensor[None] for tensor in inner), torch.zeros(0))


@pytest.fixture(scope="module")
def registered() -> Iterator[PlainKernels]:
    kernels = PlainKernels()
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("_flash_attention_forward", kernels.flash, "CPU")
        library.impl("_flash_attention_backward", kernels.flash_backward, "CPU")
        library.impl("_efficient_attention_forward", kernels.efficient, "CPU")
        library.impl("_efficient_attention_backward", kernels.efficient_backward, "CPU")
    yield kernels
    library._destroy()


@pytest.fixture
def kernels(registered: PlainKernels) -> PlainKernels:
    registered.calls.clear()
    return registered


def inputs(dtype: torch.dtype = torch.float32, size: int = SIZE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, sum(LENGTHS), HEADS, size)
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def attend(tensors: list[torch.Tensor], reach: int = -1, dropout: float = 0.0, scale: float = 0.3) -> torch.Tensor:
    cumulative = Row.of(LENGTHS, torch.device("cpu")).cumulative
    return cuda_attention.attend(*tensors, cumulative, LONGEST, scale, reach, dropout)


def expected(tensors: list[torch.Tensor], reach: int = -1, scale: float = 0.3) -> torch.Tensor:
    rows = [tensor[0].transpose(0, 1) for tensor in tensors]
    return block_attention(*rows, Row.of(LENGTHS, torch.device("cpu")).cumulative, scale, reach)[None]


def names(kernels: PlainKernels) -> list[str]:
    return [name for name, _ in kernels.calls]


@pytest.mark.parametrize(
    ("dtype", "reach", "size", "used"),
    [
        (torch.bfloat16, -1, SIZE, ["flash", "flash backward"]),
        (torch.bfloat16, 4, SIZE, ["flash", "flash backward"]),
        (torch.float16, 0, SIZE, ["flash", "flash backward"]),
        (torch.float32, -1, SIZE, ["efficient", "efficient backward"]),
        # A window that no feature is longer than is none.
        (torch.float32, LONGEST, SIZE, ["efficient", "efficient backward"]),
        (torch.float32, 4, SIZE, []),
        (torch.float32, -1, 12, []),
        (torch.bfloat16, -1, 12, []),
    ],
)
def test_every_kernel_equals_one_attention_with_a_block_mask(
    kernels: PlainKernels, dtype: torch.dtype, reach: int, size: int, used: list[str]
) -> None:
    ours, plain = inputs(dtype, size), inputs(dtype, size)
    found, wanted = attend(ours, reach), expected(plain, reach)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=5 * tolerance, atol=tolerance)
    assert names(kernels) == used


def test_a_row_shorter_than_the_longest_feature_that_may_come(kernels: PlainKernels) -> None:
    # The plain kernel refuses more tokens than the row has, as torch's backward pass does.
    tensors = [tensor[:, :, :5].detach().requires_grad_() for tensor in inputs()]
    cumulative = Row.of([5], torch.device("cpu")).cumulative
    cuda_attention.attend(*tensors, cumulative, 384, 0.3, -1, 0.0).sum().backward()
    assert names(kernels) == ["efficient", "efficient backward"]


@pytest.mark.parametrize(
    ("dtype", "used"),
    [(torch.float16, ["efficient"]), (torch.float32, ["efficient"]), (torch.bfloat16, [])],
)
def test_devices_before_ampere(
    kernels: PlainKernels, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, used: list[str]
) -> None:
    monkeypatch.setattr(cuda_attention, "_is_before_ampere", lambda index: True)
    with torch.no_grad():
        found, wanted = attend(inputs(dtype)), expected(inputs(dtype))
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    assert names(kernels) == used


def test_autocast_computes_float32_in_its_own_type(kernels: PlainKernels) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(inputs())
    assert found.dtype == torch.bfloat16
    assert names(kernels) == ["flash"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dropout_reaches_both_directions(kernels: PlainKernels, dtype: torch.dtype) -> None:
    attend(inputs(dtype), dropout=0.25).float().sum().backward()
    assert [probability for _, probability in kernels.calls] == [0.25, 0.25]


def test_feature_by_feature_drops_too() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        dropped, whole = attend(inputs(), reach=4, dropout=0.5), attend(inputs(), reach=4)
    assert not torch.allclose(dropped, whole)


def test_only_devices_with_a_kernel_for_it_have_dropout() -> None:
    assert drops_weights(torch.device("cuda"))
    assert not drops_weights(torch.device("cpu"))


@pytest.mark.parametrize(("version", "fits"), [("2.10 to 2.12", True), ("another", False)])
def test_the_operator_is_used_where_it_takes_what_it_is_given(version: str, fits: bool) -> None:
    assert cuda_attention.has_flash_operator(torch._C.parse_schema(FLASH_SCHEMAS[version])) == fits
    assert cuda_attention.has_flash_operator(), "the operator of the installed torch"


def test_the_public_function_where_the_operator_is_another(
    kernels: PlainKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_attention, "HAS_DROPOUT", False)
    ours, plain = inputs(torch.bfloat16), inputs(torch.bfloat16)
    torch.testing.assert_close(attend(ours, 4), expected(plain, 4), rtol=0.02, atol=0.02)
    assert names(kernels) == ["flash"]
    with pytest.raises(UserError, match=r"attention dropout 0\.1"):
        attend(ours, dropout=0.1)


def test_our_operator_keeps_torch_s_rules(kernels: PlainKernels) -> None:
    rows = [tensor.detach().transpose(1, 2).contiguous().requires_grad_() for tensor in inputs()]
    cumulative = Row.of(LENGTHS, torch.device("cpu")).cumulative
    torch.library.opcheck(cuda_attention.memory_efficient, (*rows, cumulative, LONGEST, 0.3, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_graph_for_rows_of_any_length(kernels: PlainKernels, dtype: torch.dtype) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(cuda_attention.attend, dynamic=True, fullgraph=True, backend=counter)
    for lengths in ((4, 30, 9), (17, 64), (5, 6, 7, 8, 9, 31), (128, 3), (77,), (20, 21, 22, 23)):
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(1, sum(lengths), 2, 8, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]
        cumulative = Row.of(lengths, torch.device("cpu")).cumulative
        found = compiled(*tensors, cumulative, 384, 0.3, -1, 0.0)
        rows = [tensor[0].transpose(0, 1) for tensor in tensors]
        wanted = block_attention(*rows, cumulative, 0.3, -1)[None]
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    assert counter.frame_count == 1
