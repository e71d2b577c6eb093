"""Properties that hold for any text: from records through windows to the answers that are decoded."""

import csv
import io
import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qa_dist.data.checking import validate
from qa_dist.data.formats import parse
from qa_dist.data.placing import is_of_word
from qa_dist.data.records import Answer, Example, Feature
from qa_dist.data.rows import read_rows
from qa_dist.evaluation.answers import decode
from qa_dist.evaluation.candidates import CandidateTable
from qa_dist.evaluation.top_spans import top_spans
from qa_dist.features.building import prepare_store
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureBuilder, FeatureSpec
from tests.tiny import tiny_tokenizer
from tests.unit.any_text import any_texts, often_good, short_texts, texts
from tests.unit.data_fixtures import byte_tokenizer, map_of, run_config, without_blanks

TOKENIZERS = {
    "uncased": tiny_tokenizer(),
    "cased": tiny_tokenizer(uncased=False),
    "left": tiny_tokenizer(padding_side="left"),
    "roberta": byte_tokenizer("roberta"),
    "xlnet": byte_tokenizer("xlnet"),
    "rows": byte_tokenizer("roberta"),
}
TOKENIZERS["rows"].add_tokens(["<row>"])
BYTE_LEVEL = ("roberta", "xlnet", "rows")
tokenizer_names = st.sampled_from(sorted(TOKENIZERS))


# ----------------------------------------------------------------------------------------------------------- records

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "answer_start", "x"]), inner),
    max_leaves=6,
)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """A row that is often right, often nearly right, and sometimes nothing of the kind."""
    context = draw(often_good)
    start = draw(st.integers(0, max(0, len(context) - 1)))
    text = context[start : draw(st.integers(start + 1, len(context) + 1))]
    answers = {"text": [text], "answer_start": [start + draw(st.sampled_from([0, 0, 0, 1, -1, 50]))]}
    row: dict[str, Any] = {
        "id": draw(often_good),
        "context": context,
        "question": draw(often_good),
        "answers": draw(st.sampled_from([answers, [{"text": text, "answer_start": start}], {}, None])),
    }
    if draw(st.integers(0, 9)) == 9:
        row[draw(st.sampled_from([*row, "title", "is_impossible"]))] = draw(anything)
    return row


@given(found=st.lists(rows(), max_size=4), allow_unanswerable=st.booleans())
def test_validation_never_fails_and_what_it_lets_pass_is_sound(
    found: list[dict[str, Any]], allow_unanswerable: bool
) -> None:
    examples, report = validate(read_rows(found), allow_unanswerable=allow_unanswerable)
    assert report.num_records == len(found) == len(examples) + report.num_invalid
    assert bool(report.num_invalid) == bool(report.problems)
    assert len({example.id for example in examples}) == len(examples)
    report.text().encode()
    for example in examples:
        for text in (example.id, example.question, example.context, example.title):
            text.encode()
        assert example.id
        assert example.question.strip()
        assert example.answers or allow_unanswerable
        for answer in example.answers:
            assert answer.text.strip()
            assert example.context[answer.start_char : answer.end_char] == answer.text


