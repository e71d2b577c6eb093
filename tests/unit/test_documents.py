"""What the documents name is there: tests, files, links, commands; and the site builds."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import feather

from qa_dist.cli import COMMANDS
from qa_dist.common.errors import DataError
from qa_dist.data import formats
from qa_dist.documentation import parts, regenerated
from qa_dist.sweeping.table import spread

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((*ROOT.glob("*.md"), *ROOT.glob("ds_configs/*.md"), *ROOT.glob("docs/**/*.md")))
}
README = PAGES["README.md"]
USUAL_FILE = {"docs/reliability.md": "tests/distributed/test_resume.py"}
"""Where the tests are that a page names without a file; elsewhere they are in one of the files that it names."""

TO_BE_WRITTEN = {"docs/howto/command.md": {"qa_dist/count.py", "tests/unit/test_count.py"}}
"""What a reader of a page is asked to write."""

TOP_LEVEL = ("accelerate_configs", "docs", "ds_configs", "launch", "qa_dist", "tests")


def without_code(text: str) -> str:
    """The text without fenced blocks and code in lines, where brackets and hashes mean something else."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """Names that readers of Markdown give to the headings."""
    blocks_gone = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", blocks_gone, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160


def test_every_command_is_in_the_table_of_the_readme() -> None:
    table = README.partition("## Commands")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `qa-dist (\w+)` \|", table, re.MULTILINE)) == sorted(COMMANDS)


def test_the_tree_of_the_readme_shows_every_room_and_folder() -> None:
    tree = README.partition("## Where things are")[2].partition("```text\n")[2].partition("```")[0].splitlines()
    assert len(tree) == 16
    named = {name for line in tree for name in re.findall(r"([\w.]+)/", line)}
    rooms = {path.parent.name for path in (ROOT / "qa_dist").glob("*/__init__.py")}
    assert named == {*TOP_LEVEL, *rooms, "recipes"}


@pytest.mark.parametrize("document", [document for document, text in PAGES.items() if "`test" in text])
def test_every_test_that_a_document_names_is_there(document: str) -> None:
    named = re.findall(r"`(?:(tests/[\w/]+\.py)(?:::(test_\w+))?|(test_\w+))`", PAGES[document])
    files = {file for file, _, _ in named if file} - TO_BE_WRITTEN.get(document, set())
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in files}
    for file, name, alone in named:
        if name:
            assert re.search(rf"^def {name}\b", sources[file], re.MULTILINE), name
        elif alone:
            usual = USUAL_FILE.get(document)
            places = [sources[usual]] if usual else sources.values()
            assert any(re.search(rf"^def {alone}\b", source, re.MULTILINE) for source in places), alone


def test_documents_name_tests() -> None:
    assert all(PAGES[f"docs/{name}.md"].count("tests/") > 4 for name in ("architecture", "reliability", "security"))


def words_of_code(text: str) -> set[str]:
    """Words of fenced blocks and of code in lines."""
    blocks = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    codes = [*blocks, *re.findall(r"`([^`\n]+)`", text)]
    return {word for code in codes for word in re.split(r"[\s=,()'\"]+", code)}


def test_words_of_code_are_found_in_blocks_and_lines() -> None:
    page = (
        "Run `a/one.py`:\n\n```bash\nDS_CONFIG=b/two.json bash c/three.sh\n```\n\n- so:\n\n  ```text\n  d/four\n  ```\n"
    )
    assert {"a/one.py", "b/two.json", "c/three.sh", "d/four"} <= words_of_code(page)
    assert "here" not in words_of_code("```text\nthere\n```\nhere\n```text\n```\n")


# The changelog names files of earlier versions.
@pytest.mark.parametrize("document", [document for document in PAGES if document != "CHANGELOG.md"])
def test_every_file_that_a_document_names_is_there(document: str) -> None:
    words = words_of_code(PAGES[document])
    words |= set(re.findall(r"TESTS=(\S+?)`?$", PAGES[document], re.MULTILINE))
    names = {word.partition("::")[0] for word in words} - TO_BE_WRITTEN.get(document, set())
    for name in names:
        if re.fullmatch(rf"({'|'.join(TOP_LEVEL)})/[\w./*-]*", name):
            assert list(ROOT.glob(name.rstrip("/"))), f"{name} is not there"


@pytest.mark.parametrize("document", PAGES)
def test_every_link_leads_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(PAGES[document])):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / document).parent / path if path else ROOT / document
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(PAGES[os.path.relpath(place, ROOT)]), target


def test_modules_that_the_changelog_sends_readers_to_are_there() -> None:
    table = PAGES["CHANGELOG.md"].partition("| before | now |")[2].partition("\n\n")[0]
    rows = re.findall(r"^  \| (.+) \| (.+) \|$", table, re.MULTILINE)
    assert len(rows) > 30
    for before, now in rows:
        for name in re.findall(r"`([\w.]+)`", now):
            names = [name + old for old in re.findall(r"`(\w+)`", before)] if name.endswith(".") else [name]
            for module in names:
                place = ROOT / "qa_dist" / module.replace(".", "/")
                assert place.with_suffix(".py").is_file() or place.is_dir(), module


def test_links_are_found() -> None:
    assert len(re.findall(r"\]\(docs/", README)) > 10
    assert "when-machines-come-and-go" in anchors(PAGES["docs/reliability.md"])
    assert "answer-text-is-not-at-its-answer_start" in anchors(PAGES["docs/troubleshooting.md"])


def python_blocks(page: str) -> list[str]:
    """The blocks of Python in a page, without their indentation."""
    return [textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)```", PAGES[page], re.M | re.DOTALL)]


@pytest.mark.parametrize(
    ("page", "table"),
    [
        ("docs/howto/command.md", "qa_dist.cli"),
        ("docs/howto/decoding-mode.md", "qa_dist.evaluation.searches"),
        ("docs/howto/encoder-family.md", "qa_dist.model.families"),
        ("docs/howto/input-format.md", "qa_dist.data.formats"),
        ("docs/howto/optimiser.md", "qa_dist.config.optimizers"),
    ],
)
def test_rows_that_a_page_shows_fit_their_table(page: str, table: str) -> None:
    names = dict(vars(importlib.import_module(table)))
    blocks = python_blocks(page)
    (row,) = [block for block in blocks if block.startswith('"') and not block.startswith('"""')]
    for block in blocks:
        if block.startswith("def "):
            exec(block, names)
    ((name, member),) = eval(f"{{{row}}}", names).items()
    tables = [value for value in vars(importlib.import_module(table)).values() if isinstance(value, dict)]
    assert any(type(member) in map(type, found.values()) and name not in found for found in tables)


