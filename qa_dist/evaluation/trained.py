"""The evaluation of a trained model in its folder, by whatever ranks a launcher started."""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from qa_dist.config.options import RunConfig
from qa_dist.distributed.failures import failures_named
from qa_dist.distributed.lora_choice import group_for_evaluation
from qa_dist.distributed.ranks import Ranks
from qa_dist.evaluation.graph_passes import choose_evaluation_graphs
from qa_dist.evaluation.limits import limit_lines
from qa_dist.evaluation.loop import evaluate, evaluation_bar
from qa_dist.evaluation.normalization import normalization
from qa_dist.evaluation.results import Evaluation
from qa_dist.features.building import may_lack_answers, prepare_store
from qa_dist.features.store import FeatureStore
from qa_dist.model.families import require_trainable
from qa_dist.model.folder import load_tokenizer_of
from qa_dist.model.precision import precision_notes
from qa_dist.model.pretrained import model_configuration
from qa_dist.model.saved import load_as_trained, require_kept_base
from qa_dist.model.trainable import check_vocabulary


class Questions(NamedTuple):
    """What a model is evaluated on.

    Attributes:
        store: The questions.
        version_2: Whether the null answer is a choice.
    """

    store: FeatureStore
    version_2: bool


def evaluate_trained(
    config: RunConfig,
    folder: str,
    *,
    prog: str,
    conclude: Callable[[Evaluation, Questions], object],
    look: Callable[[Questions], object] = lambda questions: None,
    prepare: Callable[[], object] = lambda: None,
    logits_path: Path | None = None,
) -> None:
    """Evaluate the model in a folder on the validation data.

    Args:
        config: The options of its run, with what is to be otherwise.
        folder: The model's folder.
        prog: What notes on standard error begin with.
        conclude: What rank 0 does with the result.
        look: What every rank does before the model is loaded; it may refuse the questions.
        prepare: What rank 0 does before anything else.
        logits_path: Where `--gather logits` keeps them.

    Raises:
        UserError: The model or the data cannot be used.
    """

    def notice(*lines: str) -> None:
        sys.stderr.writelines(f"{prog}: {line}\n" for line in lines)

    normalization(config.evaluation.answer_normalization)
    with _ended_in_order(), failures_named():
        ranks = ranks_of(config)
        if ranks.is_main:
            prepare()
        _require_known_model(config, folder)
        with ranks.local_main_first():
            tokenizer, notes = load_tokenizer_of(folder, config.model)
            store = prepare_store(config, "validation", tokenizer=tokenizer, progress=ranks.is_main)
        questions = Questions(store, may_lack_answers(config.data, [store]))
        look(questions)
        model = load_as_trained(config, folder, tokenizer, ranks.device)
        check_vocabulary(model, store.largest_token_id)
        group_for_evaluation(config, ranks, model, notice)
        if ranks.is_main:
            limits = limit_lines(store, tokenizer, config.evaluation, version_2=questions.version_2)
            notice(*notes, *limits, *_precision_lines(ranks))
        graphs = choose_evaluation_graphs(config, ranks, model, notice)
        with evaluation_bar(shown=ranks.is_main and not config.training.disable_tqdm) as advance:
            evaluation = evaluate(
                model,
                store,
                ranks,
                config.evaluation,
                version_2=questions.version_2,
                graphs=graphs,
                logits_path=logits_path,
                advance=advance,
            )
        if ranks.is_main:
            conclude(evaluation, questions)
        ranks.close()


def ranks_of(config: RunConfig) -> Ranks:
    """The processes of an evaluation, which compute products as the run's did where the device has such."""
    ranks = Ranks(mixed_precision=config.training.mixed_precision, timeout_seconds=config.training.ddp_timeout)
    if config.training.tf32 and ranks.device.type == "cuda":
        ranks.use_tf32()
    return ranks


def _precision_lines(ranks: Ranks) -> list[str]:
    """What is said about the precision of the evaluation on this device."""
    return [f"note: {note}" for note in precision_notes(ranks.device.type, ranks.mixed_precision)]


def _require_known_model(config: RunConfig, folder: str) -> None:
    """Refuse a model that cannot be computed here before its data is prepared."""
    require_kept_base(config.model, folder)
    name = folder if config.model.tuning == "full" else config.model.model_name_or_path
    model = dataclasses.replace(config.model, model_name_or_path=name, model_config=None)
    require_trainable(model_configuration(model), config.training.mixed_precision)


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM, by which launchers end the other ranks of one that failed, remove what is half written."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
