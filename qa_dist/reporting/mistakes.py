"""Kinds of wrong answers: every answer is right or of exactly one of `KINDS`.

An answer is compared with the references by its *place*: the one that the run noted (nbest.json), or else everywhere
that its text occurs in the context. Where it occurs several times, the place that speaks best for it counts: one that
overlaps a reference before one in its sentence before any other.
"""

from collections.abc import Sequence

from qa_dist.data.records import Example
from qa_dist.evaluation.normalization import Normalization
from qa_dist.reporting.sentences import sentence_starts, sentences_of

KINDS = {
    "answered_unanswerable": "answered, though there is no answer",
    "unanswered": "not answered, though there is an answer",
    "no_prediction": "no prediction at all",
    "too_long": "boundary: holds a whole reference and more",
    "too_short": "boundary: a part of a reference",
    "shifted": "boundary: overlaps a reference, neither holds the other",
    "wrong_words": "another part of the right sentence",
    "wrong_sentence": "in another sentence than every reference",
    "right_text_elsewhere": "the right text at another place (an exact match, though)",
    "place_unknown": "not in the context, or no reference has a place there",
}
"""Every kind, in the order of tables, and what it means."""

Place = tuple[int, int]


def mistake(
    example: Example,
    text: str | None,
    is_exact: bool,
    rules: Normalization,
    noted: Sequence[Place] = (),
) -> str | None:
    """The kind of mistake that an answer is, a key of `KINDS`; None if it is right.

    Args:
        example: The question.
        text: The predicted text; None if there is none.
        is_exact: Whether it matches exactly by the official rules.
        rules: What counts as the same: a text whose normal form is empty is no answer.
        noted: Where the run says that the text was found: first character, and one past the last.
    """
    if text is None:
        return "no_prediction"
    if is_exact:
        return "right_text_elsewhere" if _is_elsewhere(example, text, noted) else None
    if example.is_unanswerable:
        return "answered_unanswerable"
    if not rules.text(text).strip():
        return "unanswered"
    references = [(answer.start_char, answer.end_char) for answer in example.answers]
    places = places_of(example.context, text, noted)
    if not references or not places:
        return "place_unknown"
    overlaps = [
        (min(end, until) - max(start, begin), (start, end), (begin, until))
        for start, end in places
        for begin, until in references
        if start < until and begin < end
    ]
    if overlaps:
        # The reference that it shares most with; of several, the one nearest in length.
        _, place, reference = max(overlaps, key=lambda found: (found[0], -abs(_length(found[1]) - _length(found[2]))))
        return _boundary(place, reference)
    starts = sentence_starts(example.context)
    right = {number for reference in references for number in sentences_of(starts, *reference)}
    is_near = any(number in right for place in places for number in sentences_of(starts, *place))
    return "wrong_words" if is_near else "wrong_sentence"


def _boundary(place: Place, reference: Place) -> str:
    """The kind of an answer that overlaps a reference."""
    is_longer = place[0] <= reference[0] and place[1] >= reference[1]
    is_shorter = place[0] >= reference[0] and place[1] <= reference[1]
    if is_longer == is_shorter:
        # At both ends, or the same place, which rules that take texts as they are may tell apart.
        return "shifted"
    return "too_long" if is_longer else "too_short"


def _is_elsewhere(example: Example, text: str, noted: Sequence[Place]) -> bool:
    """Whether an exact match certainly is at none of the places of the references."""
    # A reference without a place may be anywhere.
    if not example.answers or example.other_texts:
        return False
    places = places_of(example.context, text, noted)
    return bool(places) and not any(
        start < answer.end_char and answer.start_char < end for start, end in places for answer in example.answers
    )


def places_of(context: str, text: str, noted: Sequence[Place]) -> list[Place]:
    """Where an answer stands: at the places that are noted, if its text is there, or everywhere."""
    if not text:
        return []
    found = [place for place in noted if context[place[0] : place[1]] == text]
    start = context.find(text) if not found else -1
    while start >= 0:
        found.append((start, start + len(text)))
        start = context.find(text, start + 1)
    return found


def _length(place: Place) -> int:
    return place[1] - place[0]
