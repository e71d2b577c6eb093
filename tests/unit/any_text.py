"""Strategies of text: arbitrary Unicode, and richer than chance in what breaks programs.

That is combining marks, emoji that are several characters, right-to-left scripts, characters without width, line ends
of every kind, NUL, and - where text has not been validated yet - halves of surrogate pairs, as `surrogateescape` makes
them.
"""

from hypothesis import strategies as st

CLUSTERS = (
    *("e\u0301", "n\u0303\u0323", "o\u0308\u0304", "\u0301", "\u1112\u1161\u11ab"),  # combining marks, jamo
    *("👩‍👩‍👧", "🏳️‍🌈", "🇸🇪", "👍🏽", "🦉", "\ufe0f"),  # emoji of one and of several characters
    *("שלום", "مرحبا", "\u202ea\u202c", "\u200f"),  # right to left
    *("\u200b", "\u200c", "\u200d", "\ufeff", "\u00ad", "\u2060"),  # no width
    *("\r\n", "\r", "\n", "\u2028", "\x85", "\x0b", "\t", "\u00a0", "\u3000", "  "),  # line ends, blanks
    *("\0", "\x7f", "\x1b", "\ufffd", "\U0010ffff"),
    *(
        "İ",
        "ß",
        "ẞ",
        "ŉ",
        "ǰ",
        "ﬁ",
        "Σ",
        "ς",
        "K",
        "Å",
        "½",
        "中文",
        "한국",
        "क्षि",
        "ก็",
    ),  # letters that change when cased
    *("a", "the", "an", "A", "stage", "b c", "12", ".", "'", '"', "##ing", "-", "_"),
    *("[SEP]", "[UNK]", "[CLS]", "[PAD]", "<s>", "</s>", "<pad>", "<cls>", "<row>"),  # tokens, or text that spells them
)
pieces = st.one_of(st.sampled_from(CLUSTERS), st.characters(exclude_categories=["Cs"]), st.sampled_from(" abcde"))
texts = st.lists(pieces, min_size=1, max_size=40).map("".join)
short_texts = st.lists(pieces, max_size=6).map("".join)
halves = st.sampled_from(["\ud83d", "\udc80", "\udcff", "\ud800\ud800"])
any_texts = st.lists(st.one_of(pieces, halves), max_size=12).map("".join)
often_good = st.integers(0, 9).flatmap(lambda number: any_texts if number == 9 else texts)
