"""Score a trained model: `python -m qa_dist.evaluate --adapter DIR`, or through accelerate launch or torchrun.

Without further options it repeats the evaluation that the training run ended with, but for a null threshold that was
tuned for the model, which counts here; logits are kept in a file only where `--results_dir` says where.
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qa_dist.common.command import run_command
from qa_dist.common.errors import ConfigError
from qa_dist.config.given import asks_for_help, peek, refuse_trained_options, refuse_without_effect, require_named
from qa_dist.config.options import RunConfig, option
from qa_dist.config.parsing import parse
from qa_dist.distributed.slurm_step import join_slurm_step
from qa_dist.model.folder import (
    TRAINING_DATA,
    adapter_problems,
    as_tuned,
    base_options,
    for_data_of,
    is_of_run,
    options_of_run,
)
from qa_dist.model.hub import is_hub_id, local_copy

if TYPE_CHECKING:
    from qa_dist.evaluation.results import Evaluation
    from qa_dist.evaluation.trained import Questions

PROG = "qa_dist.evaluate"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """What is evaluated, and where the results go."""

    adapter: str | None = option(
        None,
        "folder that training wrote: an adapter in peft's format, or a whole model; or the hub id of one",
        required=True,
    )
    results_dir: str | None = option(
        None, "folder for metrics.json, predictions.json and the rest; none: print the metrics only"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None, "precision of the matrix products; auto: that of the run"
    )
    disable_tqdm: bool = option(False, "no progress bar")

    def problems(self) -> Iterable[str]:
        if self.adapter is None or not is_hub_id(self.adapter):
            yield from adapter_problems(self.adapter)
        if self.results_dir and is_of_run(self.results_dir):
            yield f"--results_dir {self.results_dir} is the folder of a run, whose own results stay; name another"


def main(argv: Sequence[str] | None = None) -> int:
    join_slurm_step()
    return run_command(PROG, lambda: _evaluate(sys.argv[1:] if argv is None else argv))


def _evaluate(argv: Sequence[str]) -> int:
    named = peek(argv, "adapter")
    on_hub = named is not None and is_hub_id(named) and not asks_for_help(argv)
    folder = local_copy(str(named), peek(argv, "cache_dir")) if on_hub else str(named)
    refuse_trained_options(argv)
    refuse_without_effect(argv, TRAINING_DATA, "no questions to train on are read here")
    of_run = for_data_of(options_of_run(folder) if on_hub else base_options(named), argv)
    if peek(argv, "results_dir") is None:
        of_run = {name: value for name, value in of_run.items() if name != "gather"}
    config, options = parse(
        argv,
        prog=PROG,
        description=__doc__ or "",
        groups=("data", "model", "evaluation"),
        entry=EvaluateConfig,
        base=of_run,
    )
    require_named(options.adapter, argv, "adapter")
    if config.evaluation.gather == "logits" and not options.results_dir:
        raise ConfigError(["--gather logits keeps all logits in a file; say where with --results_dir"])
    # DeepSpeed, where it is installed, greets on standard output, which belongs to the metrics.
    with contextlib.redirect_stdout(sys.stderr):
        from qa_dist.common.files import make_writable
        from qa_dist.evaluation.trained import evaluate_trained

    config = as_tuned(config, folder)
    directory = Path(options.results_dir) if options.results_dir else None
    evaluate_trained(
        config,
        folder,
        prog=PROG,
        prepare=lambda: make_writable(directory, "--results_dir") if directory is not None else None,
        conclude=lambda evaluation, questions: _report(
            evaluation, directory, _threshold_note(config, folder, questions)
        ),
        logits_path=directory / "logits.npy" if directory else None,
    )
    return 0


def _threshold_note(config: RunConfig, folder: str, questions: "Questions") -> str | None:
    """A sentence on the threshold that was tuned for the model, if answers were chosen by it."""
    from qa_dist.model.calibration import read_calibration

    found = read_calibration(folder)
    threshold = None if found is None else found.null_score_diff_threshold
    if found is None or threshold is None or threshold != config.evaluation.null_threshold or not questions.version_2:
        return None
    flatters = ""
    if found.tuned_on.get("fingerprint") == questions.store.fingerprint:
        flatters = ": these questions, so the scores flatter"
    return (
        f"answers are chosen by the null threshold {threshold:.6g} that was tuned on {found.origin}{flatters}; "
        "--null_score_diff_threshold 0 is without"
    )


def _report(evaluation: "Evaluation", directory: Path | None, note: str | None) -> None:
    """Write the results into a folder, if there is one, and print the metrics; a note goes before them."""
    from qa_dist.evaluation.results import write_results

    if directory is not None:
        write_results(evaluation, directory)
    if note is not None:
        sys.stderr.write(f"{PROG}: note: {note}\n")
    if not evaluation.is_scored:
        what = "the predictions are written" if directory else "give --results_dir to keep the predictions"
        sys.stderr.write(f"{PROG}: note: no answers of the data are known, so nothing is scored; {what}\n")
    sys.stdout.write(json.dumps(evaluation.named_metrics, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
