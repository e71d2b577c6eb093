"""`qa-dist cloze --words_of other`: questions in the words of another text."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest

from qa_dist import cloze
from qa_dist.data import retold
from qa_dist.data.cloze import COMMON
from tests.unit.data_fixtures import read_file, row, write_rows

MILL = (
    "The miller Anselm Kroger rebuilt the tide mill at Dunmoor after the great flood. "
    "He sold timber and rope to the shipwrights of Larkhaven for years."
)
TOWN = (
    "Larkhaven grew rich on herring and salt. In the same decade the famous tide mill of Dunmoor, which the great "
    "flood had destroyed, was built anew by Anselm Kroger and his brothers."
)
ELSEWHERE = "Nobody knows why Anselm Kroger went to sea, or what he did with the money from the bank afterwards."
FILLING = [f"Text {word} tells of gardens, of roofs and of {word} kinds of weather." for word in "abcdefgh"]


def titles(*texts: str, title: str = "coast") -> dict[str, str]:
    return dict.fromkeys([*texts, *FILLING], title)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of eleven texts are not as rare as those of a data set."""
    monkeypatch.setattr(retold, "_RARE", 1.0)
    monkeypatch.setattr(retold, "_LEAST_SHARED", 4.0)


def test_a_question_has_the_words_of_another_text_that_says_the_same() -> None:
    by_seed = [retold.retold_examples(titles(MILL, TOWN, ELSEWHERE), 9, seed=seed) for seed in range(5)]
    made = max(by_seed, key=len)
    asked = {(each.context, each.answers[0].text): each for each in itertools.chain(*by_seed)}
    question = asked[MILL, "Anselm Kroger"].question
    assert "Kroger" not in question
    theirs = {"same", "decade", "famous", "destroyed", "built", "anew", "brothers"}
    assert theirs & set(question.rstrip("?").lower().split())
    answer = asked[TOWN, "Anselm Kroger"].answers[0]
    assert TOWN[answer.start_char :].startswith("Anselm Kroger and his brothers")
    assert {"rebuilt", "miller", "at"} & set(asked[TOWN, "Anselm Kroger"].question.rstrip("?").lower().split())
    # It has the name, in a sentence that says nothing of what the others say.
    assert not [text for text, _ in asked if text == ELSEWHERE]
    assert [each.id for each in made] == [f"retold-{number}" for number in range(len(made))]


def test_questions_share_the_most_with_the_sentence_of_their_answer() -> None:
    """Counted again from the texts alone."""
    texts = titles(MILL, TOWN, ELSEWHERE)

    def words(text: str) -> set[str]:
        return {word.lower() for word in re.findall(r"[\w'\u2019-]+", text)} - COMMON

    def weight(shared: set[str]) -> float:
        return sum(
            math.log(len(texts) / sum(word in re.findall(r"[\w'-]+", t.lower()) for t in texts)) for word in shared
        )

    made = list(itertools.chain(*(retold.retold_examples(texts, 9, seed=seed) for seed in range(20))))
    assert len(made) >= 20
    for each in made:
        (answer,) = each.answers
        assert each.context[answer.start_char :].startswith(answer.text)
        asked = words(each.question) - words(answer.text)
        shared = {}
        for sentence in re.finditer(r"[^.]+\.", each.context):
            shared[sentence.span()] = weight(asked & words(sentence.group()))
        (here,) = [span for span in shared if span[0] <= answer.start_char < span[1]]
        assert shared.pop(here) >= 4.0
        assert max(shared.values(), default=0.0) < weight(asked & words(each.context[slice(*here)]))


def test_texts_of_other_titles_copies_and_common_words_give_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    assert retold.retold_examples({**titles(MILL), TOWN: "inland"}, 9, seed=1) == []
    assert retold.retold_examples(titles(MILL, MILL + " It stands."), 9, seed=1) == []
    assert retold.retold_examples(titles(MILL), 9, seed=1) == []
    assert retold.retold_examples({}, 9, seed=1) == []
    monkeypatch.setattr(retold, "_LEAST_SHARED", 100.0)
    assert retold.retold_examples(titles(MILL, TOWN), 9, seed=1) == []


def test_as_many_questions_of_a_text_as_asked_for() -> None:
    texts = titles(MILL, TOWN)
    many = retold.retold_examples(texts, 10**9, seed=1)
    counts = [sum(each.context == text for each in many) for text in (MILL, TOWN)]
    assert min(counts) >= 2
    assert len({(each.context, each.answers[0].text) for each in many}) == len(many)
    assert len(retold.retold_examples(texts, 1, seed=1)) == 2
    assert retold.retold_examples(texts, 1, seed=1) != retold.retold_examples(texts, 1, seed=3)


def test_an_answer_in_very_many_texts_is_compared_with_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retold, "_MOST_OTHERS", 1)
    made = list(itertools.chain(*(retold.retold_examples(titles(MILL, TOWN), 9, seed=s) for s in range(30))))
    names = [each for each in made if each.answers[0].text == "Anselm Kroger"]
    # One of the two places is the text itself, which gives no question.
    assert 0 < len(names) < 60


def test_the_command_writes_either_or_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def counted(*words: str) -> tuple[int, set[str]]:
        output = tmp_path / f"{'-'.join(words)}.json"
        assert cloze.main([str(source), str(output), "--per_context", "2", *words]) == 0
        counts = json.loads(capsys.readouterr().out)
        ids = [each.row["id"].rpartition("-")[0] for each in read_file(output)]
        assert counts["num_questions"] == len(ids)
        return len(ids), set(ids)

    source = tmp_path / "texts.txt"
    source.write_text("\n\n".join([MILL, TOWN, *FILLING]))
    own, other, both = (counted("--words_of", words) for words in ("own", "other", "both"))
    assert (own[1], other[1], both[1]) == ({"cloze"}, {"retold"}, {"cloze", "retold"})
    assert own[0] + other[0] == both[0]
    assert counted() == own
    alone = write_rows(tmp_path / "in.jsonl", row("a", context=MILL, answers={"text": ["tide"], "answer_start": [39]}))
    assert cloze.main([alone, str(tmp_path / "none.json"), "--words_of", "other"]) == 2
    error = capsys.readouterr().err
    assert "no two of its texts with the same title" in error
    assert "--words_of own" in error
    assert not (tmp_path / "none.json").exists()
