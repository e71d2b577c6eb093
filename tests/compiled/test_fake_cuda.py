"""The counter of launches and waits, on work whose counts are known."""

from dataclasses import asdict
from typing import Any

import torch

from tests.support.fake_cuda import CUDA, count, fake_cuda, needs_compiler, run

pytestmark = needs_compiler


def known_work() -> dict[str, Any]:
    """Counts of pieces of work, by name; run by `run`."""
    with fake_cuda():
        weight = torch.empty(8, 8, device=CUDA, requires_grad=True)
        rows = torch.empty(4, 8, device=CUDA)
        other = torch.zeros(4, 8)

        def product() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                (rows @ weight).sum().backward()

        work = {
            "product": product,
            "views": lambda: rows.t().view(8, 4)[2:].unsqueeze(0).detach(),
            "sum": lambda: rows.add(rows),
            "item": lambda: float(rows.sum()),
            "flag": lambda: bool(rows.isfinite().all()),
            "download": lambda: rows.cpu(),
            "upload": lambda: other.to(CUDA),
            "upload beside": lambda: other.to(CUDA, non_blocking=True),
            "host": lambda: torch.ones(3).add(1).numpy(),
        }
        return {name: asdict(count(each, watched=("aten::mm",))) for name, each in work.items()}


def test_launches_waits_bytes_and_types() -> None:
    counts = run(f"{__name__}:known_work")
    assert {name: (each["launches"], each["syncs"]) for name, each in counts.items()} == {
        # Three casts forward and one backward, two products, a sum and its gradient of ones.
        "product": (8, 0),
        "views": (0, 0),
        "sum": (1, 0),
        "item": (2, 1),
        # Whether a number is finite takes four kernels.
        "flag": (6, 1),
        "download": (1, 1),
        "upload": (1, 1),
        "upload beside": (1, 0),
        "host": (0, 0),
    }
    assert counts["product"]["by_name"]["aten::mm"] == 2
    assert counts["product"]["dtypes"]["aten::mm"] == ["bfloat16 bfloat16"]
    assert counts["sum"]["elementwise_bytes"] == 2 * 4 * 8 * 4
