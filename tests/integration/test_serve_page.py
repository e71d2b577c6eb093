"""The page of `qa-dist serve` in a real browser: Debian's Chromium, driven by playwright; its reader has no model.

Screenshots are left in the tests' output folder, or in the one that QA_DIST_SCREENSHOTS names.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from tests.support.chromium import IN_A_BROWSER
from tests.support.watched_page import watched_page
from tests.unit.answering.fake_reader import FakeReader, make_service, served
from tests.unit.answering.xss import CORPUS

pytestmark = IN_A_BROWSER

TEXT = (
    "The lighthouse of Orrin Head was lit for the first time in the autumn of 1874. Its builder was Maud Telfer, who "
    "had the stones cut and fitted ashore.\n\nFor eighty years three keepers lived in the tower. The first builder was "
    "Ann Orr, some say, and the last builder was nobody at all."
)
KEY = "a-key-for-the-browser"


@pytest.fixture(scope="module")
def reader() -> FakeReader:
    return FakeReader()


@pytest.fixture(scope="module")
def address(reader: FakeReader) -> Iterator[str]:
    with served(make_service(reader)) as address:
        yield address


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A page that has loaded; it may load nothing but the server, and leave no message in the console."""
    view = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"}
    # The browser itself notes every response that is an error.
    with watched_page(browser, address, is_noise=lambda text: "Failed to load" in text, **view) as (opened, loaded):
        yield opened
    assert [url for url in loaded if not url.startswith((address, "data:"))] == []


def ask(page: Any, text: str, question: str) -> None:
    """What somebody does who uses the keyboard alone: the text has the focus at first."""
    if page.locator("#text").is_hidden():
        page.keyboard.press("Escape")
    # `fill` inserts a line at a time, which takes minutes for thousands of lines.
    paste = "(field, text) => { field.value = text; field.dispatchEvent(new Event('input')); }"
    page.locator("#text").evaluate(paste, text)
    page.locator("#text").focus()
    page.keyboard.press("Tab")
    while not page.evaluate("document.activeElement.id === 'question'"):
        page.keyboard.press("Tab")
    page.locator("#question").fill(question)
    page.keyboard.press("Control+Enter")


def answered(page: Any) -> str:
    """The answer that the page shows, when it does."""
    page.locator("#result").wait_for()
    return str(page.locator("#answer").inner_text())


def marked(page: Any) -> tuple[int, str]:
    """Where the mark begins in the text that is shown, in UTF-16 units, and what it covers."""
    script = """() => {
        const mark = document.querySelector("#reading mark"), before = document.createRange();
        before.setStart(document.querySelector("#reading"), 0);
        before.setEndBefore(mark);
        return [before.toString().length, mark.textContent];
    }"""
    start, text = page.evaluate(script)
    return start, text


def in_sight(page: Any) -> bool:
    """Whether the mark lies within the part of the text that is shown."""
    return bool(
        page.evaluate("""() => {
            const mark = document.querySelector("#reading mark").getBoundingClientRect();
            const view = document.querySelector("#reading").getBoundingClientRect();
            return mark.top >= view.top && mark.bottom <= view.bottom && mark.height > 0;
        }""")
    )


def test_an_answer_is_marked_in_the_text_and_others_can_be_looked_at(page: Any, screenshots: Path) -> None:
    assert page.evaluate("document.activeElement.id") == "text"
    ask(page, TEXT, "after was")
    assert answered(page) == "lit for"
    assert marked(page) == (TEXT.index("lit for"), "lit for")
    assert page.locator("#result .sure b").inner_text() == "50 %"
    others = page.locator("#others button")
    assert others.count() == 4
    others.nth(2).focus()
    page.keyboard.press("Enter")
    assert marked(page) == (TEXT.index("Ann Orr"), "Ann Orr,")
    assert others.nth(2).get_attribute("aria-pressed") == "true"
    assert page.locator("#reading").inner_text() == TEXT
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=screenshots / f"answer-{scheme}.png")
    # Back to the text, which is as it was.
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "text"
    assert page.locator("#text").input_value() == TEXT


def test_characters_beyond_the_first_plane_do_not_move_the_mark(page: Any) -> None:
    text = "\U0001f600 \U0001f3f4\U000e0067\U000e0062 e\u0301 \U00020000 behold \U0001f600yes it is"
    ask(page, text, "after behold")
    assert answered(page) == "\U0001f600yes it"
    start, found = marked(page)
    assert found == "\U0001f600yes it"
    assert start == len(text[: text.index("\U0001f600yes")].encode("utf-16-le")) // 2


def test_no_answer_is_said_plainly(page: Any, screenshots: Path) -> None:
    ask(page, TEXT, "after goats")
    assert answered(page) == "The text does not answer this question."
    assert page.locator("#result h2").first.inner_text() == "No answer"
    assert page.locator("#reading mark").count() == 0
    assert "No answer" in page.locator("#said").inner_text()
    page.screenshot(path=screenshots / "no-answer.png")


