"""Every command line in the documents means something: its command is there, and so is each of its flags.

tests/integration/test_readme.py runs those that can be run. All of them are looked at here, also what needs a cluster,
a hub or hours: it takes seconds, and an option that is renamed is noticed at once.
"""

import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from qa_dist.cli import COMMANDS

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")))
STARTERS = ("local.sh", "torchrun.sh", "slurm.sh", "deepspeed.sh")
"""Scripts of launch/ that hand their arguments to a module."""

WITH_PARTS = ("qa_dist.bench", "qa_dist.recipe_command")
"""Commands whose first words choose the flags."""

NO_COMMANDS = {"docs/howto/command.md": {"count"}}
"""What a reader of a page is asked to write."""


class Call(NamedTuple):
    """A command line taken apart: the module, its words, and the launcher before it with its own words."""

    module: str
    words: tuple[str, ...]
    launcher: str = ""
    launcher_words: tuple[str, ...] = ()


def lines_of_code(text: str) -> list[str]:
    """Lines of all fenced blocks, whatever their language, and code in the text that begins as a command does."""
    blocks = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    return [*lines, *re.findall(r"`(qa-dist [a-z][^`\n]*)`", text)]


def calls(line: str) -> list[Call]:
    """The commands of this package in a line of a shell; none in a line of anything else."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return []
    found: list[Call] = []
    while words:
        end = words.index("|") if "|" in words else len(words)
        found += filter(None, [call(words[:end])])
        words = words[end + 1 :]
    return found


def call(words: list[str]) -> Call | None:
    """What one command of a pipe starts, if that is something of this package."""
    variables = {}
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    words = words[: words.index(">")] if ">" in words else words
    if words[:1] == ["qa-dist"] and len(words) > 1 and not words[1].startswith("-"):
        return Call(COMMANDS[words[1]].module if words[1] in COMMANDS else words[1], tuple(words[2:]))
    scripts = [place for place, word in enumerate(words) if re.fullmatch(r"launch/\w+\.sh", word)]
    if words[:1] in (["sbatch"], ["bash"]) and scripts and Path(words[scripts[0]]).name in STARTERS:
        return Call(variables.get("MODULE", "qa_dist.train"), tuple(words[scripts[0] + 1 :]))
    modules = [place for place, word in enumerate(words) if place and words[place - 1] == "-m" and "qa_dist" in word]
    if words[:1] in (["python"], ["python3"], ["torchrun"], ["accelerate"]) and modules:
        before = tuple(words[1 : modules[0] - 1])
        return Call(words[modules[0]], tuple(words[modules[0] + 1 :]), words[0], before)
    return None


@cache
def help_of(module: str, *words: str) -> str:
    """What a command says to --help behind these words, such as the name of one of its parts."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
        importlib.import_module(module).main([*words, "--help"])
    assert not end.value.code
    return said.getvalue()


@cache
def flags_of_launcher(launcher: str) -> set[str]:
    if launcher == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        return {*launch_command_parser()._option_string_actions}
    from torch.distributed.run import get_args_parser

    return {*get_args_parser()._option_string_actions}


def flags(words: Iterable[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if re.fullmatch(r"--\w[\w-]*(=.*)?", word)}


def unknown(found: Call) -> set[str]:
    """Flags that the command has not, or its own name if it is none."""
    if found.module not in {command.module for command in COMMANDS.values()}:
        return {found.module}
    first = next((place for place, word in enumerate(found.words) if word.startswith("-")), len(found.words))
    parts = found.words[:first] if found.module in WITH_PARTS else ()
    known = set(re.findall(r"(?<![\w-])--\w[\w-]*", help_of(found.module, *parts)))
    unknown = flags(found.words) - known
    if found.launcher in ("accelerate", "torchrun"):
        unknown |= flags(found.launcher_words) - flags_of_launcher(found.launcher)
    return unknown


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_flags_are_there(document: str) -> None:
    for line in lines_of_code((ROOT / document).read_text(encoding="utf-8")):
        for found in calls(line):
            assert unknown(found) <= NO_COMMANDS.get(document, set()), line


def test_lines_of_all_kinds_are_looked_at() -> None:
    texts = {document: (ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS}
    found = [each for text in texts.values() for line in lines_of_code(text) for each in calls(line)]
    assert {each.launcher for each in found} == {"", "python", "python3", "torchrun", "accelerate"}
    # Blocks that are run nowhere.
    for document, module in {
        "docs/training.md": "qa_dist.cloze",
        "docs/sweeps.md": "qa_dist.sweep",
        "docs/predicting.md": "qa_dist.predict",
        "docs/publishing.md": "qa_dist.publish",
    }.items():
        blocks = re.findall(r"^ *```text\n(.*?)^ *```", texts[document], re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in lines_of_code(f"```text\n{block}```\n")]
        assert module in {each.module for line in lines for each in calls(line)}, document


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("qa-dist predict --model outputs/mine --inputfile dev.json", {"--inputfile"}),
        ("zcat a.gz | qa-dist predict --model outputs/mine --out - | gzip > b.gz", {"--out"}),
        ("qa-dist reply outputs/mine", {"reply"}),
        ("OMP_NUM_THREADS=1 python -m qa_dist.train --config quickstart --rate=3", {"--rate"}),
        ("accelerate launch --config a.yaml -m qa_dist.train --seed 1", {"--config"}),
        ("torchrun --nprocs 2 -m qa_dist.train --seed 1", {"--nprocs"}),
        ("MODULE=qa_dist.predict sbatch --nodes 2 launch/slurm.sh --model a --seeds 1", {"--seeds"}),
        ("bash launch/torchrun.sh --seeds 1", {"--seeds"}),
        ("python -m qa_dist.bench gpu pack --outputs a", {"--outputs"}),
        ("qa-dist sweep a.yaml --sbatch_options '--gpus-per-node 1 --time 60'", set()),
    ],
)
def test_what_is_not_there_is_noticed(line: str, wrong: set[str]) -> None:
    (found,) = calls(line)
    assert unknown(found) == wrong
