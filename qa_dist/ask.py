"""Ask a model about a text, at a terminal or in a pipe: `qa-dist ask MODEL --context_file page.txt`.

At a terminal it is a conversation; without --context_file, paste the text first. In a pipe, each line of standard
input is a question, and each line of standard output is for one question: the answer, its probability, its sentence,
and other answers, with tabs between them.
"""

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qa_dist.answering.options import ReaderConfig, read_options
from qa_dist.answering.records import InvalidQuestionError, Question
from qa_dist.answering.sentences import printable
from qa_dist.answering.terminal import Style
from qa_dist.common.command import run_command
from qa_dist.common.errors import ConfigError, DataError
from qa_dist.common.reading import decoded, read_bytes
from qa_dist.config.options import option

if TYPE_CHECKING:
    from qa_dist.answering.reader import Reader

PROG = "qa_dist.ask"

_LARGEST_FILE = 10_000_000
_SHOWN = 3
_HELP = "Write a question. :text takes another text, :quit or Ctrl-D ends.\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class AskConfig(ReaderConfig):
    """The model, the text, and how many answers are shown."""

    context_file: str | None = option(None, "file with the text, in UTF-8; none: paste it at the terminal")
    top_k: int | None = option(
        None,
        "answers that are shown of each question, the best one included; auto: 3, or as many as the model keeps",
        minimum=1,
        maximum=1000,
    )

    def problems(self) -> Iterable[str]:
        yield from self.contradictions()
        if self.n_best_size is not None and self.top_k is not None and self.top_k > self.n_best_size:
            yield (
                f"--top_k {self.top_k} is more than --n_best_size {self.n_best_size}; lower the former or raise the "
                "latter"
            )


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(PROG, lambda: _ask(sys.argv[1:] if argv is None else argv))


def _ask(argv: Sequence[str]) -> int:
    options = read_options(argv, prog=PROG, description=__doc__ or "", entry=AskConfig)
    if sys.stdin is None:
        raise ConfigError(["standard input, which has the questions, is closed; leave it open, or pipe them into it"])
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            # What is not UTF-8 is a mistake in one question, and a sign that a terminal lacks is no mistake at all.
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    # Before the model is loaded, so that a mistake is said at once.
    context = read_context(Path(options.context_file)) if options.context_file else None
    if context is None and not sys.stdin.isatty():
        raise ConfigError(["standard input has the questions; say with --context_file which text they are about"])
    # Libraries greet on standard output, which belongs to the answers.
    with contextlib.redirect_stdout(sys.stderr):
        reader = options.open()
    sys.stderr.writelines(f"{PROG}: {note}\n" for note in reader.notes)
    most = reader.config.evaluation.n_best_size
    top_k = min(_SHOWN, most) if options.top_k is None else options.top_k
    if top_k > most:
        raise ConfigError([f"--top_k {top_k} is more than the {most} answers of --n_best_size; raise the latter"])
    style = Style.of(sys.stdout, os.environ, shutil.get_terminal_size().columns)
    if sys.stdin.isatty():
        _converse(reader, context, top_k, style)
    else:
        _answer_lines(reader, str(context), top_k, style)
    return 0


def read_context(path: Path) -> str:
    """The text in a file.

    Raises:
        DataError: It cannot be read, is no plain text, or is too large.
    """
    content = read_bytes(path)
    if len(content) > _LARGEST_FILE:
        raise DataError(
            f"{path} has {len(content):,} bytes, more than {_LARGEST_FILE:,}; ask about a part of it, or use predict"
        )
    if b"\0" in content:
        raise DataError(f"{path} is a binary file: byte {content.index(0):,} is zero; give plain text in UTF-8")
    text = decoded(content, path)
    if not text.strip():
        raise DataError(f"{path} is empty; give a file with a text")
    if text.lstrip()[:14].lower().startswith(("<!doctype html", "<html")):
        raise DataError(f"{path} is HTML, whose tags would be read as words; save the page as plain text first")
    return text


def _answer_lines(reader: "Reader", context: str, top_k: int, style: Style) -> None:
    """Answer each line of standard input as soon as it is there; an empty line gives an empty line.

    Raises:
        DataError: A line is no question; all lines before it have been answered.
    """
    for number, line in enumerate(sys.stdin, 1):
        if not line.strip():
            sys.stdout.write("\n")
            sys.stdout.flush()
            continue
        try:
            _require_utf_8(line)
            sys.stdout.write(_answered(reader, line, context, top_k, style))
        except DataError as error:
            raise DataError(f"line {number} of standard input: {error}") from error
        sys.stdout.flush()


def _require_utf_8(line: str) -> None:
    """Make sure that each byte of a line was part of a character.

    Raises:
        DataError: One was none.
    """
    for place, character in enumerate(line, 1):
        if "\udc80" <= character <= "\udcff":
            raise DataError(
                f"it is not UTF-8 (character {place} is the byte 0x{ord(character) - 0xDC00:02x}); convert it first"
            )


def _answered(reader: "Reader", question: str, context: str, top_k: int, style: Style) -> str:
    """The answers to one question as text.

    Raises:
        DataError: The question cannot be answered.
    """
    try:
        (answers,) = reader.answer_chunk([Question.of(question.strip(), context)], top_k)
    except InvalidQuestionError as error:
        raise DataError(error.problem) from error
    return style.answered(answers, context)


def _converse(reader: "Reader", context: str | None, top_k: int, style: Style) -> None:
    """Take questions until there are no more."""
    with contextlib.suppress(ImportError):
        # Arrow keys and earlier questions, in `input`.
        import readline  # noqa: F401
    context = _pasted(style) if context is None else context
    if context is None:
        return
    sys.stderr.write(_HELP)
    while (line := _typed("? ", style)) is not None:
        line = line.strip()
        if line in (":quit", ":q"):
            return
        if line == ":text":
            context = _pasted(style) or context
        elif line.startswith(":"):
            sys.stderr.write(f"There is no {printable(line)}. {_HELP}")
        elif line:
            try:
                sys.stdout.write(_answered(reader, line, context, top_k, style) + "\n")
                sys.stdout.flush()
            except DataError as error:
                sys.stderr.write(f"{printable(str(error))}\n")


def _pasted(style: Style) -> str | None:
    """A text from the terminal; None if there is none."""
    sys.stderr.write("Paste a text, and end it with a line that is only a dot.\n")
    lines: list[str] = []
    while (line := _typed("", style)) is not None and line.strip() != ".":
        lines.append(line)
    text = "\n".join(lines)
    return text if text.strip() else None


def _typed(prompt: str, style: Style) -> str | None:
    """The next line from the terminal; None at the end of input."""
    if prompt and not style.is_terminal:
        # Standard output is a file, and gets answers only.
        sys.stderr.write(prompt)
        sys.stderr.flush()
        prompt = ""
    try:
        return input(prompt)
    except EOFError:
        return None


if __name__ == "__main__":
    sys.exit(main())
