"""`bench evaluation`: from questions to scores, phase by phase, against the Hugging Face way.

The Hugging Face way is `Dataset.map` with the tutorials' tokenising function, `Trainer.predict`, decoding by nested
loops and scoring text by text, with features padded to --max_seq_length as published; beside it, the same with dynamic
padding. The clock of qa_dist includes reading and validating the file and writing its feature store, which the other
side gets for nothing. Both have computed a batch before the clock starts.

`decode` is what lies between logits and answers. qa_dist does it beside the forward pass, so it is timed once more on
its own; `forward` of qa_dist is the rest of the evaluation, the validation loss and the making of batches included.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from qa_dist.benchmarking import neighbours
from qa_dist.benchmarking.job import Headline, Job, Result, alternate, disturbance, spread
from qa_dist.benchmarking.settings import Settings
from qa_dist.common.errors import ConfigError
from qa_dist.data.sources import load_examples

PHASES = ("tokenise", "forward", "decode", "score")
OURS, THEIRS, DYNAMIC = "qa_dist", "Hugging Face", "Hugging Face, dynamic padding"


def jobs(settings: Settings) -> dict[str, Job]:
    """What is compared, by name."""
    options = settings.options
    run_options = settings.run_options(**_questions(settings), mixed_precision=settings.best_precision)
    if options.model_config is not None and options.tokenizer_name is None:
        # Random weights need some tokenizer of their vocabulary: the reference model has that of BERT.
        run_options["tokenizer_name"] = settings.config.model.model_name_or_path

    def job(kind: Any, **trainer: Any) -> Job:
        return Job(
            kind=kind,
            options=run_options,
            num_features=0,
            threads=options.threads,
            trainer=trainer,
            device=settings.single_device,
        )

    return {
        OURS: job("evaluate"),
        THEIRS: job("evaluate_hugging_face"),
        DYNAMIC: job("evaluate_hugging_face", dynamic_padding=True),
    }


def _questions(settings: Settings) -> dict[str, Any]:
    """Options that say which questions are evaluated."""
    options, count = settings.options, settings.num_questions
    if not options.validation_file:
        return {"dataset_name": f"synthetic:{count}", "max_eval_samples": None}
    path = str(Path(options.validation_file).resolve())
    return {"validation_file": path, "max_eval_samples": count, "subset_seed": options.seed}


def require_answers(settings: Settings) -> None:
    """Make sure, before anything is measured, that the questions can be evaluated by both sides.

    Raises:
        ConfigError: Some of them have no answer, or none that is known.
        DataError: They cannot be read.
    """
    path = settings.options.validation_file
    if not path:
        return
    data = dataclasses.replace(settings.config.data, **_questions(settings))
    examples, _, _ = load_examples(data, "validation")
    without = sum(not example.answers for example in examples)
    if without:
        raise ConfigError(
            [
                f"--validation_file {path} has {without:,} of {len(examples):,} questions without an answer, but "
                "evaluation is compared on questions that all have one; give SQuAD v1.1 questions, or leave it out"
            ]
        )


def measure_section(settings: Settings, notice: Callable[[str], None]) -> dict[str, Any]:
    """The comparison, as a section of bench.json."""
    measured = alternate(jobs(settings), repeats=settings.repeats, notice=notice)
    if any(result.get("out_of_memory") for results in measured.values() for result in results):
        return {"headline": {}, "results": [{"name": name, "out_of_memory": True} for name in measured]}
    ours = measured[OURS]
    return {
        "headline": {
            "evaluation_speedup": _speedup(ours, measured[THEIRS]),
            "evaluation_speedup_vs_dynamic_padding": _speedup(ours, measured[DYNAMIC]),
            "decoding_speedup": _speedup(ours, measured[THEIRS], "decode", "score"),
        },
        "num_examples": ours[0]["num_examples"],
        "num_features": ours[0]["num_features"],
        "results": [
            {
                "name": name,
                **{phase: spread([result["phase_seconds"][phase] for result in counted]) for phase in PHASES},
                "seconds": spread([result["seconds"] for result in counted]),
                **disturbance(results),
                "repeats": results,
            }
            for name, results in measured.items()
            for counted in [neighbours.undisturbed(results)]
        ],
    }


def _seconds(results: Sequence[Result], *phases: str) -> float:
    """Median seconds of these phases together, of the repeats that count; of all phases, if none is named."""
    counted = neighbours.undisturbed(results)
    return float(median(sum(result["phase_seconds"][phase] for phase in phases or PHASES) for result in counted))


def _speedup(ours: Sequence[Result], theirs: Sequence[Result], *phases: str) -> Headline:
    is_stable = neighbours.is_stable(ours, theirs)
    return _seconds(theirs, *phases) / _seconds(ours, *phases) if is_stable else neighbours.UNSTABLE
