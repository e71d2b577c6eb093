"""Tune a trained model after its training: `qa-dist calibrate MODEL --validation_file dev.json`.

Fits the temperature of its probabilities and, with unanswerable questions, the threshold above which it answers
nothing, and writes both into its folder, where everything that answers or evaluates finds them. A launcher may stand
before it, as before an evaluation. docs/analysis.md explains what is printed.
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qa_dist.answering.exported import is_exported
from qa_dist.answering.options import with_model_named
from qa_dist.common.command import run_command
from qa_dist.common.errors import ConfigError
from qa_dist.config.given import peek, refuse_trained_options, refuse_without_effect, require_named
from qa_dist.config.options import RunConfig, option
from qa_dist.config.parsing import parse
from qa_dist.distributed.slurm_step import join_slurm_step
from qa_dist.model.folder import TRAINING_DATA, adapter_problems, base_options, for_data_of

if TYPE_CHECKING:
    from qa_dist.evaluation.results import Evaluation
    from qa_dist.evaluation.trained import Questions

PROG = "qa_dist.calibrate"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateConfig:
    """What is calibrated, and on what part of the validation data."""

    model: str | None = option(
        None, "folder of the model, which may also be the first word of all: an adapter or a whole model", required=True
    )
    tune_on: Literal["all", "half"] = option(
        "all", "tune on all questions, or on those about one half of the contexts, with a report on the other"
    )
    disable_tqdm: bool = option(False, "no progress bar")

    def problems(self) -> Iterable[str]:
        if self.model is not None and is_exported(self.model):
            yield f"--model {self.model} is exported; calibrate the model it was made from, and export that again"
        else:
            yield from (problem.replace("--adapter", "--model") for problem in adapter_problems(self.model))


def main(argv: Sequence[str] | None = None) -> int:
    join_slurm_step()
    return run_command(PROG, lambda: _calibrate(sys.argv[1:] if argv is None else argv))


def _calibrate(argv: Sequence[str]) -> int:
    words = with_model_named(argv)
    # What the run chose, or what was tuned before, counts for nothing here, even if it cannot be read.
    left_out = ("null_score_diff_threshold", "tune_on", "gather")
    of_run = for_data_of(base_options(peek(words, "model"), tuned=False), words)
    base = {name: value for name, value in of_run.items() if name not in left_out}
    refuse_trained_options(words)
    refuse_without_effect(words, TRAINING_DATA, "no questions to train on are read here")
    config, options = parse(
        words,
        prog=PROG,
        description=__doc__ or "",
        groups=("data", "model", "evaluation"),
        entry=CalibrateConfig,
        base=base,
    )
    require_named(options.model, words, "model")
    problems = []
    if config.evaluation.gather == "logits":
        problems.append("--gather logits keeps a file of logits, which calibration does not need; leave it out")
    if config.evaluation.null_score_diff_threshold is not None:
        problems.append(
            "--null_score_diff_threshold is what calibration finds; leave it out, or give it to what answers"
        )
    if problems:
        raise ConfigError(problems)
    # DeepSpeed, where it is installed, greets on standard output, which belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        from qa_dist.common.files import make_writable
        from qa_dist.evaluation.trained import evaluate_trained
        from qa_dist.evaluation.tuning import require_enough

    folder = str(options.model)
    evaluate_trained(
        config,
        folder,
        prog=PROG,
        prepare=lambda: make_writable(Path(folder), "--model"),
        look=lambda questions: require_enough(questions.store, options.tune_on, version_2=questions.version_2),
        conclude=lambda evaluation, questions: _write(config, options, evaluation, questions),
    )
    return 0


def _write(config: RunConfig, options: CalibrateConfig, evaluation: "Evaluation", questions: "Questions") -> None:
    """Tune on the answers, write the result into the model's folder, and print it."""
    from qa_dist.evaluation.tuning import tuned

    if evaluation.answers is None:
        raise ValueError("only rank 0 of a whole evaluation has answers")
    found = tuned(
        evaluation.answers,
        questions.store,
        config.data,
        config.evaluation,
        part=options.tune_on,
        version_2=questions.version_2,
    )
    path = found.write(Path(str(options.model)))
    sys.stderr.writelines(f"{PROG}: {line}\n" for line in (*found.lines(), f"written: {path}"))
    sys.stdout.write(json.dumps(found.as_dict(), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