def test_the_format_that_a_page_shows_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    function, row = python_blocks("docs/howto/input-format.md")
    names = dict(vars(formats))
    exec(function, names)
    monkeypatch.setattr(formats, "FORMATS", {**formats.FORMATS, **eval(f"{{{row}}}", names)})
    row = {"id": "7", "context": "two\nlines", "question": "why", "answers": ["lines"]}
    sink = io.BytesIO()
    feather.write_feather(pa.Table.from_pylist([row]), sink)
    (record,) = formats.parse(sink.getvalue(), Path("some.feather"))
    assert record.row == row
    with pytest.raises(DataError, match=r"some\.feather is not Feather"):
        formats.parse(b"ARROW", Path("some.feather"))


def test_the_command_that_a_page_shows_runs(tmp_path: Path) -> None:
    command, _, test = python_blocks("docs/howto/command.md")
    (tmp_path / "count.py").write_text(command, encoding="utf-8")
    (tmp_path / "test_count.py").write_text(test.replace("from qa_dist import count", "import count"), encoding="utf-8")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert "2 passed" in done.stdout, done.stdout


def test_generated_parts_are_up_to_date() -> None:
    assert all(any(f"<!-- generated: {name} -->" in text for text in PAGES.values()) for name in parts())
    for document, text in PAGES.items():
        assert regenerated(text) == text, f"{document}: run make docs"


def test_the_scores_of_single_runs_in_the_results_are_those_of_their_files() -> None:
    """The table is written by hand: mean and deviation of the seeds that it names."""
    table = PAGES["docs/results.md"].partition("### More questions")[2].partition("### SQuAD 2.0")[0]
    row = r"^\|[^|]*\|[^|]*\|([^|]+)\|([^|]+)\| (\d) \| `runs/([^`]+)-seed1\.json`([^|]*)\|$"
    rows = re.findall(row, table, re.MULTILINE)
    assert len(rows) >= 7
    for exact, f1, num_seeds, name, more in rows:
        seeds = ["seed1", *re.findall(r"`(seed\d)`", more)]
        assert len(seeds) == int(num_seeds), name
        runs = [
            json.loads((ROOT / "docs" / "results" / "runs" / f"{name}-{seed}.json").read_text(encoding="utf-8"))[
                "final"
            ]
            for seed in seeds
        ]
        for shown, metric in ((exact, "exact_match"), (f1, "f1")):
            assert shown.strip().strip("*") == spread([run[metric] for run in runs]), f"{name}: {metric}"
