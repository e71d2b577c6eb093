"""The parts of a run as calls from Python, one after the other in this process: what a notebook does.

`qa_dist` has them under their names; a command does all of it at once, on any number of ranks.
"""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qa_dist.answering.opening import configuration_of
from qa_dist.common.errors import ConfigError
from qa_dist.common.notebook import named_as_in_python
from qa_dist.config.options import RunConfig
from qa_dist.data.folders import Split
from qa_dist.data.sources import require_split, subset
from qa_dist.distributed.lora_choice import group_for_evaluation
from qa_dist.distributed.ranks import Ranks
from qa_dist.evaluation import loop as evaluation_loop
from qa_dist.evaluation.normalization import normalization
from qa_dist.evaluation.results import Evaluation
from qa_dist.evaluation.trained import ranks_of
from qa_dist.features.building import may_lack_answers, prepare_store
from qa_dist.features.store import FeatureStore
from qa_dist.machine.cuda_environment import prepare_cuda
from qa_dist.model.building import meta_parameter_report
from qa_dist.model.folder import load_tokenizer_of
from qa_dist.model.hub import is_hub_id, local_copy
from qa_dist.model.pretrained import load_tokenizer
from qa_dist.model.saved import load_as_trained
from qa_dist.model.span_model import SpanModel
from qa_dist.model.trainable import ParameterReport, check_vocabulary
from qa_dist.training import inputs
from qa_dist.training.loop import train
from qa_dist.training.start import build_trainable


def load_data(config: RunConfig) -> inputs.RunData:
    """The features of both splits with their tokenizer, prepared first where they are not.

    Raises:
        UserError: The data cannot be used, or not with this model.
    """
    with named_as_in_python():
        return inputs.load_data(config)


def count_parameters(config: RunConfig) -> ParameterReport:
    """What of the model would be trained, before and after adapters are added; no weights are read or made.

    Raises:
        UserError: There is no such model, or an option does not fit it.
    """
    with named_as_in_python():
        return meta_parameter_report(config.model, max_seq_length=config.data.max_seq_length)


def build_model(config: RunConfig) -> SpanModel:
    """The model as training would start with it, on the first GPU or the CPU.

    Raises:
        UserError: The model cannot be loaded, or an option does not fit it.
    """
    with named_as_in_python():
        ranks = Ranks(mixed_precision=config.training.mixed_precision)
        pads_left = load_tokenizer(config.model).padding_side == "left"
        model, _ = build_trainable(config, ranks, None, tokenizer_pads_left=pads_left)
        return model.to(ranks.device)


def train_model(config: RunConfig) -> Evaluation | None:
    """Train as `qa-dist train` does in one process; what is said goes to standard error, with a bar over the steps.

    Ctrl-C, or a notebook's stop button, ends it at once: `resume_from_checkpoint="auto"` then goes on from the last
    checkpoint.

    Returns:
        The evaluation of the weights that the run ended with, None without validation data. All files are in the
        folder `output_dir`.

    Raises:
        UserError: The configuration, the data or the checkpoint cannot be used.
    """
    with named_as_in_python():
        if config.training.output_dir is None:
            raise ConfigError(["--output_dir is missing; give the folder for the adapter, the metrics and all else"])
        prepare_cuda(os.environ, deterministic=config.training.deterministic)
        with _settings_kept():
            return train(config)


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Context behind which torch is set as before: other calls of the process have options of their own."""
    products = torch.get_float32_matmul_precision()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.use_deterministic_algorithms(is_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def evaluate_model(
    model: SpanModel | str | os.PathLike[str],
    config: RunConfig | None = None,
    *,
    split: Split = "validation",
    loss_only: bool = False,
) -> Evaluation:
    """Answers and official scores of a model on a split, in this process.

    Args:
        model: What `build_model` gave, or the folder or hub id of a trained adapter or model.
        config: Data, lengths and decoding; None: those of the run that wrote the folder, with the null threshold that
            was tuned for the model, if one was.
        split: The questions.
        loss_only: Compute only the loss, on `max_eval_features` features where the configuration has that number, as
            evaluations during training do.

    Raises:
        UserError: Data or model cannot be used, or do not belong together.
    """
    with named_as_in_python(), _settings_kept():
        if not isinstance(model, SpanModel) and is_hub_id(os.fspath(model)):
            model = local_copy(os.fspath(model), None if config is None else config.model.cache_dir)
        if config is None:
            if isinstance(model, SpanModel):
                raise ConfigError(["config is missing; give the configuration that the model was built with"])
            config = configuration_of(os.fspath(model), {})
            # The run's own evaluation kept its logits in a file; this one has none.
            evaluation = dataclasses.replace(config.evaluation, gather="candidates")
            config = dataclasses.replace(config, evaluation=evaluation)
        normalization(config.evaluation.answer_normalization)
        ranks = ranks_of(config)
        loaded, store = _opened(model, config, split, ranks)
        if loss_only:
            limit = config.data.max_eval_features
            features = subset(store.num_features, limit, config.data.subset_seed)
            return evaluation_loop.evaluate_loss(loaded, store, ranks, config.evaluation, features)
        if config.evaluation.gather == "logits":
            raise ConfigError(["--gather logits keeps a file; qa-dist evaluate does that, leave it out here"])
        with evaluation_loop.evaluation_bar(shown=not config.training.disable_tqdm) as advance:
            return evaluation_loop.evaluate(
                loaded,
                store,
                ranks,
                config.evaluation,
                version_2=may_lack_answers(config.data, [store]),
                advance=advance,
            )


def _opened(
    model: SpanModel | str | os.PathLike[str], config: RunConfig, split: Split, ranks: Ranks
) -> tuple[SpanModel, FeatureStore]:
    """The model, loaded and on its device, and the features that it is evaluated on."""
    require_split(config.data, split)
    if isinstance(model, SpanModel):
        tokenizer, loaded = load_tokenizer(config.model), model
    else:
        folder = os.path.expanduser(os.fspath(model))
        if not Path(folder).is_dir() and not is_hub_id(folder):
            raise ConfigError([f"{folder} is not a folder; give the output_dir of a training run"])
        tokenizer, _ = load_tokenizer_of(folder, config.model)
        loaded = load_as_trained(config, folder, tokenizer, ranks.device)
    store = prepare_store(config, split, tokenizer=tokenizer, progress=True)
    check_vocabulary(loaded, store.largest_token_id)
    loaded = loaded.to(ranks.device)
    if loaded is not model:
        group_for_evaluation(config, ranks, loaded)
    return loaded, store
