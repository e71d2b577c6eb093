"""An HTML page taken apart, as a browser would take it."""

from collections import Counter
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "path", "use"}


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and its text by the id of the heading before it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.marks: list[tuple[str, str]] = []
        self.parts: dict[str, str] = {"": ""}
        self._open: list[str] = []
        self._part = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += attrs
        named = dict(attrs)
        if tag == "h2":
            self._part = str(named["id"])
            self.parts[self._part] = ""
        if tag == "mark":
            self.marks.append((str(named["class"]), ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.parts[self._part] += data
        if self._open and self._open[-1] == "mark":
            kind, text = self.marks.pop()
            self.marks.append((kind, text + data))

    @property
    def text(self) -> str:
        return "".join(self.parts.values())
