"""The page of `qa-dist inspect --html` in a real browser."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the bench extra is not installed")

from qa_dist.inspect_command import main
from tests.support.chromium import IN_A_BROWSER
from tests.tiny import WORDS, tiny_tokenizer
from tests.unit.answering.xss import CORPUS
from tests.unit.data_fixtures import row, save_tokenizer, write_rows

pytestmark = IN_A_BROWSER


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page about texts of many lengths, some of which would run as scripts."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number, markup in enumerate(CORPUS * 6):
        context = " ".join(WORDS[: 5 + 7 * number % 40]) + f" {markup}"
        answers = {"text": [markup], "answer_start": [context.index(markup)]} if number % 3 else None
        none: dict[str, list[Any]] = {"text": [], "answer_start": []}
        rows.append(row(f"{number}{markup}", question=f"What is {markup} ?", context=context, answers=answers or none))
    data = write_rows(folder / "train <b>x.jsonl", *rows)
    tokenizer = save_tokenizer(folder / "tokenizer", tiny_tokenizer())
    page = folder / "data.html"
    words = ["--train_file", data, "--model_name_or_path", tokenizer, "--store_dir", str(folder / "stores")]
    lengths = ["--max_seq_length", "192", "--doc_stride", "8", "--max_answer_length", "8"]
    assert main([*words, *lengths, "--html", str(page)]) == 0
    return page.as_uri()


def test_light_dark_and_on_a_phone(page: Any, screenshots: Path) -> None:
    backgrounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.screenshot(path=screenshots / f"data-{scheme}.png", full_page=True)
    assert backgrounds[0] != backgrounds[1]
    assert page.locator(".chart").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.screenshot(path=screenshots / "data-phone.png")
    page.locator("#lengths").scroll_into_view_if_needed()
    page.screenshot(path=screenshots / "data-phone-lengths.png")


def test_text_is_shown_as_text(page: Any) -> None:
    assert page.evaluate("window.hacked") is None
    assert page.locator("script, iframe, img, form, textarea, base, math").count() == 0
    assert "<script>window.hacked=1</script>" in page.locator("main").inner_text()
    assert page.locator("h1").inner_text() == "train <b>x.jsonl"
