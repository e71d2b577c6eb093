"""`bench scaling`: one process against several on the same machine and the same features.

- *Weak* scaling: every rank gets the features of a single process, so a step has as many times more as there are ranks.
- *Strong* scaling: the step stays the same and is divided.
- *Independent*: as many single processes as there are ranks, each with its rank's share of features, at the same time
  and without a word between them. On a CPU they share memory bandwidth, caches and clock rate as ranks do, so that weak
  scaling over independent processes is what communication and waiting cost; over one process alone, it is that and
  what the machine cannot do twice at once.

All of it is measured with LoRA, whose gradients are a few MB, and with full fine-tuning, where they are as large as the
model and ranks exchange them during the backward pass. Processes have the same number of threads everywhere. World
sizes and kinds take turns in every repeat.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from qa_dist.benchmarking import neighbours
from qa_dist.benchmarking.balance import simulate
from qa_dist.benchmarking.job import Headline, Job, Result, alternate, medians, spread
from qa_dist.benchmarking.settings import NO_DROPOUT, Settings
from qa_dist.common.errors import ConfigError

ALONE = "1 process"
PREFIXES = {"lora": "", "full": "full, "}
"""What names of measurements begin with, by what is trained."""
EXCHANGED = ("exchanged_bytes_per_step", "exchanged_bytes_per_second", "exchanged_bytes_per_second_alone")
"""Figures of ranks that exchange gradients."""


def world_sizes(settings: Settings) -> list[int]:
    """World sizes to measure, ascending; a single process is always among them.

    Raises:
        ConfigError: There are not as many GPUs.
    """
    largest = settings.num_devices if settings.device == "cuda" else 2
    asked = [int(size) for size in settings.options.num_processes]
    if not asked:
        asked = [size for size in (1, 2, 4, 8, 16) if size <= largest] + [largest]
    if settings.device == "cuda" and max(asked) > settings.num_devices:
        raise ConfigError(
            [f"--num_processes {max(asked)} is more than the {settings.num_devices} GPUs of this machine"]
        )
    return sorted({1, *asked})


def threads_per_process(settings: Settings, sizes: Sequence[int]) -> int | None:
    """CPU threads of every process, the same at all world sizes; None on CUDA: as torch chooses."""
    if settings.options.threads is not None or settings.device == "cuda":
        return settings.options.threads
    return max(1, settings.num_devices // max(sizes))


def jobs(settings: Settings, sizes: Sequence[int]) -> dict[str, Job | list[Job]]:
    """What is measured, by name."""
    options = settings.options
    threads = threads_per_process(settings, sizes)
    profiled_steps = (3 if options.quick else 8) if settings.device == "cpu" else 20

    def job(
        tuning: str, ranks: int, *, factor: int = 1, part: tuple[int, int] = (0, 1), device: int | None = None
    ) -> Job:
        changes = {"tuning": tuning, "global_batch_size": options.global_batch_size * factor, **NO_DROPOUT}
        return Job(
            kind="train",
            options=settings.run_options(**changes, mixed_precision=settings.best_precision),
            num_features=settings.num_features * factor,
            warmup_steps=settings.warmup_steps,
            num_processes=ranks,
            threads=threads,
            part=part,
            profiled_steps=profiled_steps,
            device=device,
        )

    on_cuda = settings.device == "cuda"
    cells: dict[str, Job | list[Job]] = {}
    for tuning, prefix in PREFIXES.items():
        cells[prefix + ALONE] = job(tuning, 1, device=settings.single_device)
        for size in sizes:
            if size > 1:
                cells[f"{prefix}{size} independent"] = [
                    job(tuning, 1, part=(index, size), device=index if on_cuda else None) for index in range(size)
                ]
                cells[f"{prefix}{size} ranks, weak"] = job(tuning, size, factor=size)
                cells[f"{prefix}{size} ranks, strong"] = job(tuning, size)
    return cells


def measure_section(settings: Settings, notice: Callable[[str], None]) -> dict[str, Any]:
    """The measurements and the simulated balance, as a section of bench.json."""
    sizes = world_sizes(settings)
    planned = jobs(settings, sizes)
    measured = alternate(planned, repeats=settings.repeats, notice=notice)
    lora, full = ([efficiency(measured, size, prefix) for size in sizes if size > 1] for prefix in PREFIXES.values())
    return {
        "headline": {**headline(lora), **{f"{key}_full": value for key, value in headline(full).items()}},
        "world_sizes": sizes,
        "threads_per_process": threads_per_process(settings, sizes),
        "efficiency": lora,
        "efficiency_full": full,
        "balance": simulate(seed=settings.options.seed),
        "results": [
            {
                "name": name,
                **medians(
                    results,
                    *("features_per_second", "tokens_per_second", "median_step_seconds", "peak_memory_bytes"),
                    *(figure for figure in EXCHANGED if all(figure in result for result in results)),
                ),
                "phase_shares": phase_shares(results),
            }
            for name, results in measured.items()
        ],
    }


def efficiency(measured: Mapping[str, Sequence[Result]], size: int, prefix: str = "") -> dict[str, Any]:
    """Efficiencies at a world size, of measurements whose names begin with `prefix`.

    Each is the ratio within each repeat, so that what slows a repeat slows both sides.

    A repeat counts if neither side was disturbed, or if this is so of none; `undisturbed_repeats` are those.
    """
    compared = {
        "weak_over_independent": (f"{size} ranks, weak", f"{size} independent", 1),
        "weak_over_one_process": (f"{size} ranks, weak", ALONE, size),
        "strong_over_one_process": (f"{size} ranks, strong", ALONE, size),
    }
    figures: dict[str, Any] = {"world_size": size}
    num_undisturbed: dict[str, int] = {}
    for key, (name, base, factor) in compared.items():
        pairs = list(zip(measured[prefix + name], measured[prefix + base], strict=True))
        if any(result.get("out_of_memory") for pair in pairs for result in pair):
            figures[key] = None
            continue
        steady = [pair for pair in pairs if not any(map(neighbours.is_disturbed, pair))]
        num_undisturbed[key] = len(steady)
        figures[key] = spread(
            [own["features_per_second"] / (factor * alone["features_per_second"]) for own, alone in steady or pairs]
        )
    return {**figures, "undisturbed_repeats": num_undisturbed}


def headline(efficiencies: Sequence[Mapping[str, Any]]) -> dict[str, Headline]:
    """Efficiencies at the largest world size."""
    if not efficiencies:
        return {}
    last = efficiencies[-1]
    keys = {
        "weak_scaling_efficiency": "weak_over_independent",
        "weak_scaling_vs_one_process": "weak_over_one_process",
        "strong_scaling_efficiency": "strong_over_one_process",
    }
    is_stable = {name: count >= neighbours.MIN_UNDISTURBED for name, count in last["undisturbed_repeats"].items()}
    return {
        key: last[name]["median"] if is_stable[name] else neighbours.UNSTABLE
        for key, name in keys.items()
        if last[name] is not None
    }


def phase_shares(results: Sequence[Result]) -> dict[str, float] | None:
    """Share of each phase in the time of a step on rank 0, the median over repeats; None for independent processes."""
    if any("phase_seconds" not in result for result in results):
        return None
    names = results[0]["phase_seconds"]
    seconds = {name: median(result["phase_seconds"][name] for result in results) for name in names}
    return {name: value / sum(seconds.values()) for name, value in seconds.items()}
