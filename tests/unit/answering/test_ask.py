"""`qa-dist ask`: sentences, what is printed for a person and for a pipe, and what is refused."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from qa_dist import ask
from qa_dist.answering.options import ReaderConfig
from qa_dist.answering.records import Answer, Question
from qa_dist.answering.sentences import sentence_around
from qa_dist.answering.terminal import Style, percent
from tests.refusals import refusal

TEXT = (
    "Orrin Head was lit in 1874. Its builder, J. M. Telfer, had the stones cut ashore! She paid 3.5 pounds a day.\n\n"
    "Keepers:\n- Ann Orr\n- Bo Lind\n\nWer baute ihn? "
    "\u706f\u53f0\u306f1874\u5e74\u306b\u70b9\u706f\u3057\u305f\u3002"
    "\u5efa\u3066\u305f\u306e\u306f\u30c6\u30eb\u30d5\u30a1\u30fc\u3002"
)


class Words:
    """A reader whose answers are the words of the question that the text has, best first."""

    notes = ()

    class config:  # noqa: N801
        class evaluation:  # noqa: N801
            n_best_size = 20

    def answer_chunk(self, questions: list[Question], top_k: int = 1) -> list[list[Answer]]:
        return [self._answers(question, top_k) for question in questions]

    def _answers(self, question: Question, top_k: int) -> list[Answer]:
        (context,) = question.contexts
        found = []
        for word in question.question.split("+"):
            start = context.find(word)
            if start >= 0:
                share = 0.5 ** (len(found) + 1)
                found.append(Answer(word, start, start + len(word), 4.0, share, False, None, 0))
        return found[:top_k] or [Answer("", -1, -1, 1.0, 0.9, True, 2.0, -1)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("1874", "Orrin Head was lit in [1874]."),
        ("Telfer", "Its builder, J. M. [Telfer], had the stones cut ashore!"),
        ("3.5 pounds", "She paid [3.5 pounds] a day."),
        ("Ann Orr", "- [Ann Orr]"),
        ("Wer baute ihn?", "[Wer baute ihn?]"),
        ("\u70b9\u706f", "\u706f\u53f0\u306f1874\u5e74\u306b[\u70b9\u706f]\u3057\u305f\u3002"),
        ("\u30c6\u30eb\u30d5\u30a1\u30fc", "\u5efa\u3066\u305f\u306e\u306f[\u30c6\u30eb\u30d5\u30a1\u30fc]\u3002"),
        ("ashore! She", "Its builder, J. M. Telfer, had the stones cut [ashore! She] paid 3.5 pounds a day."),
    ],
)
def test_an_answer_in_its_sentence(answer: str, expected: str) -> None:
    start = TEXT.index(answer)
    found = sentence_around(TEXT, start, start + len(answer))
    assert f"{found.before}[{found.answer}]{found.after}" == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Rome", "He met Dr. Smith of St. Ives, No. 7, in [Rome]."),
        ("He met", "[He met] Dr. Smith of St. Ives, No. 7, in Rome."),
        ("first", "It was the [first] of approx. 20, c. 1900, i.e. of many."),
        ("no", "Smith said [no]."),
    ],
)
def test_a_full_stop_behind_an_abbreviation_ends_no_sentence(answer: str, expected: str) -> None:
    text = (
        "He met Dr. Smith of St. Ives, No. 7, in Rome. Smith said no. It was the first of approx. 20, c. 1900, i.e. of "
        "many. More followed."
    )
    start = text.index(answer)
    found = sentence_around(text, start, start + len(answer))
    assert f"{found.before}[{found.answer}]{found.after}" == expected


def test_a_text_without_sentences_is_cut_around_the_answer() -> None:
    text = "word " * 5000 + "here " + "more " * 5000
    found = sentence_around(text, 25_000, 25_004)
    assert found.answer == "here"
    assert found.before.startswith("… word ")
    assert found.after.endswith(" more …")
    assert 300 < len(found.before + found.after) < 450


def test_a_terminal_is_shown_no_orders_of_a_text() -> None:
    text = "a\x1b]0;title\x07 b\x1b[2J c\u202ed \x9b1m\te\r\n\x00"
    shown = Style(is_terminal=True, has_colours=True).answered(
        [Answer(text, 0, len(text), 1, 0.5, False, None, 0)], text
    )
    assert set(shown) & set("\x07\x00\x9b\u202e\t\r") == set()
    assert shown.count("\x1b") == shown.count("\x1b[1;32m") + shown.count("\x1b[0m") == 4


@pytest.mark.parametrize(
    ("value", "shown"), [(1.0, "100 %"), (0.9999, "> 99 %"), (0.42, "42 %"), (0.0001, "< 1 %"), (0.0, "0 %")]
)
def test_percent(value: float, shown: str) -> None:
    assert percent(value) == shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a text; a reader without a model stands for whatever --model names."""
    monkeypatch.setattr(ReaderConfig, "open", lambda self: Words())
    path = tmp_path / "page.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(monkeypatch: pytest.MonkeyPatch, typed: str, *words: str, terminal: bool = False) -> tuple[int, str]:
    """Exit code and standard output of the command with this on standard input."""
    streams = (Terminal if terminal else io.StringIO)(typed), (Terminal if terminal else io.StringIO)()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", streams[0])
        patch.setattr(sys, "stdout", streams[1])
        code = ask.main(["any-model", *words])
    return code, streams[1].getvalue()


