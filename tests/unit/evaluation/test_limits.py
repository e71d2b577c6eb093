"""What scores on a store are limited by: computed once, kept beside the features, and said."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from qa_dist.config.options import EvaluationConfig
from qa_dist.evaluation import ceiling
from qa_dist.evaluation import limits as module
from qa_dist.evaluation.limits import FILE, Limits, limit_lines, limits, unknown_token, unknown_token_share
from qa_dist.features.store import FeatureStore
from tests.tiny import tiny_tokenizer
from tests.unit.data_fixtures import byte_tokenizer, prepared, row, run_config, save_tokenizer, write_rows

TOKENIZER = tiny_tokenizer(words=("mora", "lies", "on", "a", "lake", "is", "deep"))
LONG = "on a lake. The lake is deep"
ROWS = [
    row("exact"),
    row("inside a token", answers={"text": ["ora"], "answer_start": [1]}),
    row("long", answers={"text": [LONG], "answer_start": [10]}),
    row("unknown", context="Mora 九九九 九", answers={"text": ["Mora"], "answer_start": [0]}),
]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Four questions, of which some cannot be answered exactly with five tokens or fewer."""
    path = write_rows(tmp_path / "dev.jsonl", *ROWS)
    config = run_config(save_tokenizer(tmp_path / "tokenizer", TOKENIZER), tmp_path / "stores", validation_file=path)
    return prepared(config, "validation")


def found(store: FeatureStore, version_2: bool = False, **options: Any) -> Limits:
    return limits(store, TOKENIZER, EvaluationConfig(**options), version_2=version_2)


def test_the_ceiling_of_a_store_and_the_share_of_unknown_tokens(store: FeatureStore) -> None:
    tokens = [token for each in ROWS for token in TOKENIZER.tokenize(each["context"])]
    assert tokens.count("[UNK]") > 0
    best = found(store, max_answer_length=5)
    assert best.unknown_token_share == pytest.approx(tokens.count("[UNK]") / len(tokens))
    assert best.ceiling is not None
    assert best.ceiling.num_examples == 4
    assert best.ceiling.exact_match == 50.0
    assert 50.0 < best.ceiling.f1 < 100.0
    assert best.ceiling.out_of_reach == {"off_token_boundaries": 1, "too_long": 1}
    longer = found(store).ceiling
    assert longer is not None
    assert (longer.exact_match, longer.f1) == (75.0, 75.0)


def test_what_was_computed_is_kept_by_what_it_depends_on(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [found(store, max_answer_length=5), found(store), found(store, answer_normalization="none")]
    first.append(found(store, version_2=True))
    kept = json.loads((store.path / FILE).read_bytes())
    assert list(kept["ceilings"]) == ["squad 5 v1", "squad 30 v1", "none 30 v1", "squad 30 v2"]
    monkeypatch.setattr(module, "ceiling", lambda *_, **__: pytest.fail("it is computed again"))
    assert first == [
        found(store, max_answer_length=5),
        found(store),
        found(store, answer_normalization="none"),
        found(store, version_2=True),
    ]
    assert FeatureStore(store.path).fingerprint == store.fingerprint, "the store is whole with the file in its folder"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"version": 1, "ceilings": {"squad 30 v1": {"f1": 1}}}'])
def test_a_file_that_cannot_be_used_is_written_anew(store: FeatureStore, content: bytes) -> None:
    wanted = found(store)
    whole = (store.path / FILE).read_bytes()
    (store.path / FILE).write_bytes(content)
    assert found(store) == wanted
    assert (store.path / FILE).read_bytes() == whole
    assert [path.name for path in store.path.iterdir() if path.name.startswith(".")] == []


def test_a_file_of_another_version_is_not_used(store: FeatureStore) -> None:
    wanted = found(store)
    kept = json.loads((store.path / FILE).read_bytes())
    kept["version"] += 1
    kept["unknown_token_share"] = 1.0
    (store.path / FILE).write_text(json.dumps(kept), encoding="utf-8")
    assert found(store) == wanted


def test_where_nothing_can_be_written_it_is_computed(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "staged", refuse)
    assert found(store).ceiling is not None
    assert not (store.path / FILE).exists()


def test_what_is_said(store: FeatureStore) -> None:
    said = list(limit_lines(store, TOKENIZER, EvaluationConfig(max_answer_length=5), version_2=False))
    best = found(store, max_answer_length=5)
    assert best.ceiling is not None
    share = f"{100 * best.unknown_token_share:.2f} % of the context tokens are [UNK]"
    assert said == [
        f"validation: at best EM 50.00, F1 {best.ceiling.f1:.2f} with this tokenizer, --max_seq_length, --doc_stride "
        f"and --max_answer_length 5; {share}",
        f"warning: {share}: the tokenizer does not know this text; choose a model of its language",
        "warning: 2 of 4 questions cannot be answered exactly by any model, as their reference answers: 1 do not "
        "begin and end with tokens, 1 are longer than --max_answer_length",
    ]


def test_searches_that_would_take_long_are_left_out_and_said(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceiling, "MAX_TOKENS", 1)
    config = EvaluationConfig(max_answer_length=5)
    said = list(limit_lines(store, TOKENIZER, config, version_2=False))
    assert said[-1] == (
        "note: 1 of 4 questions were not searched for their best answer, which would take long, and count as answered "
        "exactly: the best scores are no more than a bound"
    )
    best = found(store, max_answer_length=5).ceiling
    assert best is not None
    assert (best.num_unsearched, best.exact_match, sum(best.out_of_reach.values())) == (1, 75.0, 1)


@pytest.mark.parametrize("is_named", [True, False])
def test_the_unknown_token_is_told_also_where_the_files_do_not_name_it(is_named: bool, store: FeatureStore) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    if not is_named:
        tokenizer.unk_token = None
    assert unknown_token(tokenizer) == "[UNK]"
    assert unknown_token_share(store, tokenizer) == unknown_token_share(store, TOKENIZER) > 0


def test_a_tokenizer_of_bytes_knows_all_text(store: FeatureStore) -> None:
    tokenizer = byte_tokenizer("bare")
    assert (unknown_token(tokenizer), unknown_token_share(store, tokenizer)) == (None, 0.0)
    said = list(limit_lines(store, tokenizer, EvaluationConfig(max_answer_length=6), version_2=False))
    assert said[0].endswith("0.00 % of the context tokens are unknown")


def test_a_blank_reference_is_no_question_out_of_reach(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "dev.jsonl", row("a"), row("b", answers=[{"text": "", "answer_start": 0}]))
    tokenizer = save_tokenizer(tmp_path / "tokenizer", TOKENIZER)
    config = run_config(tokenizer, tmp_path / "stores", validation_file=path, on_invalid="drop")
    store = prepared(config, "validation")
    assert store.num_unanswerable == 0
    (said,) = limit_lines(store, TOKENIZER, EvaluationConfig(), version_2=False)
    assert said.startswith("validation: at best EM 100.00, F1 50.00 with ")


def test_a_good_fit_is_one_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "dev.jsonl", row("a"))
    config = run_config(save_tokenizer(tmp_path / "tokenizer", TOKENIZER), tmp_path / "stores", validation_file=path)
    said = list(limit_lines(prepared(config, "validation"), TOKENIZER, EvaluationConfig(), version_2=False))
    assert len(said) == 1
    assert said[0].startswith("validation: at best EM 100.00, F1 100.00 with ")
