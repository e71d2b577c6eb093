"""What the documents name is there: tests, files, links, commands; and the site builds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qa_dist.cli import COMMANDS
from qa_dist.documentation import parts, regenerated

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((*ROOT.glob("*.md"), *ROOT.glob("ds_configs/*.md"), *ROOT.glob("docs/**/*.md")))
}
README = PAGES["README.md"]
USUAL_FILE = {"docs/reliability.md": "tests/distributed/test_resume.py"}
"""Where the tests are that a page names without a file; elsewhere every test has its file beside it."""

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
    assert len(tree) == 14
    named = {name for line in tree for name in re.findall(r"([\w.]+)/", line)}
    rooms = {path.parent.name for path in (ROOT / "qa_dist").glob("*/__init__.py")}
    assert named == {*TOP_LEVEL, *rooms, "recipes"}


@pytest.mark.parametrize("document", [document for document, text in PAGES.items() if "`test" in text])
def test_every_test_that_a_document_names_is_there(document: str) -> None:
    named = re.findall(r"`(?:(tests/[\w/]+\.py)(?:::(test_\w+))?|(test_\w+))`", PAGES[document])
    for file, name, alone in named:
        assert file or document in USUAL_FILE, f"`{alone}` stands without its file"
        source = (ROOT / (file or USUAL_FILE[document])).read_text(encoding="utf-8")
        assert re.search(rf"^def {name or alone}", source, re.MULTILINE), name or alone


def test_documents_name_tests() -> None:
    assert all(PAGES[f"docs/{name}.md"].count("tests/") > 4 for name in ("architecture", "reliability", "security"))


# The changelog names files of earlier versions.
@pytest.mark.parametrize("document", [document for document in PAGES if document != "CHANGELOG.md"])
def test_every_file_that_a_document_names_is_there(document: str) -> None:
    words = {word for code in re.findall(r"`([^`\n]+)`|^```.*?^```", PAGES[document]) for word in code.split()}
    words |= set(re.findall(r"TESTS=(\S+?)`?$", PAGES[document], re.MULTILINE))
    for word in words:
        name = word.partition("::")[0]
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
    assert "answer-text-is-not-at-its-offset" in anchors(PAGES["docs/troubleshooting.md"])


def test_generated_parts_are_up_to_date() -> None:
    assert all(any(f"<!-- generated: {name} -->" in text for text in PAGES.values()) for name in parts())
    for document, text in PAGES.items():
        assert regenerated(text) == text, f"{document}: run make docs"


def test_the_site_builds_and_its_pages_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material, of the dev extra, is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(tmp_path / "site").as_posix(): path for path in (tmp_path / "site").rglob("*.html")}
    pages = {
        document.removeprefix("docs/").replace(".md", ".html") for document in PAGES if document.startswith("docs/")
    }
    assert built.keys() == {*pages, "404.html"}
    for name, path in built.items():
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", path.read_text()
        )
        assert not loaded, f"{name} loads {loaded}"
