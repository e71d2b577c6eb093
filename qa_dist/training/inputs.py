"""What a run computes on: the feature stores of both splits, and the tokenizer that made them."""

from dataclasses import dataclass
from typing import Any

from qa_dist.common.errors import DataError
from qa_dist.config.options import RunConfig
from qa_dist.data.sources import available_splits
from qa_dist.distributed.ranks import Ranks
from qa_dist.features.building import prepare_store
from qa_dist.features.store import FeatureStore
from qa_dist.model.pretrained import load_tokenizer


@dataclass(frozen=True, slots=True)
class RunData:
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

    @property
    def stores(self) -> dict[str, FeatureStore]:
        """The stores that there are, by split."""
        return {"train": self.train} | ({"validation": self.validation} if self.validation else {})


def load_data(config: RunConfig, ranks: Ranks) -> RunData:
    """The feature stores of both splits: built once on each machine, mapped by all its ranks.

    Raises:
        UserError: The data cannot be used.
    """
    with ranks.local_main_first():
        tokenizer = load_tokenizer(config.model)
        splits = available_splits(config.data)
        if "train" not in splits:
            raise DataError(
                "there is no training data; give --train_file, or --dataset_name of a set with a train split"
            )
        stores = {split: prepare_store(config, split, tokenizer=tokenizer, progress=ranks.is_main) for split in splits}
    train, validation = stores["train"], stores.get("validation")
    if validation is None and (config.training.eval_steps != "no" or config.training.eval_on_start):
        raise DataError(
            "there is no validation data to evaluate on during training; give --validation_file, or --eval_steps no"
        )
    unanswerable = train.num_unanswerable + (validation.num_unanswerable if validation else 0)
    wanted = config.data.version_2_with_negative
    return RunData(train, validation, tokenizer, bool(unanswerable) if wanted is None else wanted)