def test_a_pipe_gets_a_line_of_columns_for_each_line(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = "1874+Telfer+Orr\n\nnobody\n"
    code, printed = run(monkeypatch, typed, "--context_file", str(page))
    assert code == 0
    assert [line.split("\t") for line in printed.splitlines()] == [
        ["1874", "0.5000", "Orrin Head was lit in [1874].", "Telfer (0.2500); Orr (0.1250)"],
        [""],
        ["no answer", "0.9000", "", ""],
    ]
    assert "\x1b" not in printed


@pytest.mark.parametrize("colours", [True, False])
def test_a_conversation(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, colours: bool) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "" if colours else "1")
    typed = (
        "1874+Telfer\nOrrin Head\n\nnobody\n:what\n:text\nAnother text.\n\nIt has parts.\n.\nparts\n:quit\nnever read\n"
    )
    code, printed = run(monkeypatch, typed, "--context_file", str(page), terminal=True)
    assert code == 0
    if colours:
        assert "Orrin Head was lit in \x1b[1;32m1874\x1b[0m." in printed
        assert "\x1b[2m  or: Telfer (25 %)\x1b[0m" in printed
        assert "\x1b[1;32mNo answer\x1b[0m: the text does not say (90 %)." in printed
    else:
        assert "Orrin Head was lit in [1874]." in printed
        assert "\x1b" not in printed
        assert "No answer: the text does not say (90 %)." in printed
        assert "It has [parts]." in printed
        assert "  [Orrin Head] was lit in 1874." in printed
        assert "  Orrin Head (50 %)" in printed
    assert "There is no :what." in capsys.readouterr().err
    assert "never" not in printed


def test_a_text_is_pasted_first_where_no_file_is_named(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed = run(monkeypatch, "One line.\nThe second line.\n.\nsecond\n", terminal=True)
    assert code == 0
    assert "The " in printed
    assert run(monkeypatch, "", terminal=True)[0] == 0


WRONG = [
    (b"", "is empty; give"),
    (b" \n\t", "is empty; give"),
    (b"a\0b", "is a binary file: byte 1"),
    (b"abc\xff", "is not UTF-8: byte 3"),
    (b"\n <!DOCTYPE html><p>x", "is HTML"),
    (b"x" * 10_000_001, "10,000,001 bytes, more than"),
]


@pytest.mark.parametrize(("content", "part"), WRONG, ids=[part for _, part in WRONG])
def test_what_is_no_text_is_refused(
    page: Path, content: bytes, part: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    page.write_bytes(content)
    assert part in refusal(ask.main, ["any-model", "--context_file", str(page)], capsys)


def test_other_mistakes(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    assert "--context_file" in refusal(ask.main, ["any-model"], capsys)
    assert "--model is missing" in refusal(ask.main, [], capsys)
    contradiction = ["any-model", "--allow_no_answer", "false", "--null_score_diff_threshold", "1"]
    assert "--allow_no_answer is false; drop one" in refusal(ask.main, contradiction, capsys)
    assert "does not exist" in refusal(ask.main, ["any-model", "--context_file", "nothing.txt"], capsys)
    words = ["any-model", "--context_file", str(page)]
    told = "--top_k 21 is more than the 20 answers of --n_best_size; raise the latter"
    assert told in refusal(ask.main, [*words, "--top_k", "21"], capsys)
    monkeypatch.setattr(ReaderConfig, "open", lambda self: pytest.fail("the model was loaded"))
    told = "--top_k 3 is more than --n_best_size 2; lower the former or raise the latter"
    assert told in refusal(ask.main, [*words, "--top_k", "3", "--n_best_size", "2"], capsys)
    monkeypatch.setattr(sys, "stdin", None)
    assert "is closed; leave it open" in refusal(ask.main, words, capsys)


def test_a_line_that_is_no_question_loses_nothing_before_it(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, printed = run(monkeypatch, "1874\nOr\udcff\nOrr\n", "--context_file", str(page))
    assert code == 2
    assert printed.startswith("1874\t")
    assert printed.count("\n") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "qa_dist.ask: error: line 2 of standard input: it is not UTF-8 (character 3 is the byte 0xff); convert it first"
    )
