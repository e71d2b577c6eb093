"""What was analysed as lines for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qa_dist.reporting.mistakes import KINDS
from qa_dist.reporting.slices import SLICINGS

_MAX_ROWS = 12
"""Of a slicing without end, such as titles."""

_WIDEST = 64
"""Characters of a cell: the longest description of a kind of mistakes."""

Row = Sequence[str]


def lines(analysis: Mapping[str, Any]) -> Iterator[str]:
    """The lines of what `analysis.analyze` gives."""
    level = f"{100 * analysis['level']:.0f} %"
    rules = "" if analysis["answer_normalization"] == "squad" else f", scored by {analysis['answer_normalization']}"
    yield f"{analysis['num_questions']:,} questions about {analysis['num_contexts']:,} contexts{rules}"
    yield (
        f"{level} intervals by bootstrap over contexts, and over questions; {analysis['num_resamples']:,} resamples, "
        f"seed {analysis['seed']}"
    )
    if analysis["warning"]:
        yield f"{analysis['warning']}: intervals are too narrow"
    yield ""
    heading = ("system", "EM", "contexts", "questions", "F1", "contexts", "questions")
    yield from _table([heading, *(_overall(system) for system in analysis["systems"])])
    if analysis["paired"]:
        yield ""
        yield f"differences, first minus second, with {level} intervals over contexts; p by approximate randomisation"
        yield "of contexts, and by paired bootstrap"
        yield from _table(
            [
                ("first", "second", *("EM", "", "p (rand.)", "p (boot.)"), *("F1", "", "p (rand.)", "p (boot.)")),
                *(_pair(pair) for pair in analysis["paired"]),
            ],
            num_names=2,
        )
    for group in analysis["seeds"]:
        yield ""
        seeds = f"{len(group['seeds'])} seeds ({', '.join(map(str, group['seeds']))})"
        names = ", ".join(map(_shown, group["systems"]))
        yield f"{seeds} of {names}, mean and standard deviation: " + (
            ", ".join(
                f"{name} {group[key]['mean']:.2f} +- {group[key]['std']:.2f}"
                for key, name in (("exact_match", "EM"), ("f1", "F1"))
            )
        )
    for note in analysis["notes"]:
        yield ""
        yield _note(note)
    for system in analysis["systems"]:
        yield ""
        yield f"== {_shown(system['name'])}"
        yield from _slices(system["slices"])
        yield from _mistakes(system["mistakes"])
        yield from _confidence(system)
        for note in system["notes"]:
            yield _note(note)


def _note(text: str) -> str:
    return f"note: {''.join(c if c.isprintable() else '?' for c in text)}"


def _overall(system: Mapping[str, Any]) -> Row:
    cells = [system["name"]]
    for name in ("exact_match", "f1"):
        score = system[name]
        cells += [_number(score["value"]), _ends(score), _ends(score["over_questions"])]
    return cells


def _pair(pair: Mapping[str, Any]) -> Row:
    cells = [pair["first"], pair["second"]]
    for name in ("exact_match", "f1"):
        score = pair[name]
        cells += [f"{score['value']:+.2f}", _ends(score), _chance(score["p_randomization"])]
        cells.append(_chance(score["p_bootstrap"]))
    return cells


def _slices(slices: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for by in dict.fromkeys(each["by"] for each in slices):
        members = [each for each in slices if each["by"] == by]
        rows = [
            (
                f"  {each['value']}",
                f"{each['n']:,}",
                *(cell for name in ("exact_match", "f1") for cell in (_number(each[name]["value"]), _ends(each[name]))),
                each["warning"] or "",
            )
            for each in members[:_MAX_ROWS]
        ]
        yield f"by {by}: {SLICINGS[by]}"
        yield from _table([("", "n", "EM", "", "F1", "", ""), *rows])
        if len(members) > _MAX_ROWS:
            yield f"  and {len(members) - _MAX_ROWS:,} more: --json has all"
        yield ""


def _mistakes(mistakes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = [each for each in mistakes if each["n"]]
    if not found:
        yield "no mistakes"
        return
    yield "mistakes"
    rows = [
        (f"  {KINDS[each['kind']]}", f"{each['n']:,}", f"{each['share']:.1f} %", _number(each["f1"])) for each in found
    ]
    yield from _table([("", "n", "share", "F1"), *rows])


def _confidence(system: Mapping[str, Any]) -> Iterator[str]:
    found, best = system["calibration"], system["null_threshold"]
    if found is not None:
        before, after = (
            f"{found[when]['ece']:.2f} ({found[when]['adaptive_ece']:.2f})" for when in ("before", "after")
        )
        yield (
            f"calibration: expected error {before} with equal (adaptive) bins, {after} with a temperature of the other "
            f"half of the contexts; temperature {found['temperature']:.3f} on {found['num_questions']:,} questions"
        )
    if best is not None and best["best_f1_thresh"] is None:
        yield f"null threshold: none is better than never to answer, which has F1 {best['best_f1']:.2f}"
    elif best is not None:
        yield (
            f"null threshold: F1 {best['best_f1']:.2f} at {best['best_f1_thresh']:.6g}, the best on these questions "
            "(--null_score_diff_threshold)"
        )


def _table(rows: Sequence[Row], num_names: int = 1) -> Iterator[str]:
    """Rows of equally many cells as lines: names to the left, numbers to the right, in columns as wide as need be."""
    rows = [[_shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if place < num_names else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _shown(text: str) -> str:
    """Text for a cell: titles and names are other people's, and may be long or hold what moves a terminal's cursor."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."


def _number(value: float) -> str:
    return f"{value:.2f}"


def _ends(interval: Mapping[str, float | None]) -> str:
    low, high = interval["low"], interval["high"]
    return "one context" if low is None or high is None else f"{low:.2f} to {high:.2f}"


def _chance(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
