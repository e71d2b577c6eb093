"""`bench paths`: the ways to compute a batch, and what they make of the machine.

- `padded to maximum`: every feature to --max_seq_length, as the tutorials do.
- `padded to longest`: the features of a step, as they come, to the longest of them.
- `sorted`: micro-batches of features of similar length, each padded to its longest.
- `unpadded`: real tokens only.

All of them are qa_dist's own training loop; the optimiser steps are the same.
"""

from collections.abc import Callable
from typing import Any

from qa_dist.benchmarking import neighbours
from qa_dist.benchmarking.job import Headline, Job, alternate, medians
from qa_dist.benchmarking.settings import MODEL_DROPOUT, NO_DROPOUT, Settings
from qa_dist.model.families import family_of

Cell = dict[str, Any]


def path_options(settings: Settings) -> dict[str, dict[str, Any]]:
    """Options of every path that the architecture allows."""
    from qa_dist.model.pretrained import model_configuration

    whole_step = settings.options.global_batch_size * settings.options.max_seq_length
    options: dict[str, dict[str, Any]] = {
        "padded to maximum": {"padding": "max_length"},
        # With room for a whole step, the only micro-batch is the step's features as they come.
        "padded to longest": {"padding": "sorted", "max_tokens_per_device": whole_step},
        "sorted": {"padding": "sorted"},
        "unpadded": {"padding": "unpadded"},
    }
    if not family_of(model_configuration(settings.config.model)).unpadded:
        del options["unpadded"]
    return options


def cells(settings: Settings) -> list[tuple[Cell, Job]]:
    """What is measured: each path with LoRA, without and with dropout, with checkpointing, and with full training."""
    plain: Cell = {"tuning": "lora", "dropout": False, "checkpointing": False}
    axes: list[Cell] = [plain, plain | {"dropout": True}, plain | {"checkpointing": True}, plain | {"tuning": "full"}]
    planned: list[tuple[Cell, Job]] = []
    for precision in settings.precisions:
        for path, options in path_options(settings).items():
            chosen = axes
            if settings.options.quick:
                chosen = axes[:2] if path == "unpadded" else axes[:1]
            for axis in chosen:
                cell = {"path": path, "precision": "fp32" if precision == "no" else precision, **axis}
                changes = {
                    **options,
                    **(MODEL_DROPOUT if axis["dropout"] else NO_DROPOUT),
                    "tuning": axis["tuning"],
                    "gradient_checkpointing": axis["checkpointing"],
                    "mixed_precision": precision,
                }
                job = Job(
                    kind="train",
                    options=settings.run_options(**changes),
                    num_features=settings.num_features,
                    warmup_steps=settings.warmup_steps,
                    threads=settings.options.threads,
                    measure_ceiling=True,
                    device=settings.single_device,
                )
                planned.append((cell, job))
    return planned


def name_of(cell: Cell) -> str:
    words = [cell["path"], {"lora": "LoRA", "full": "full"}[cell["tuning"]], cell["precision"]]
    words += [name for name in ("dropout", "checkpointing") if cell[name]]
    return ", ".join(words)


def measure_section(settings: Settings, notice: Callable[[str], None]) -> dict[str, Any]:
    """The measurements, as a section of bench.json."""
    planned = cells(settings)
    measured = alternate({name_of(cell): job for cell, job in planned}, repeats=settings.repeats, notice=notice)
    results = [
        {
            "name": name_of(cell),
            **cell,
            **medians(
                measured[name_of(cell)],
                "features_per_second",
                "tokens_per_second",
                "median_step_seconds",
                "peak_memory_bytes",
                "model_flops_per_second",
                "matmul_ceiling_flops_per_second",
                "fraction_of_matmul_ceiling",
            ),
        }
        for cell, _ in planned
    ]
    # The first unpadded cell: LoRA, no dropout, in the first precision.
    best = next((result for result in results if result["path"] == "unpadded"), results[0])
    headline: dict[str, Headline] = {}
    if not best.get("out_of_memory"):
        is_stable = neighbours.is_stable(best["repeats"])
        share = best["fraction_of_matmul_ceiling"]["median"]
        headline["fraction_of_matmul_ceiling"] = share if is_stable else neighbours.UNSTABLE
    return {"headline": headline, "results": results}