def test_a_long_text_is_scrolled_to_its_answer_and_a_longer_one_is_not_sent(
    page: Any, reader: FakeReader, screenshots: Path
) -> None:
    text = "A line of a long text, like all others.\n" * 2400 + "It ends with behold the answer. \n" + "More.\n" * 300
    ask(page, text, "after behold")
    assert answered(page).startswith("the answer.")
    assert marked(page)[0] == text.index("the answer.")
    assert in_sight(page)
    page.screenshot(path=screenshots / "long-text.png")
    before = len(reader.chunks)
    ask(page, "x" * 100_001, "after x")
    page.locator("#problem").wait_for()
    assert "at most 100,000 characters" in page.locator("#problem").inner_text()
    assert "over" in str(page.locator("#count").get_attribute("class"))
    assert len(reader.chunks) == before


def test_a_narrow_window(page: Any, screenshots: Path) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.screenshot(path=screenshots / "phone-empty.png")
    ask(page, TEXT * 3, "after was")
    answered(page)
    assert in_sight(page)
    # Nothing is wider than the window, and the answer is read without scrolling.
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("#answer").bounding_box()
    assert box["y"] + box["height"] < 740
    page.screenshot(path=screenshots / "phone.png")
    page.set_viewport_size({"width": 280, "height": 600})
    assert page.evaluate("document.documentElement.scrollWidth") <= 280


def test_what_is_missing_is_said(page: Any) -> None:
    page.keyboard.press("Control+Enter")
    assert "no text yet" in page.locator("#problem").inner_text()
    page.locator("#text").fill("words")
    page.keyboard.press("Control+Enter")
    assert "question first" in page.locator("#problem").inner_text()
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("refuse me")
    page.keyboard.press("Enter")
    page.locator("#problem", has_text="this reader refuses").wait_for()


def test_the_example_can_be_asked(page: Any, screenshots: Path) -> None:
    page.screenshot(path=screenshots / "empty.png")
    page.locator("#example").click()
    page.locator("#question").fill("after tower.")
    page.keyboard.press("Enter")
    assert answered(page) == "They kept"


def test_text_is_shown_as_text(page: Any) -> None:
    for first in range(0, len(CORPUS), 5):
        texts = CORPUS[first : first + 5]
        context = "".join(f"behold {text} | " for text in texts)
        # As an answer and as others, in the text and in a question.
        ask(page, context, "after behold")
        page.locator("#result").wait_for()
        assert page.locator("#reading").text_content() == context
        assert page.locator("#reading *").count() == 1
        assert page.locator("#others li").count() == len(texts)
        ask(page, "x", context)
        page.locator("#answer.none").wait_for()
        assert page.evaluate("window.hacked") is None
    assert page.locator("script, style, iframe, img, svg, form").count() == 3


def test_the_page_for_programs(page: Any, address: str, screenshots: Path) -> None:
    page.goto(f"{address}docs")
    page.locator("h2", has_text="POST /answer").wait_for()
    assert "start_char" in page.locator("main").inner_text()
    page.screenshot(path=screenshots / "docs.png", full_page=True)


def test_a_server_that_needs_a_key_goes_away_and_comes_back(browser: Any, screenshots: Path) -> None:
    page = browser.new_page(reduced_motion="reduce")
    reader = FakeReader()
    with served(make_service(reader, keys=[KEY.encode()])) as address:
        page.goto(address)
        page.locator("#key-field").wait_for()
        ask(page, TEXT, "after builder")
        page.locator("#problem", has_text="needs a key").wait_for()
        page.locator("#key").fill(KEY)
        page.keyboard.press("Enter")
        assert answered(page) == "was Maud"
    port = int(address.rstrip("/").rpartition(":")[2])
    ask(page, TEXT, "after stones")
    page.locator("#problem", has_text="The server does not answer").wait_for()
    assert page.locator("#text").input_value() == TEXT
    assert "server away" in page.locator("#model").inner_text()
    page.screenshot(path=screenshots / "away.png")
    with served(make_service(reader, keys=[KEY.encode()]), port):
        page.locator("#problem", has_text="The server is back").wait_for()
        page.keyboard.press("Control+Enter")
        assert answered(page) == "cut and"
        page.close()


def test_reading_can_be_given_up(page: Any, reader: FakeReader, screenshots: Path) -> None:
    reached, goes_on = threading.Event(), threading.Event()

    def wait(questions: Any) -> None:
        reached.set()
        goes_on.wait(20)

    reader.hook = wait
    ask(page, TEXT, "after was")
    assert reached.wait(20)
    page.locator("#answering").wait_for()
    assert page.locator("#ask").get_attribute("aria-disabled") == "true"
    page.screenshot(path=screenshots / "reading.png")
    page.keyboard.press("Escape")
    page.locator("#answering").wait_for(state="hidden")
    reader.hook = lambda questions: None
    goes_on.set()
    assert page.locator("#problem").is_hidden()
