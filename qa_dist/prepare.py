"""Build the feature stores of a data set, once: `python -m qa_dist.prepare --train_file train.json ...`.

Training does the same when it needs to; this does it ahead of time, on a machine without a GPU, say. What is there
already is verified and kept. Prints one JSON object: `num_examples`, `num_features`, `mean_tokens`, `fingerprint`,
`seconds` and a few more, of the training split where there is one; `splits` holds the same for each split by name.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from qa_dist.common import command
from qa_dist.config.options import RunConfig
from qa_dist.config.parsing import parse
from qa_dist.model.pretrained import load_tokenizer

PROG = "qa_dist.prepare"


def main(argv: Sequence[str] | None = None) -> int:
    return command.run_command(PROG, lambda: _prepare(sys.argv[1:] if argv is None else argv))


def _prepare(argv: Sequence[str]) -> int:
    config, _ = parse(argv, prog=PROG, description=__doc__ or "", groups=("data", "model"), entry=None)
    sys.stdout.write(json.dumps(prepare(config), indent=2) + "\n")
    return 0


def prepare(config: RunConfig) -> dict[str, Any]:
    """What `main` prints, after building the store of every split that the source has.

    Raises:
        UserError: Data, tokenizer or lengths cannot be used, or the stores cannot be written.
    """
    from qa_dist.data.sources import available_splits
    from qa_dist.features.building import prepare_store

    # In this order: a wrong path is said before a tokenizer is looked for.
    names = available_splits(config.data)
    tokenizer = load_tokenizer(config.model)
    splits: dict[str, dict[str, Any]] = {}
    for split in names:
        started = time.perf_counter()
        store = prepare_store(config, split, tokenizer=tokenizer, progress=True)
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
        }
    first = next(iter(splits))
    return {"split": first, **splits[first], "splits": splits}


if __name__ == "__main__":
    sys.exit(main())
