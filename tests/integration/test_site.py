"""The site of the documents."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_documents import PAGES

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.integration


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
    notebooks = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.ipynb")}
    assert built.keys() == {*pages, *notebooks, "404.html"}
    for name, path in built.items():
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", path.read_text()
        )
        assert not loaded, f"{name} loads {loaded}"
