"""What scores on a store can reach at best, and how much of its text the tokenizer knows: computed once, and in words.

Both are kept in `limits.json` in the store's folder. A store without the file, or with one that cannot be used, has
them computed again; where the folder cannot be written, each time.
"""

import contextlib
import dataclasses
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_dist.common.files import staged
from qa_dist.config.options import EvaluationConfig
from qa_dist.evaluation.ceiling import REASONS, Ceiling, ceiling
from qa_dist.evaluation.normalization import normalization, unfit_note
from qa_dist.features.store import FeatureStore

FILE = "limits.json"

VERSION = 1
"""Changes with whatever in this program decides what the file says."""

MIN_CEILING = 99.0
MAX_UNKNOWN = 0.01
"""Below the first, in percent of EM or F1, and above the second, as a share of the context tokens, there is a warning.
SQuAD with BERT's tokenizer has a ceiling above 99, and next to no unknown tokens."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What scores on a store are limited by.

    Attributes:
        unknown_token_share: share of the unknown token among the context tokens of all features, from 0 to 1.
        ceiling: the best scores; None where no answers are known.
    """

    unknown_token_share: float
    ceiling: Ceiling | None


def unknown_token(tokenizer: Any) -> str | None:
    """What a tokenizer puts for text that it does not know; None if it has no such token.

    Where its files do not name it, it is what its model (of the `tokenizers` library) has.
    """
    named: str | None = tokenizer.unk_token or getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
    return named


def unknown_token_share(store: FeatureStore, tokenizer: Any) -> float:
    """Share of the tokenizer's unknown token among the context tokens of all features; 0 if it has none."""
    token_id = tokenizer.get_vocab().get(unknown_token(tokenizer))
    return 0.0 if token_id is None else store.context_share(token_id)


def limits(store: FeatureStore, tokenizer: Any, config: EvaluationConfig, *, version_2: bool) -> Limits:
    """The limits of scores on a store, from its folder, or computed and kept there.

    Args:
        store: The examples and their features.
        tokenizer: What made them.
        config: Its `answer_normalization` and `max_answer_length` are used.
        version_2: Whether the null answer is a choice.
    """
    if (known := kept_limits(store.path, config, version_2=version_2)) is not None:
        return known
    kept = _read(store.path / FILE)
    computed = Limits(
        unknown_token_share(store, tokenizer),
        ceiling(
            store,
            normalization(config.answer_normalization),
            max_answer_length=config.max_answer_length,
            version_2=version_2,
        ),
    )
    described = None if computed.ceiling is None else dataclasses.asdict(computed.ceiling)
    ceilings = kept.get("ceilings")
    _write(
        store.path / FILE,
        {
            "version": VERSION,
            "unknown_token_share": computed.unknown_token_share,
            "ceilings": {**(ceilings if isinstance(ceilings, dict) else {}), _key(config, version_2): described},
        },
    )
    return computed


def kept_limits(folder: Path, config: EvaluationConfig, *, version_2: bool) -> Limits | None:
    """The limits that the folder of a store keeps, as for `limits`; None if they were not computed yet."""
    kept = _read(folder / FILE)
    with contextlib.suppress(KeyError, TypeError, ValueError):
        found = kept["ceilings"][_key(config, version_2)]
        return Limits(float(kept["unknown_token_share"]), None if found is None else Ceiling(**found))
    return None


def _key(config: EvaluationConfig, version_2: bool) -> str:
    """What the file calls the ceiling for these options."""
    return f"{config.answer_normalization} {config.max_answer_length} {'v2' if version_2 else 'v1'}"


def limit_lines(store: FeatureStore, tokenizer: Any, config: EvaluationConfig, *, version_2: bool) -> Iterator[str]:
    """The limits of scores on the validation data as sentences: one, and warnings where there is reason to."""
    found = limits(store, tokenizer, config, version_2=version_2)
    unknown = (
        f"{100 * found.unknown_token_share:.2f} % of the context tokens are {unknown_token(tokenizer) or 'unknown'}"
    )
    best = found.ceiling
    if best is None:
        yield f"validation: {unknown}"
    else:
        yield (
            f"validation: at best EM {best.exact_match:.2f}, F1 {best.f1:.2f} with this tokenizer, --max_seq_length, "
            f"--doc_stride and --max_answer_length {config.max_answer_length}; {unknown}"
        )
    if found.unknown_token_share > MAX_UNKNOWN:
        yield f"warning: {unknown}: the tokenizer does not know this text; choose a model of its language"
    # A reference without a word, which a blank one is, can be matched and has no F1 in v1.1.
    if best is not None and best.out_of_reach and min(best.exact_match, best.f1) < MIN_CEILING:
        counts = ", ".join(f"{count:,} {REASONS[reason]}" for reason, count in best.out_of_reach.items())
        total = sum(best.out_of_reach.values())
        yield (
            f"warning: {total:,} of {best.num_examples:,} questions cannot be answered exactly by any model, as their "
            f"reference answers: {counts}"
        )
    if best is not None and best.num_unsearched:
        yield f"note: {unsearched_note(best.num_unsearched, best.num_examples)}"
    references = (store.answer_texts(index) for index in range(store.num_examples))
    if (note := unfit_note(references, normalization(config.answer_normalization))) is not None:
        yield f"note: {note}"


def unsearched_note(num_unsearched: int, num_examples: int) -> str:
    """What to say of best scores of which some questions were not searched for want of a budget."""
    return (
        f"{num_unsearched:,} of {num_examples:,} questions were not searched for their best answer, which would take "
        "long, and count as answered exactly: the best scores are no more than a bound"
    )


def _read(path: Path) -> dict[str, Any]:
    """What the file holds; nothing if it is not there or not of this version."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) and value.get("version") == VERSION else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    # Several programs may do this at once: each under its own name, the last one stays. Whoever may not write there
    # computes it again, which takes seconds.
    with (
        contextlib.suppress(OSError),
        staged(path, aside=path.with_name(f".{path.name}.{secrets.token_hex(4)}")) as aside,
    ):
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
