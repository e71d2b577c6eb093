"""What the tests of pages in a real browser share."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.chromium import CHROMIUM
from tests.support.watched_page import watched_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by playwright."""
    driving = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with driving.sync_playwright() as driver:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are left: in the tests' output folder, or in the one that QA_DIST_SCREENSHOTS names."""
    named = os.environ.get("QA_DIST_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(exist_ok=True, parents=True)
    return folder


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page at a test file's `address`; it may load nothing but itself, and leave no message in the console."""
    with watched_page(browser, address, viewport={"width": 1280, "height": 900}) as (opened, loaded):
        yield opened
    assert [url for url in loaded if not url.startswith("data:")] == [address]
