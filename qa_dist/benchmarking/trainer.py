"""`bench trainer`: transformers' `Trainer` against qa_dist on the same model, features, batch size and hardware.

Rivals are the tutorials' recipe as published (padding to --max_seq_length, default collator, dropout of the model's
configuration, peft adapters), and `Trainer` with everything it offers: dynamic padding, batches grouped by length,
fused AdamW (its default), bf16 where the device has it, data-loader processes, compilation if asked for. The fastest of
those counts as the best `Trainer`. Leaving dropout out is no option of `Trainer` but of the model, so both sides are
measured with and without.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qa_dist.benchmarking.job import Headline, Job, Result, alternate, medians, rate, ratio
from qa_dist.benchmarking.settings import MODEL_DROPOUT, NO_DROPOUT, Settings

TUTORIAL = "Trainer, tutorial"
OURS = "qa_dist, model's dropout"
OURS_NO_DROPOUT = "qa_dist, no dropout"
_BEST = "Trainer, best options"


def variants(settings: Settings) -> dict[str, Job]:
    """What is compared, by name."""
    best: dict[str, Any] = {"dynamic_padding": True, "group_by_length": True}
    num_workers = 2 if settings.device == "cpu" else 4
    precision = {"mixed_precision": settings.best_precision}

    def job(kind: Any, options: Mapping[str, Any], **trainer: Any) -> Job:
        return Job(
            kind=kind,
            options=settings.run_options(**options),
            num_features=settings.num_features,
            warmup_steps=settings.warmup_steps,
            threads=settings.options.threads,
            trainer=trainer,
            device=settings.single_device,
        )

    jobs = {TUTORIAL: job("train_hugging_face", MODEL_DROPOUT)}
    if settings.best_precision != "no":
        jobs[f"{TUTORIAL}, {settings.best_precision}"] = job("train_hugging_face", MODEL_DROPOUT | precision)
    for dropout_name, dropout in (("model's dropout", MODEL_DROPOUT), ("no dropout", NO_DROPOUT)):
        options = dropout | precision
        jobs[f"{_BEST}, {dropout_name}"] = job("train_hugging_face", options, **best)
        jobs[f"{_BEST}, {num_workers} workers, {dropout_name}"] = job(
            "train_hugging_face", options, **best, num_workers=num_workers
        )
        jobs[f"qa_dist, {dropout_name}"] = job("train", options)
        if settings.options.torch_compile:
            jobs[f"{_BEST}, compiled, {dropout_name}"] = job("train_hugging_face", options, **best, torch_compile=True)
    return jobs


def measure_section(settings: Settings, notice: Callable[[str], None]) -> dict[str, Any]:
    """The comparison, as a section of bench.json."""
    jobs = variants(settings)
    measured = alternate(jobs, repeats=settings.repeats, notice=notice)
    # What qa_dist recommends: no dropout on CPU, where masks cost much; the model's own on CUDA.
    recipe = OURS_NO_DROPOUT if settings.device == "cpu" else OURS
    return {
        "headline": headline(measured, recipe),
        "recipe": recipe,
        "results": [
            {
                "name": name,
                **medians(
                    results, "features_per_second", "tokens_per_second", "median_step_seconds", "peak_memory_bytes"
                ),
            }
            for name, results in measured.items()
        ],
    }


def headline(measured: Mapping[str, list[Result]], recipe: str) -> dict[str, Headline]:
    """Ratios of median features per second."""
    done = {name: results for name, results in measured.items() if not any(r.get("out_of_memory") for r in results)}

    def fastest(prefix: str, dropout: str) -> list[Result] | None:
        names = [name for name in done if name.startswith(prefix) and name.endswith(dropout)]
        return max((done[name] for name in names), key=rate, default=None)

    pairs = {
        "speedup_vs_tutorial_recipe": (done.get(recipe), done.get(TUTORIAL)),
        "speedup_vs_tutorial_recipe_equal_dropout": (done.get(OURS), done.get(TUTORIAL)),
        "speedup_vs_best_trainer": (done.get(recipe), fastest(_BEST, "model's dropout")),
        "speedup_vs_best_trainer_equal_dropout": (done.get(OURS), fastest(_BEST, "model's dropout")),
        "speedup_vs_best_trainer_no_dropout": (done.get(OURS_NO_DROPOUT), fastest(_BEST, "no dropout")),
    }
    return {name: ratio(ours, theirs) for name, (ours, theirs) in pairs.items() if ours and theirs}
