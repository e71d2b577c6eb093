import pytest
import torch

from qa_dist.model.precision import Precision, autocast


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_matrix_products_have_the_precision_s_type(precision: Precision, dtype: torch.dtype) -> None:
    matrix = torch.ones(2, 2)
    with autocast("cpu", precision):
        assert (matrix @ matrix).dtype == dtype
        assert matrix.dtype == torch.float32
    assert (matrix @ matrix).dtype == torch.float32
