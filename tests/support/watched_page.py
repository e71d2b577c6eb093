"""A page in a browser that is watched: what it says in the console, and what it loads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def watched_page(
    browser: Any, address: str, *, is_noise: Callable[[str], bool] = lambda text: False, **context: Any
) -> Iterator[tuple[Any, list[str]]]:
    """The page at an address, and the addresses of all that it loads; it may leave no message in the console.

    Args:
        browser: The browser.
        address: Where the page is.
        is_noise: Messages in the console that do not count.
        context: Options of the browser's context, such as the size of the window.
    """
    opened_in = browser.new_context(**context)
    opened = opened_in.new_page()
    said: list[str] = []
    loaded: list[str] = []
    opened.on("console", lambda message: None if is_noise(message.text) else said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: loaded.append(request.url))
    opened.goto(address)
    yield opened, loaded
    opened_in.close()
    assert said == []
