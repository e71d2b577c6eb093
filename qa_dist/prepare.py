"""Build the feature stores of a data set, once: `python -m qa_dist.prepare --train_file train.json ...`.

Training does the same when it needs to; this does it ahead of time, on a machine without a GPU, say. What is there
already is verified and kept. Prints one JSON object: `num_examples`, `num_features`, `mean_tokens`, `fingerprint`,
`seconds` and a few more, of the training split where there is one; `splits` holds the same for each split by name.
`unknown_token_share` is that of the tokenizer's unknown token among the context tokens, and `ceiling` of the validation
data the best scores that any model could reach with these features, --max_answer_length and --answer_normalization.
"""

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qa_dist.common import command
from qa_dist.common.errors import UserError
from qa_dist.config.options import ModelConfig, RunConfig
from qa_dist.config.parsing import parse
from qa_dist.model.families import require_trainable
from qa_dist.model.pretrained import load_tokenizer, model_configuration

if TYPE_CHECKING:
    from qa_dist.features.store import FeatureStore

PROG = "qa_dist.prepare"


def main(argv: Sequence[str] | None = None) -> int:
    return command.run_command(PROG, lambda: _prepare(sys.argv[1:] if argv is None else argv))


def _prepare(argv: Sequence[str]) -> int:
    config, _ = parse(argv, prog=PROG, description=__doc__ or "", groups=("data", "model", "evaluation"), entry=None)
    sys.stdout.write(json.dumps(prepare(config), indent=2) + "\n")
    return 0


def prepare(config: RunConfig) -> dict[str, Any]:
    """What `main` prints, after building the store of every split that the source has.

    Raises:
        UserError: Data, tokenizer or lengths cannot be used, or the stores cannot be written.
    """
    from qa_dist.data.sources import available_splits
    from qa_dist.evaluation.limits import unknown_token_share
    from qa_dist.evaluation.normalization import normalization
    from qa_dist.features.building import prepare_store

    normalization(config.evaluation.answer_normalization)

    # In this order: a wrong path is said before a model is looked for, and packages for a tokenizer are not asked for
    # if the model is refused.
    names = available_splits(config.data)
    _refuse_what_is_not_trained(config.model)
    tokenizer = load_tokenizer(config.model)
    splits: dict[str, dict[str, Any]] = {}
    stores: dict[str, FeatureStore] = {}
    for split in names:
        started = time.perf_counter()
        store = stores[split] = prepare_store(config, split, tokenizer=tokenizer, progress=True)
        splits[split] = {
            "num_examples": store.num_examples,
            "num_features": store.num_features,
            "mean_tokens": round(store.stats.mean_tokens, 2),
            "fingerprint": store.fingerprint,
            "seconds": round(time.perf_counter() - started, 3),
            "path": str(store.path),
            "num_unanswerable": store.num_unanswerable,
            "num_truncated_questions": store.stats.num_truncated_questions,
            "num_unlabelled_examples": store.stats.num_unlabelled_examples,
            "num_mended": store.report.num_mended,
            "num_dropped": store.report.num_invalid,
            "num_without_references": store.report.num_without_references,
            "num_without_place": store.report.num_without_place,
            "unknown_token_share": round(unknown_token_share(store, tokenizer), 6),
        }
    if "validation" in stores:
        splits["validation"] |= _reachable(config, stores, tokenizer)
    first = next(iter(splits))
    best = {name: value for name, value in splits.get("validation", {}).items() if name == "ceiling"}
    return {"split": first, **splits[first], **best, "splits": splits}


def _refuse_what_is_not_trained(model: ModelConfig) -> None:
    """Refuse to make features for a model that cannot be trained on them, where its configuration is at hand.

    Raises:
        ConfigError: The message says why.
    """
    model_config = None
    # A tokenizer alone is enough to prepare data.
    with contextlib.suppress(UserError):
        model_config = model_configuration(model)
    if model_config is not None:
        require_trainable(model_config)


def _reachable(config: RunConfig, stores: Mapping[str, "FeatureStore"], tokenizer: Any) -> dict[str, Any]:
    """`ceiling` of the validation data, and how many questions no model can answer exactly, by reason."""
    from qa_dist.evaluation.limits import limits
    from qa_dist.features.building import may_lack_answers

    version_2 = may_lack_answers(config.data, stores.values())
    best = limits(stores["validation"], tokenizer, config.evaluation, version_2=version_2).ceiling
    if best is None:
        return {}
    unsearched = {"num_unsearched": best.num_unsearched} if best.num_unsearched else {}
    return {"ceiling": {"exact_match": best.exact_match, "f1": best.f1}, "out_of_reach": best.out_of_reach} | unsearched


if __name__ == "__main__":
    sys.exit(main())
