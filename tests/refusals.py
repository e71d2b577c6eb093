"""How every test looks at a mistake that was refused: one sentence, exit code 2, and nothing lost."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Main = Callable[[Sequence[str]], int]


def refusal(main: Main, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error message of a command line that is refused.

    It is one line, or a heading and one line for each of several problems in the configuration. Notes and other lines
    may precede it; nothing follows, nothing is on standard output, and there is no traceback anywhere.
    """
    code = main(argv)
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    return sentence(captured.err)


def sentence(text: str) -> str:
    """The error message in what a command wrote to standard error."""
    assert "Traceback" not in text
    start = text.index(": error: ")
    lines = text[start + len(": error: ") :].splitlines()
    if lines[0].endswith("problems in the configuration:"):
        assert len(lines) == int(lines[0].split()[0]) + 1 >= 3
        assert all(line.startswith("  - ") for line in lines[1:])
    else:
        assert len(lines) == 1, lines
    assert all(20 <= len(line) <= 900 for line in lines), lines
    return "\n".join(lines)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def finished_run(folder: Path) -> Path:
    """A folder with the results of an earlier run, as far as their names go."""
    (folder / "best").mkdir(parents=True)
    files = "adapter_model.safetensors metrics.json predictions.json config.yaml run.json bench.json"
    for name in (*files.split(), "best/adapter_model.safetensors"):
        (folder / name).write_text(f"precious {name}", encoding="utf-8")
    return folder
