"""`qa-dist cloze`: questions made of texts alone."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from qa_dist import cloze
from qa_dist.data.cloze import cloze_examples, gaps
from tests.unit.data_fixtures import read_file, row, write_rows

TEXT = (
    "The Saturn V carried the first people to the moon in July 1969. It was launched 13 times from the Kennedy Space "
    "Center in Florida, and cost $6.4 billion. However, the last flight put a small space station into orbit!"
)
PHRASES = ["carried", "first people", "moon", "launched", "times", "cost", "billion", "last flight put"]
PHRASES += ["small space station", "orbit"]
OTHER = "In 1865 the painter James Whistler moved to the old harbour of Lima. Short one. He stayed for 8 months there."
KINDS = ("number", "name", "phrase")


def test_gaps_are_numbers_names_and_phrases_of_sentences() -> None:
    found = {kind: [TEXT[gap.start_char : gap.end_char] for gap in gaps(TEXT) if gap.kind == kind] for kind in KINDS}
    assert found == {
        "number": ["July 1969", "13", "$6.4 billion"],
        "name": ["The Saturn V", "July", "Kennedy Space Center", "Florida"],
        "phrase": PHRASES,
    }
    assert {TEXT[slice(*gap.sentence)][-1] for gap in gaps(TEXT)} == {".", "!"}
    assert list(gaps("Too short, this. And: nothing")) == []
    assert list(gaps("")) == []


def test_a_question_is_of_the_words_around_its_answer_without_it() -> None:
    made = cloze_examples({TEXT: "t", OTHER: "o"}, 8, seed=1)
    assert [each.id for each in made] == [f"cloze-{number}" for number in range(len(made))]
    counts = Counter(each.context for each in made)
    assert counts[TEXT] == 8
    assert 4 <= counts[OTHER] <= 8
    for each in made:
        (answer,) = each.answers
        assert each.context[answer.start_char : answer.end_char] == answer.text
        words = each.question[:-1].lower().split()
        assert each.question.endswith("?")
        assert 4 <= len(words) <= 17
        around = each.context[: answer.start_char] + " ... " + each.context[answer.end_char :]
        asking = {"who", "what", "which", "where", "when", "how", "many", "much", "year", "in"}
        assert asking.intersection(words)
        assert [word for word in words if word not in around.lower() and word not in asking] == []
    starts = Counter((each.context, each.answers[0].start_char) for each in made)
    assert set(starts.values()) == {1}


def test_numbers_and_dates_are_asked_for_in_their_own_words() -> None:
    made = cloze_examples({TEXT: "t", OTHER: "o"}, 50, seed=3)
    asked = {each.answers[0].text: each.question.lower() for each in made}
    assert "how much" in asked["$6.4 billion"]
    assert "how many" in asked["13"]
    assert "how many" in asked["8"]
    assert "when" in asked["1865"] or "what year" in asked["1865"]


def test_questions_of_a_text_depend_on_it_and_the_seed_alone() -> None:
    alone = [each.question for each in cloze_examples({TEXT: "t"}, 3, seed=1)]
    both = cloze_examples({OTHER: "o", TEXT: "t"}, 3, seed=1)
    assert [each.question for each in both if each.context == TEXT] == alone
    assert [each.title for each in both] == ["o"] * 3 + ["t"] * 3
    assert [each.question for each in cloze_examples({TEXT: "t"}, 3, seed=2)] != alone


def test_the_command_takes_the_texts_of_the_questions_that_a_run_trains_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"text": ["Saturn V"], "answer_start": [4]}
    contexts = [f"{TEXT} This is text number {number} of them." for number in range(9)]
    rows = [row(f"q{number}", context=context, answers=answers) for number, context in enumerate(contexts)]
    source = write_rows(tmp_path / "in.jsonl", *rows)
    words = ["--max_train_samples", "4", "--subset_seed", "7", "--per_context", "2"]
    assert cloze.main([source, str(tmp_path / "out.json.gz"), *words]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["num_contexts"], counts["num_questions"]) == (4, 8)
    made = read_file(tmp_path / "out.json.gz")
    from qa_dist.config.options import DataConfig
    from qa_dist.data.sources import load_examples

    trained, _, _ = load_examples(DataConfig(train_file=source, max_train_samples=4, subset_seed=7), "train")
    assert {each.row["context"] for each in made} == {each.context for each in trained}
    # What was made is data to train on.
    again, report, _ = load_examples(DataConfig(train_file=str(tmp_path / "out.json.gz")), "train")
    assert len(again) == 8
    assert not report.problems
    assert cloze.main([source, str(tmp_path / "again.json.gz"), *words]) == 0
    assert (tmp_path / "again.json.gz").read_bytes() == (tmp_path / "out.json.gz").read_bytes()


def test_a_text_has_no_more_questions_than_gaps() -> None:
    """However many are asked for: nothing is drawn when every gap is used."""
    all_of_it = cloze_examples({TEXT: "t"}, 10**12, seed=1)
    assert 3 < len(all_of_it) < 100
    assert cloze_examples({TEXT: "t"}, 3, seed=1) == all_of_it[:3]


def test_texts_may_come_without_any_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "texts.txt.gz"
    source.write_bytes(gzip.compress(f"{TEXT}\n\n \n{OTHER.replace(' ', chr(10))}\n\n{TEXT}\n".encode()))
    assert cloze.main([str(source), str(tmp_path / "out.json")]) == 0
    assert json.loads(capsys.readouterr().out)["num_contexts"] == 2
    made = read_file(tmp_path / "out.json")
    assert Counter(each.row["context"] for each in made) == {TEXT: 3, OTHER: 3}
    assert {each.row["title"] for each in made} == {"texts.txt.gz"}


def test_a_folder_of_texts_is_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(f"{TEXT}\n\n{OTHER}", encoding="utf-8")
    (folder / "b.txt.gz").write_bytes(gzip.compress(f"{OTHER}\n".encode()))
    (folder / ".hidden").touch()
    (folder / "._a.txt").write_bytes(b"\xff\xfe of another system")
    assert cloze.main([str(folder), str(tmp_path / "out.json")]) == 0
    made = read_file(tmp_path / "out.json")
    assert Counter((each.row["context"], each.row["title"]) for each in made) == {
        (TEXT, "a.txt"): 3,
        (OTHER, "a.txt"): 3,
    }
    capsys.readouterr()
    (folder / "c.json").touch()
    assert cloze.main([str(folder), str(tmp_path / "more.json")]) == 2
    assert "c.json; keep .txt files in a folder of their own" in capsys.readouterr().err


def test_mistakes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(
        tmp_path / "in.jsonl", row("a", context="九克朗。", answers=row()["answers"] | {"text": ["九"]})
    )
    output, texts = tmp_path / "out.json", tmp_path / "texts.txt"
    texts.write_bytes(b"\xff\xfe")
    for words, sentence in (
        ([source, str(output)], "no sentence of its texts has five words"),
        ([source, source], "exists already"),
        ([str(tmp_path / "none.json"), str(output)], "none.json"),
        ([source, str(output), "--subset_seed", "1"], "--max_train_samples asks for none"),
        ([str(texts), str(output), "--max_train_samples", "1"], "a .txt file has none"),
        ([str(texts), str(output), "--on_invalid", "drop"], "--on_invalid is about questions and a .txt file has none"),
        ([str(texts), str(output)], "not UTF-8"),
        ([str(tmp_path / "none.txt"), str(output)], "none.txt"),
        ([source, str(output), "--per_context", "0"], "'0' is not a whole number from 1"),
    ):
        assert cloze.main(words) == 2
        assert sentence in capsys.readouterr().err
    assert not output.exists()
