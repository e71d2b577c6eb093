"""What a conversation about a text looks like: for a person at a terminal, and for a pipe. No torch."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from qa_dist.answering.records import Answer
from qa_dist.answering.sentences import printable, sentence_around

NO_ANSWER = "no answer"

_ANSWER, _END = "\x02", "\x03"
"""Stand for the colours of an answer until lines are cut; printable text holds neither."""

_BOLD_GREEN, _DIM, _PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
_NARROWEST = 40
_WIDEST = 100


@dataclass(frozen=True, slots=True)
class Style:
    """How answers are written.

    Attributes:
        is_terminal: A few lines for a person; else one line of four columns, with a tab between them.
        has_colours: Whether the terminal shows the answer in its sentence, and the rest, in colours.
        width: Columns of the terminal.
    """

    is_terminal: bool
    has_colours: bool
    width: int = 80

    @classmethod
    def of(cls, stream: TextIO, environment: Mapping[str, str], width: int) -> "Style":
        """The style for a stream: colours on terminals alone, and not where NO_COLOR (no-color.org) is set."""
        is_terminal = stream.isatty()
        has_colours = is_terminal and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
        return cls(is_terminal, has_colours, max(_NARROWEST, min(width, _WIDEST)))

    def answered(self, answers: Sequence[Answer], context: str) -> str:
        """The best answer and the others, ready to be printed.

        Args:
            answers: Best first, at least one; all of one context.
            context: The text they are of.
        """
        return self._lines(answers, context) if self.is_terminal else _columns(answers, context)

    def dim(self, text: str) -> str:
        """Text that is not important."""
        return f"{_DIM}{text}{_PLAIN}" if self.has_colours else text

    def _lines(self, answers: Sequence[Answer], context: str) -> str:
        best, *others = answers
        listed = ", ".join(f"{_named(answer)} ({percent(answer.probability)})" for answer in others)
        lines: list[str] = []
        if best.is_no_answer:
            lines += self._wrapped(f"{_ANSWER}No answer{_END}: the text does not say ({percent(best.probability)}).")
        else:
            sentence = sentence_around(context, best.start_char, best.end_char)
            lines += self._wrapped(f"{_ANSWER}{sentence.answer}{_END} ({percent(best.probability)})")
            whole = f"{sentence.before}{_ANSWER}{sentence.answer}{_END}{sentence.after}"
            lines += self._wrapped(whole, is_sentence=True)
        if listed:
            also = "next best: " if best.is_no_answer else "or: "
            lines += [self.dim(line) for line in self._wrapped(also + listed)]
        return "\n".join(lines) + "\n"

    def _wrapped(self, text: str, *, is_sentence: bool = False) -> list[str]:
        """Lines of at most the terminal's width, with the answer in its colour.

        Where there are no colours the answer in its sentence stands between brackets.
        """
        lines = textwrap.wrap(text, self.width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        begin, end = (_BOLD_GREEN, _PLAIN) if self.has_colours else ("[", "]") if is_sentence else ("", "")
        return [line.replace(_ANSWER, begin).replace(_END, end) for line in lines]


def percent(probability: float) -> str:
    """A probability as people read it; one is not called certain for being close."""
    if 0.995 <= probability < 1:
        return "> 99 %"
    if 0 < probability < 0.005:
        return "< 1 %"
    return f"{probability:.0%}".replace("%", " %")


def _named(answer: Answer) -> str:
    return NO_ANSWER if answer.is_no_answer else printable(answer.text)


def _columns(answers: Sequence[Answer], context: str) -> str:
    """Answer, probability, sentence with the answer in brackets, and the other answers with theirs."""
    best, *others = answers
    sentence = ""
    if not best.is_no_answer:
        found = sentence_around(context, best.start_char, best.end_char)
        sentence = f"{found.before}[{found.answer}]{found.after}"
    alternatives = "; ".join(f"{_named(answer)} ({answer.probability:.4f})" for answer in others)
    return "\t".join((_named(best), f"{best.probability:.4f}", sentence, alternatives)) + "\n"