@settings(max_examples=40)
@given(contexts=st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_every_layout_brings_the_same_text(contexts: list[tuple[str, str]]) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    found = [
        {
            "id": f"q{number}",
            "context": context,
            "question": question,
            "answers": {"text": [context], "answer_start": [0]},
        }
        for number, (context, question) in enumerate(contexts)
    ]
    articles = [
        {
            "paragraphs": [
                {
                    "context": row["context"],
                    "qas": [{**row, "answers": [{"text": row["context"], "answer_start": 0}]}],
                }
            ]
        }
        for row in found
    ]
    table, binary = io.StringIO(newline=""), io.BytesIO()
    writer = csv.DictWriter(table, list(found[0]))
    writer.writeheader()
    writer.writerows({**row, "answers": json.dumps(row["answers"])} for row in found)
    parquet.write_table(pa.Table.from_pylist(found), binary)
    files = {
        "a.json": json.dumps({"data": articles}).encode(),
        "b.json": json.dumps({"data": articles}, ensure_ascii=False, indent=1).encode(),
        "c.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found).encode(),
        "d.csv": table.getvalue().encode(),
        "e.parquet": binary.getvalue(),
    }
    expected, report = validate(read_rows(found))
    for name, content in files.items():
        read, again = validate(parse(content, Path(name)))
        assert (name, [(e.id, e.context, e.question) for e in read], again.num_invalid) == (
            name,
            [(e.id, e.context, e.question) for e in expected],
            report.num_invalid,
        )


# ----------------------------------------------------------------------------------------------------------- windows


@st.composite
def built(draw: st.DrawFn) -> tuple[str, Example, list[Feature], Any, int]:
    """A tokenizer's name, an example, its features, the tokens of its whole context, and the stride."""
    name = draw(tokenizer_names)
    tokenizer = TOKENIZERS[name]
    context = draw(texts)
    question = draw(short_texts)
    whole = tokenizer(context, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    whole["with_blanks"] = whole["offset_mapping"]
    if not TokenizerSpec.of(tokenizer).has_exact_offsets:
        whole["offset_mapping"] = without_blanks(context, whole["offset_mapping"])
    for name_of_offsets in ("offset_mapping", "with_blanks"):
        whole[name_of_offsets] = with_accents(context, whole[name_of_offsets])
    offsets = [pair for pair in whole["offset_mapping"] if pair[0] < pair[1]]
    answers: tuple[Answer, ...] = ()
    if offsets and draw(st.booleans()):
        first = draw(st.integers(0, len(offsets) - 1))
        last = draw(st.integers(first, min(first + 8, len(offsets) - 1)))
        start, end = offsets[first][0], max(end for _, end in offsets[first : last + 1])
        answers = (Answer(context[start:end], start),)
    stride = draw(st.integers(0, 12))
    spec = FeatureSpec(draw(st.integers(20 + stride, 60)), stride)
    builder = FeatureBuilder(TokenizerSpec.of(tokenizer), spec)
    example = Example("q", question, context, answers)
    features, stats = builder.build([example])
    assert stats.num_features == len(features) >= 1
    assert all(len(feature.input_ids) <= spec.max_seq_length for feature in features)
    return name, example, features, whole, stride


def with_accents(context: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets in which accents that are characters of their own belong to the token of their letter, if to no other."""
    covered = {place for start, end in offsets for place in range(start, end)}
    mended, ends = list(offsets), set()
    for token in reversed(range(len(offsets))):
        start, end = offsets[token]
        if start < end and end not in ends and is_of_word(context[end - 1]):
            ends.add(end)
            while end < len(context) and end not in covered and unicodedata.category(context[end])[0] == "M":
                end += 1
            mended[token] = start, end
    return mended


def context_of(feature: Feature) -> list[tuple[int, tuple[int, int]]]:
    """The context tokens of a feature: their ids and offsets."""
    end = feature.context_start + len(feature.context_offsets)
    ids = feature.input_ids[feature.context_start : end].tolist()
    return list(zip(ids, map(tuple, feature.context_offsets.tolist()), strict=True))


def bare(text: str) -> str:
    """Text as BERT's uncased normaliser leaves it, but for blanks: without accents, letter by letter in lower case."""
    letters = [char for char in unicodedata.normalize("NFD", text) if unicodedata.category(char) != "Mn"]
    return "".join(char.lower() for char in letters if unicodedata.category(char) not in ("Cc", "Cf"))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(case=built())
def test_windows_cover_the_context_and_every_token_has_its_characters(case: Any) -> None:
    name, example, features, whole, stride = case
    tokenizer = TOKENIZERS[name]
    covered: list[tuple[int, tuple[int, int]]] = []
    for number, feature in enumerate(features):
        window = context_of(feature)
        shared = stride if number else 0
        assert covered[len(covered) - shared :] == window[:shared]
        assert len(window) > shared or not whole["input_ids"]
        covered += window[shared:]
    expected = [list(pair) for pair in whole["offset_mapping"]]
    for pair, behind in zip(reversed(expected[:-1]), reversed(expected[1:]), strict=True):
        if pair[0] == pair[1] > behind[0]:
            # The blank that a text behind <row> gets for nothing.
            pair[:] = behind[0], behind[0]
    assert covered == list(zip(whole["input_ids"], map(tuple, expected), strict=True))

    alphabet = byte_alphabet()
    for (token_id, (start, end)), (first, last) in zip(covered, whole["with_blanks"], strict=True):
        assert 0 <= start <= end <= len(example.context)
        token = tokenizer.convert_ids_to_tokens(token_id)
        characters = example.context[first:last]
        assert example.context[start:end].strip() == characters.strip()
        if name in BYTE_LEVEL:
            # Behind <row>, which is no byte, a new text begins.
            found = token.encode() if token == "<row>" else bytes(alphabet[char] for char in token)
            # A blank before a word is in its token but not in its offsets, and the first word gets one for nothing.
            assert found in b" " + characters.encode()
        elif token != "[UNK]":
            piece = token.removeprefix("##")
            assert piece in ((bare(characters), characters) if name != "cased" else (characters, normal(characters)))
    starts = [start for _, (start, _) in covered]
    assert starts == sorted(starts)


def normal(text: str) -> str:
    """Text as BERT's cased normaliser leaves it: characters without meaning taken out."""
    return "".join(char for char in text if unicodedata.category(char) not in ("Cc", "Cf"))


def byte_alphabet() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(case=built())
def test_labels_decode_to_the_answer_where_it_is_inside_and_to_nothing_elsewhere(case: Any) -> None:
    _, example, features, whole, stride = case
    assume(example.answers)
    answer = example.answers[0]
    offsets = whole["offset_mapping"]
    inside = [
        token
        for token, (start, end) in enumerate(offsets)
        if start < end and start < answer.end_char and end > answer.start_char
    ]
    first_token = 0
    for feature in features:
        num_tokens = len(feature.context_offsets)
        has_answer = first_token <= inside[0] and inside[-1] < first_token + num_tokens
        null = (feature.cls_token, feature.cls_token)
        label = (feature.start_token, feature.end_token)
        assert (label != null) == has_answer
        if has_answer:
            shift = feature.context_start - first_token
            assert label == (inside[0] + shift, inside[-1] + shift)
            start_char = feature.context_offsets[feature.start_token - feature.context_start, 0]
            end_char = feature.context_offsets[feature.end_token - feature.context_start, 1]
            # Answers were drawn at the edges of tokens, so that labels can give them back exactly; where pieces of one
            # character overlap, the label takes all of them.
            assert start_char <= answer.start_char
            assert end_char >= answer.end_char
            assert example.context[start_char:end_char].find(answer.text) == answer.start_char - start_char
            widest = [offsets[token] for token in inside]
            assert (start_char, end_char) == (min(s for s, _ in widest), max(e for _, e in widest))
        first_token += num_tokens - stride
    assert any(feature.start_token != feature.cls_token for feature in features) or len(features) > 1


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=4))
def test_a_store_gives_back_the_text_it_was_made_of(found: list[tuple[str, str, str]], tmp_path: Path) -> None:
    rows = [
        {"id": f"{number}{name}", "context": context, "question": question, "answers": []}
        for number, (name, context, question) in enumerate(found)
    ]
    examples, report = validate(read_rows(rows))
    assume(examples and not report.problems)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = run_config("unused", tmp_path / "stores", train_file=str(path))
    store = prepare_store(config, "train", tokenizer=TOKENIZERS["uncased"])
    assert [store.example(index) for index in range(store.num_examples)] == examples
    assert store.contexts == [example.context for example in examples]


# ---------------------------------------------------------------------------------------------------------- decoding


def three_loops(
    features: list[Feature], logits: list[Any], context: str, *, n_best: int, longest: int, version_2: bool
) -> tuple[list[tuple[str, float]], float]:
    """The n-best list (text, score) of one example, by loops over windows, starts and ends, and its null score."""
    entries = []
    null = math.inf
    for window, (feature, (starts, ends)) in enumerate(zip(features, logits, strict=True)):
        of_window = []
        null = min(null, float(starts[feature.cls_token] + ends[feature.cls_token]))
        places = range(feature.context_start, feature.context_start + len(feature.context_offsets))
        for start in places:
            for end in places:
                if start <= end < start + longest:
                    first = int(feature.context_offsets[start - feature.context_start][0])
                    last = int(feature.context_offsets[end - feature.context_start][1])
                    score = float(np.float32(starts[start]) + np.float32(ends[end]))
                    text = context[first:last]
                    place = (last - len(text.lstrip()), first + len(text.rstrip())) if text.strip() else (last, last)
                    place = place if first < last else (first, last)
                    of_window.append((-score, window, start, end, text.strip(), place))
        entries += sorted(of_window)[:n_best]
    entries.sort(key=lambda entry: entry[:4])
    window_of: dict[tuple[int, int], int] = {}
    kept = [entry for entry in entries if window_of.setdefault(entry[5], entry[1]) == entry[1]]
    best = [(text, -score) for score, _, _, _, text, _ in kept[:n_best]]
    if version_2 or not best:
        place = sum(score >= null for _, score in best)
        best = [*best[:place], ("", null), *best[place:]]
        # The null answer joins the list, and stays when it is too low for it. By its place: a token without width has
        # the same text, and may have the same score.
        best = best[:n_best] if place < n_best else best
    return best, null


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=built(),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
    version_2=st.booleans(),
    n_best=st.integers(1, 6),
    longest=st.integers(1, 9),
)
def test_answers_are_those_of_three_loops_and_stand_in_the_context(
    case: Any, seed: int, ties: bool, version_2: bool, n_best: int, longest: int
) -> None:
    _, example, features, _, _ = case
    generator = np.random.default_rng(seed)
    logits = [generator.normal(size=(2, len(feature.input_ids))).astype(np.float32) * 3 for feature in features]
    if ties:
        logits = [np.round(values / 3) for values in logits]
    tables = []
    for index, (feature, (starts, ends)) in enumerate(zip(features, logits, strict=True)):
        table = top_spans(
            [index],
            torch.from_numpy(starts)[None],
            torch.from_numpy(ends)[None],
            torch.tensor([feature.context_start]),
            torch.tensor([feature.context_start + len(feature.context_offsets)]),
            torch.tensor([feature.cls_token]),
            torch.tensor([len(starts)]),
            num_candidates=n_best,
            max_answer_length=longest,
        )
        tables.append(table)
    (answer,) = decode(
        CandidateTable.concatenate(tables).ordered(len(features)),
        map_of(features),
        [example.context],
        ["q"],
        n_best_size=n_best,
        version_2=version_2,
    )
    expected, null = three_loops(features, logits, example.context, n_best=n_best, longest=longest, version_2=version_2)
    assert [(entry.text, entry.score) for entry in answer.nbest] == expected

    scores = [entry.score for entry in answer.nbest if entry.start_char >= 0]
    assert scores == sorted(scores, reverse=True)
    assert sum(entry.probability for entry in answer.nbest) == pytest.approx(1)
    assert answer.prediction in answer.nbest
    for entry in answer.nbest:
        if entry.start_char < 0:
            assert (entry.text, entry.start_char, entry.end_char, entry.score) == ("", -1, -1, null)
        else:
            assert entry.text == example.context[entry.start_char : entry.end_char]
    # A token without width is no text: where no answer is a choice, it is never the one chosen.
    spans = [entry for entry in answer.nbest if entry.text]
    if not version_2:
        assert answer.null_odds is None
        assert answer.prediction == answer.nbest[0]
    elif spans:
        chosen_null = answer.null_odds > 0
        assert (answer.prediction.text == "") == chosen_null
        assert chosen_null or answer.prediction == spans[0]
        assert answer.null_odds == pytest.approx(null - spans[0].score, abs=1e-4)
    else:
        assert answer.prediction.text == ""
