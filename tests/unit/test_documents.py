"""What the documents promise is held by tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USUAL_FILE = {"docs/reliability.md": "tests/distributed/test_resume.py"}


@pytest.mark.parametrize("document", ["docs/reliability.md", "docs/security.md"])
def test_every_test_that_a_document_names_is_there(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"`(?:(tests/[\w/]+\.py)(?:::(test_\w+))?|(test_\w+))`", text)
    assert len(named) > 3
    for file, name, alone in named:
        source = (ROOT / (file or USUAL_FILE[document])).read_text(encoding="utf-8")
        assert f"def {name or alone}" in source, name or alone
