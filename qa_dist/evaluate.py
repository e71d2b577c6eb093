"""Score a trained model: `python -m qa_dist.evaluate --adapter DIR`, or through accelerate launch or torchrun.

Without further options it repeats the evaluation that the training run ended with.
"""

import contextlib
import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qa_dist.common.command import run_command
from qa_dist.common.errors import ConfigError
from qa_dist.config.options import RunConfig, option
from qa_dist.config.parsing import parse, peek
from qa_dist.model.folder import adapter_problems, base_options, load_tokenizer_of

if TYPE_CHECKING:
    from qa_dist.evaluation.results import Evaluation

PROG = "qa_dist.evaluate"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """What is evaluated, and where the results go."""

    adapter: str | None = option(
        None, "folder that training wrote: an adapter in peft's format, or a whole model", required=True
    )
    results_dir: str | None = option(
        None, "folder for metrics.json, predictions.json and the rest; none: print the metrics only"
    )

    def problems(self) -> Iterable[str]:
        yield from adapter_problems(self.adapter)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(PROG, lambda: _evaluate(sys.argv[1:] if argv is None else argv))


def _evaluate(argv: Sequence[str]) -> int:
    config, options = parse(
        argv,
        prog=PROG,
        description=__doc__ or "",
        groups=("data", "model", "evaluation"),
        entry=EvaluateConfig,
        base=base_options(peek(argv, "adapter")),
    )
    if config.evaluation.gather == "logits" and not options.results_dir:
        raise ConfigError(["--gather logits keeps all logits in a file; say where with --results_dir"])
    with _ended_in_order():
        return _evaluate_on_ranks(config, options)


def _evaluate_on_ranks(config: RunConfig, options: EvaluateConfig) -> int:
    """Evaluate as configured, with whatever ranks a launcher started."""
    # DeepSpeed, where it is installed, greets on standard output, which belongs to the metrics.
    with contextlib.redirect_stdout(sys.stderr):
        from qa_dist.common.files import make_writable
        from qa_dist.distributed.failures import failures_named
        from qa_dist.distributed.ranks import Ranks
        from qa_dist.evaluation.limits import limit_lines
        from qa_dist.evaluation.loop import evaluate, evaluation_bar
        from qa_dist.evaluation.normalization import normalization
        from qa_dist.features.building import may_lack_answers, prepare_store
        from qa_dist.model.saved import load_trained
        from qa_dist.model.trainable import check_vocabulary

    directory = Path(options.results_dir) if options.results_dir else None
    normalization(config.evaluation.answer_normalization)
    with failures_named():
        ranks = Ranks(mixed_precision=config.training.mixed_precision, timeout_seconds=config.training.ddp_timeout)
        if directory is not None and ranks.is_main:
            make_writable(directory, "--results_dir")
        _require_known_model(config, str(options.adapter))
        with ranks.local_main_first():
            tokenizer, notes = load_tokenizer_of(str(options.adapter), config.model)
            store = prepare_store(config, "validation", tokenizer=tokenizer, progress=ranks.is_main)
        model = load_trained(
            config.model,
            str(options.adapter),
            max_seq_length=config.data.max_seq_length,
            tokenizer_pads_left=tokenizer.padding_side == "left",
            device=ranks.device,
        ).to(ranks.device)
        check_vocabulary(model, store.largest_token_id)
        version_2 = may_lack_answers(config.data, [store])
        if ranks.is_main:
            lines = limit_lines(store, tokenizer, config.evaluation, version_2=version_2)
            sys.stderr.writelines(f"{PROG}: {line}\n" for line in (*notes, *lines))
        with evaluation_bar(shown=ranks.is_main) as advance:
            evaluation = evaluate(
                model,
                store,
                ranks,
                config.evaluation,
                version_2=version_2,
                logits_path=directory / "logits.npy" if directory else None,
                advance=advance,
            )
        if ranks.is_main:
            _report(evaluation, directory)
        ranks.close()
    return 0


def _require_known_model(config: RunConfig, folder: str) -> None:
    """Refuse a model that cannot be computed here before its data is prepared."""
    from qa_dist.model.families import require_trainable
    from qa_dist.model.pretrained import model_configuration

    name = folder if config.model.tuning == "full" else config.model.model_name_or_path
    model = replace(config.model, model_name_or_path=name, model_config=None)
    require_trainable(model_configuration(model), config.training.mixed_precision)


def _report(evaluation: "Evaluation", directory: Path | None) -> None:
    """Write the results into a folder, if there is one, and print the metrics."""
    from qa_dist.evaluation.results import write_results

    if directory is not None:
        write_results(evaluation, directory)
    if not evaluation.is_scored:
        what = "the predictions are written" if directory else "give --results_dir to keep the predictions"
        sys.stderr.write(f"{PROG}: note: no answers of the data are known, so nothing is scored; {what}\n")
    sys.stdout.write(json.dumps(evaluation.named_metrics, indent=2) + "\n")


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM, by which launchers end the other ranks of one that failed, remove what is half written."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
