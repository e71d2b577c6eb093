"""What a run computes on: the feature stores of both splits, and the tokenizer that made them."""

import contextlib
from dataclasses import dataclass
from typing import Any

from qa_dist.common.columns import aligned
from qa_dist.common.errors import ConfigError, DataError
from qa_dist.common.notebook import ShownAsText
from qa_dist.config.options import DataConfig, RunConfig
from qa_dist.data.sources import subset, training_splits
from qa_dist.distributed.ranks import Ranks
from qa_dist.evaluation.limits import limit_lines
from qa_dist.evaluation.tuning import require_enough
from qa_dist.features.building import may_lack_answers, prepare_store
from qa_dist.features.store import FeatureStore
from qa_dist.model.families import require_trainable
from qa_dist.model.initial import require_fitting_adapter, require_its_tokenizer
from qa_dist.model.pretrained import load_tokenizer, model_configuration


@dataclass(frozen=True, slots=True)
class RunData(ShownAsText):
    """The features of a run.

    Attributes:
        train: features to train on.
        validation: features to evaluate on; None if the source has none.
        tokenizer: what made them.
        version_2: whether questions may have no answer.
    """

    train: FeatureStore
    validation: FeatureStore | None
    tokenizer: Any
    version_2: bool

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("", "examples", "unanswerable", "features", "mean tokens")]
        for split, store in self.stores.items():
            counts = (store.num_examples, store.num_unanswerable, store.num_features)
            rows.append((split, *(f"{count:,}" for count in counts), f"{store.lengths.mean():.1f}"))
        return "\n".join(aligned(rows, left=(0,)))

    @property
    def is_validation_scored(self) -> bool:
        """Whether there are validation data with at least one question whose answers are known."""
        return self.validation is not None and bool(self.validation.has_references.any())

    @property
    def stores(self) -> dict[str, FeatureStore]:
        """The stores that there are, by split."""
        return {"train": self.train} | ({"validation": self.validation} if self.validation else {})

    def tuning_problem(self, config: RunConfig) -> str | None:
        """Why a run skips the tuning that `--tune_on` asks for; None if it tunes, or nothing asks for it."""
        part, is_chosen = config.training.tune_on, config.evaluation.null_score_diff_threshold is not None
        if part == "no" or self.validation is None or not self.is_validation_scored:
            return None
        try:
            require_enough(self.validation, part, version_2=self.version_2 and not is_chosen)
        except DataError as error:
            return str(error)
        return None

    def limit_lines(self, config: RunConfig) -> list[str]:
        """What scores on the validation data can reach at best, as sentences; none without such data."""
        if self.validation is None:
            return []
        return list(limit_lines(self.validation, self.tokenizer, config.evaluation, version_2=self.version_2))


def load_data(config: RunConfig, ranks: Ranks | None = None) -> RunData:
    """The feature stores of both splits: built once on each machine, mapped by all its ranks; None: there is only this.

    Raises:
        UserError: The data cannot be used, or not with this model.
    """
    with contextlib.nullcontext() if ranks is None else ranks.local_main_first():
        # A wrong path is said before a model is looked for.
        training = config.training
        splits = training_splits(config.data, evaluates=training.evaluates_before_end)
        # Before packages are asked for and features made for a model that cannot be trained on them.
        require_trainable(model_configuration(config.model), training.mixed_precision)
        require_fitting_adapter(config.model)
        tokenizer = load_tokenizer(config.model)
        require_its_tokenizer(config.model, tokenizer)
        is_main = ranks is None or ranks.is_main
        stores = {split: prepare_store(config, split, tokenizer=tokenizer, progress=is_main) for split in splits}
    train, validation = stores["train"], stores.get("validation")
    _require_answers(config.data, train)
    if validation is not None:
        _require_scorable(config, validation)
    return RunData(train, validation, tokenizer, may_lack_answers(config.data, stores.values()))


def _require_answers(data: DataConfig, train: FeatureStore) -> None:
    """Make sure that there is an answer to learn, unless the user says that there is none.

    Raises:
        DataError: No window of the training data holds one.
    """
    num_cut, num_without = train.stats.num_unlabelled_examples, train.num_unanswerable
    if num_cut + num_without < train.num_examples or (not num_cut and data.version_2_with_negative):
        return
    raise DataError(
        f"no window of the training data holds an answer: of {train.num_examples:,} questions {num_without:,} have an "
        f"empty list of answers and {num_cut:,} have answers longer than a window; check the file, or raise "
        "--max_seq_length; if questions without answers are all that is to be learnt, give --version_2_with_negative "
        "true"
    )


def _require_scorable(config: RunConfig, validation: FeatureStore) -> None:
    """Make sure that the validation data can do what the options want of it.

    Raises:
        DataError: They cannot.
        ConfigError: An option would have no effect.
    """
    training = config.training
    is_scored, is_labelled = bool(validation.has_references.any()), bool(validation.is_labelled.any())
    wanted = []
    if not is_scored:
        wanted = [
            ("--early_stopping_patience", training.early_stopping_patience is not None),
            ("--eval_on_start", training.eval_on_start),
            (f"--eval_steps {training.eval_steps}", training.eval_steps not in ("epoch", "no")),
        ]
    if not is_labelled:
        wanted += [
            ("--max_eval_features", config.data.max_eval_features is not None),
            ("--metric_for_best_model loss", training.metric_for_best_model == "loss"),
        ]
    if unmet := [option for option, is_wanted in wanted if is_wanted]:
        lacks = "no question whose answer has a place in its context" if is_scored else "no question with known answers"
        raise DataError(
            f"the validation data have {lacks}, so {' and '.join(unmet)} cannot be done; leave it out, or give "
            "--validation_file with answers"
        )
    if (limit := config.data.max_eval_features) is None:
        return
    if training.eval_steps == "no" and not training.eval_on_start:
        raise ConfigError(
            [f"--max_eval_features {limit} is for evaluations during training, and --eval_steps is no; drop one"]
        )
    if training.metric_for_best_model == "exact_match":
        raise ConfigError(
            [
                f"--max_eval_features {limit} has the loss alone evaluated during training, and "
                "--metric_for_best_model is exact_match; drop one, or compare by the loss"
            ]
        )
    chosen = subset(validation.num_features, limit, config.data.subset_seed)
    if not validation.is_labelled[chosen].any():
        raise DataError(
            f"none of the features that --max_eval_features {limit} chooses has a question whose answer has a place in "
            "its context, so no loss can be computed; raise it, leave it out, or choose others with --subset_seed"
        )
