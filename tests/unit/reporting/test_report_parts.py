"""Parts of a report: curves of few points, and contexts in pieces."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qa_dist.reporting.curves import kept_points, smoothed
from qa_dist.reporting.report_file import write_report
from qa_dist.reporting.shown_answers import marked

VALUES = st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=300)


@given(VALUES, st.integers(1, 20))
def test_few_points_keep_the_extremes(values: list[float], half: int) -> None:
    y = np.array(values)
    kept = kept_points(y, 2 * half)
    finite = np.flatnonzero(np.isfinite(y))
    assert len(kept) <= 2 * half
    assert (np.diff(kept) > 0).all()
    assert set(kept) <= set(finite)
    if len(finite):
        assert y[kept].max() == y[finite].max()
        assert y[kept].min() == y[finite].min()
    if len(finite) <= 2 * half:
        assert kept.tolist() == finite.tolist()


@given(st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(float("nan"))), max_size=60), st.integers(1, 9))
def test_means_are_those_of_a_plain_loop(values: list[float], width: int) -> None:
    y = np.array(values)
    for place, found in enumerate(smoothed(y, width)):
        around = y[max(0, place - width // 2) : place + (width + 1) // 2]
        around = around[np.isfinite(around)]
        assert found == pytest.approx(around.mean() if len(around) else np.nan, nan_ok=True, abs=1e-9)


@given(st.data(), st.integers(1, 2500))
def test_pieces_are_the_context_in_order_with_every_mark(data: st.DataObject, length: int) -> None:
    # No character is there twice, so that each is known by itself.
    context = "".join(map(chr, range(0x4E00, 0x4E00 + length)))
    place = st.tuples(st.integers(0, length), st.integers(0, length)).map(lambda ends: (min(ends), max(ends)))
    references, answers = (data.draw(st.lists(place, max_size=3)) for _ in range(2))
    pieces = list(marked(context, references, answers, around=40))
    shown = [(context.index(character), piece) for piece in pieces for character in piece.text]
    places = [at for at, _ in shown]
    assert places == sorted(set(places))
    for at, piece in shown:
        assert piece.is_reference == any(start <= at < end for start, end in references)
        assert piece.is_answer == any(start <= at < end for start, end in answers)
    for start, end in (*references, *answers):
        if start < end:
            assert {start, end - 1} <= set(places)
            assert end - start > 600 or set(range(start, end)) <= set(places)
    # Dots stand where something is left out, and nowhere else.
    num_gaps = (places[0] > 0) + (places[-1] < length - 1) + sum(b - a > 1 for a, b in itertools.pairwise(places))
    assert sum(not piece.text for piece in pieces) == num_gaps


def test_marks_in_a_context() -> None:
    context = "x" * 20 + " Ada Kerrow built the mill. " + "y" * 20
    start = context.index("Ada")
    found = list(marked(context, [(start, start + 10)], [(start + 4, start + 16)]))
    assert [(piece.text, piece.is_reference, piece.is_answer) for piece in found] == [
        ("x" * 20 + " ", False, False),
        ("Ada ", True, False),
        ("Kerrow", True, True),
        (" built", False, True),
        (" the mill. " + "y" * 20, False, False),
    ]


def test_far_marks_have_a_gap_between_them_and_words_stay_whole() -> None:
    context = " ".join(f"word{number}" for number in range(1000))
    first, last = context.index("word100"), context.index("word900")
    pieces = list(marked(context, [(first, first + 7)], [(last, last + 7)], around=60))
    texts = [piece.text for piece in pieces]
    assert [texts[0], texts[4], texts[8]] == ["", "", ""]
    assert (pieces[2].text, pieces[2].is_reference, pieces[6].text, pieces[6].is_answer) == (
        *("word100", True),
        *("word900", True),
    )
    known = set(context.split())
    assert {word for text in texts for word in text.split()} <= known
    assert len("".join(texts)) < 4 * 60 + 20


def test_a_long_mark_is_shown_at_both_ends() -> None:
    context = "a " * 5000
    pieces = list(marked(context, [], [(100, 9000)]))
    assert [bool(piece.text) for piece in pieces].count(False) == 2
    assert sum(len(piece.text) for piece in pieces) < 1100


def test_a_context_without_marks_is_shown_from_its_beginning() -> None:
    assert [piece.text for piece in marked("a " * 1000, [], [], around=50)] == ["a " * 49 + "a", ""]
    assert [piece.text for piece in marked("short", [], [])] == ["short"]


def test_names_do_not_turn_the_text_around_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    name, spelled = "a\u202eb\u2066c", r"a\u202eb\u2066c"
    for run in (tmp_path / name, tmp_path / "plain"):
        run.mkdir()
        (run / "config.yaml").write_text("- no options", encoding="utf-8")
        (run / "run.json").write_text('{"seconds": {"train": 1.0}}', encoding="utf-8")
        (run / "predictions.json").write_text('{"q": "x"}', encoding="utf-8")
    data = {"data": [{"paragraphs": [{"context": "A.", "qas": [{"id": "p", "question": "Q?", "answers": []}]}]}]}
    references = tmp_path / "dev.json"
    references.write_text(json.dumps(data), encoding="utf-8")
    written = write_report([tmp_path / name, tmp_path / "plain"], tmp_path / "report.html", references=references)
    html = written.path.read_text(encoding="utf-8")
    # What an element isolates turns nothing but itself.
    outside = re.sub("<bdi>[^<]*</bdi>", "", html)
    turning = "[\u202a-\u202e\u2066-\u2069]"
    assert re.search(turning, html)
    assert not re.search(turning, outside)
    assert not re.search(turning, str(written))
    for place in (
        f"<title>Report: {spelled}",
        f'title="{spelled}"',
        f"{spelled}/config.yaml",
        f"{spelled} answers none",
    ):
        assert place in outside
