"""Products of half precision where the processor has none: computed in float32 and rounded once, in all of a step."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from qa_dist.model import precision
from qa_dist.model.precision import Precision, computing
from qa_dist.model.span_model import SpanModel
from qa_dist.model.wide_products import WideProducts
from tests.unit.trained import trained_folder

HALVES = [torch.bfloat16, torch.float16]
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
PRODUCTS: dict[str, Product] = {
    "mm": lambda c, a, b: a[0] @ b[0],
    "addmm": lambda c, a, b: torch.addmm(c[0], a[0], b[0], beta=0.5, alpha=2),
    "addmm_": lambda c, a, b: c[0].clone().addmm_(a[0], b[0], alpha=0.5),
    "bmm": lambda c, a, b: a @ b,
    "baddbmm": lambda c, a, b: torch.baddbmm(c, a, b, alpha=2),
    "baddbmm_": lambda c, a, b: c.clone().baddbmm_(a, b, beta=0, alpha=2),
    "linear": lambda c, a, b: torch.nn.functional.linear(a, b[0].t(), c[0, 0]),
}


class Asked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which products torch is asked for, with the type of their first operand."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: set[tuple[str, torch.dtype]] = set()

    @override
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.name()
        if any(part in name for part in ("mm", "attend", "attention")):
            self.products.add((name, args[0].dtype))
        return func(*args, **(kwargs or {}))


def operands(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 5, 7), (2, 5, 300), (2, 300, 7))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_the_exact_one_rounded(name: str, dtype: torch.dtype) -> None:
    own, exact = operands(dtype), PRODUCTS[name](*(each.double() for each in operands(dtype)))
    with Asked() as asked, WideProducts(dtype):
        found = PRODUCTS[name](*own)
    assert found.dtype is dtype
    # Half a unit in the last place, and a thousandth of it for the sums in float32.
    unit = torch.finfo(dtype).eps
    assert bool(((found.double() - exact).abs() <= 0.501 * unit * 2 ** exact.abs().log2().ceil()).all())
    assert {kind for _, kind in asked.products} == {torch.float32}
    assert all(torch.equal(before, after) for before, after in zip(operands(dtype), own, strict=True))


def test_what_is_added_to_in_place_stays_where_it_is() -> None:
    c, a, b = (each[0] for each in operands(torch.bfloat16))
    with WideProducts(torch.bfloat16):
        assert c.addmm_(a, b).data_ptr() == c.data_ptr()
    again, a, b = (each[0] for each in operands(torch.bfloat16))
    assert torch.equal(c, torch.addmm(again.float(), a.float(), b.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_products_of_other_types_are_torch_s(dtype: torch.dtype) -> None:
    own = operands(dtype)
    with Asked() as asked, WideProducts(torch.bfloat16):
        found = PRODUCTS["bmm"](*own)
    assert torch.equal(found, PRODUCTS["bmm"](*own))
    assert asked.products == {("aten::bmm", dtype)}


@pytest.mark.parametrize("dtype", HALVES)
def test_attention_is_computed_in_float32_and_keeps_its_logarithms(dtype: torch.dtype) -> None:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    generator = torch.Generator().manual_seed(1)
    halves = [torch.randn(1, 2, 30, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    wide = [each.detach().float().requires_grad_() for each in halves]

    def gradients(inputs: list[torch.Tensor], output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, inputs, torch.ones_like(output))

    with Asked() as asked, WideProducts(dtype):
        output, logarithms = attend(*halves)
        found = gradients(halves, output)
    wanted, exact = attend(*wide)
    assert torch.equal(output, wanted.to(dtype))
    assert torch.equal(logarithms, exact)
    assert {kind for _, kind in asked.products} == {torch.float32}
    for gradient, of_wide in zip(found, gradients(wide, wanted), strict=True):
        assert gradient.dtype is dtype
        torch.testing.assert_close(gradient.float(), of_wide, atol=2 * torch.finfo(dtype).eps, rtol=0.02)


def steps(folder: Path, monkeypatch: pytest.MonkeyPatch, *, has_them: bool, **options: str) -> Asked:
    """What a short run and its evaluation ask torch for on a processor with or without instructions."""
    monkeypatch.setattr(precision, "has_instructions", lambda device_type, asked: has_them or asked == "no")
    with Asked() as asked:
        trained_folder(folder, validation_file=str(folder / "train.json"), **options)
    return asked


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"padding": "sorted"}, {"lora_implementation": "grouped"}], ids=str)
def test_a_run_asks_for_no_product_that_would_be_imitated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Precision, options: dict[str, str]
) -> None:
    asked = steps(tmp_path, monkeypatch, has_them=False, mixed_precision=kind, **options)
    assert {dtype for _, dtype in asked.products} == {torch.float32}
    assert any("backward" in name for name, _ in asked.products)


def test_a_processor_with_instructions_is_asked_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = steps(tmp_path, monkeypatch, has_them=True, mixed_precision="bf16")
    assert ("qa_dist::attend_backward", torch.bfloat16) in asked.products
    assert ("aten::addmm", torch.bfloat16) in asked.products


def test_a_compiled_run_is_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A mode around compiled code would let torch leave it uncompiled, without a word.
    monkeypatch.setattr(SpanModel, "compile_layers", lambda self, backend: None)
    asked = steps(tmp_path, monkeypatch, has_them=False, mixed_precision="bf16", torch_compile="layers")
    assert {dtype for _, dtype in asked.products} == {torch.bfloat16}
    assert "which makes --mixed_precision bf16 many times slower than no" in capsys.readouterr().err


def test_outside_of_half_precision_there_is_no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_instructions", lambda device_type, asked: asked == "no")
    found = []
    for kind in ("no", "bf16"):
        with computing("cpu", kind):
            found.append(torch.utils._python_dispatch._len_torch_dispatch_stack())
    assert found == [0, 1]
