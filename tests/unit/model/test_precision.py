import pytest
import torch

from qa_dist.model.precision import Precision, autocast, has_instructions, precision_notes


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_matrix_products_have_the_precision_s_type(precision: Precision, dtype: torch.dtype) -> None:
    matrix = torch.ones(2, 2)
    with autocast("cpu", precision):
        assert (matrix @ matrix).dtype == dtype
        assert matrix.dtype == torch.float32
    assert (matrix @ matrix).dtype == torch.float32


@pytest.mark.parametrize("supported", [False, True])
def test_only_a_processor_that_imitates_a_precision_is_slow_in_it(
    monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert has_instructions("cpu", "no")
    assert has_instructions("cpu", "bf16") is supported
    assert bool(precision_notes("cpu", "bf16")) is not supported


def test_gpus_before_ampere_imitate_bf16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert has_instructions("cuda", "fp16")
    (note,) = precision_notes("cuda", "bf16")
    assert note.startswith("this GPU has no instructions for bf16")
    assert note.endswith("use fp16 here")
