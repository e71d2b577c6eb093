"""Charts as SVG for a page: without a colour or a font of their own, so that they are the page's, light or dark.

matplotlib draws with colours that stand for the page's (CSS variables) and are put in their place afterwards. A chart
is narrow, so that its letters can be read on a phone.
"""

import io
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from qa_dist.common.arrays import Float64
from qa_dist.common.errors import UserError
from qa_dist.reporting.curves import kept_points, smoothed

NUM_COLOURS = 6
MAX_POINTS = 400
"""Of a curve in a chart: more than its pixels."""

_SMOOTHED = 60
"""Steps of a curve from which on its mean is drawn in front of it."""

_STANDS_FOR = {
    **{f"#0000a{number}": f"var(--c{number})" for number in range(1, NUM_COLOURS + 1)},
    "#0000b1": "var(--ink)",
    "#0000b2": "var(--soft)",
    "#0000b3": "var(--line)",
}
_INK, _SOFT, _LINE = "#0000b1", "#0000b2", "#0000b3"
_WIDTH = 4.2
"""Inches, of 72 units each."""

Series = Sequence[tuple[int, Sequence[float] | Float64, Sequence[float] | Float64]]
"""Curves: the number of the run, which gives the colour, and x and y."""


def require_matplotlib(what: str = "a report") -> None:
    """Make sure that charts can be drawn, before anything is read for what they belong to.

    Raises:
        UserError: They cannot.
    """
    if find_spec("matplotlib") is None or find_spec("jinja2") is None:
        raise UserError(f"{what} needs matplotlib and Jinja2, which are not installed; pip install 'qa-dist[bench]'")


def colour(run: int) -> str:
    """The colour of a run, counted from 0, as matplotlib gets it."""
    return f"#0000a{run % NUM_COLOURS + 1}"


def curves(series: Series, label: str, *, dots: Series = (), is_log: bool = False, is_noisy: bool = True) -> str:
    """Curves over steps; of long noisy ones the mean before the values. `dots` are joined measurements of their own."""
    figure, axes = _figure(2.5, has_steps=True)
    for run, x, y in series:
        x, y = np.asarray(x), np.asarray(y)
        is_long = is_noisy and len(y) >= _SMOOTHED
        kept = kept_points(y, MAX_POINTS)
        axes.plot(x[kept], y[kept], color=colour(run), linewidth=0.8 if is_long else 1.4, alpha=0.35 if is_long else 1)
        if is_long:
            mean = smoothed(y, max(5, len(y) // 25))
            kept = kept_points(mean, MAX_POINTS)
            axes.plot(x[kept], mean[kept], color=colour(run), linewidth=1.6)
        elif len(kept) == 1:
            axes.plot(x[kept], y[kept], color=colour(run), marker="o", markersize=3)
    for run, x, y in dots:
        kept = kept_points(np.asarray(y, np.float64), MAX_POINTS)
        x, y = np.asarray(x)[kept], np.asarray(y)[kept]
        axes.plot(x, y, color=colour(run), linestyle="--", linewidth=1, marker="o", markersize=3.5)
    if is_log:
        axes.set_yscale("log")
    return _svg(figure, axes, label)


def scores(
    evaluations: Sequence[tuple[int, Sequence[Mapping[str, float]]]], finals: Sequence[Mapping[str, Any]]
) -> str:
    """F1 (solid) and exact match (dashed) of evaluations over steps, and what a run ends with, with its intervals.

    Args:
        evaluations: the number of a run, and its evaluations in order.
        finals: `run`, `step`, and `f1` and `exact_match` as intervals.
    """
    figure, axes = _figure(2.5, has_steps=True)
    for name, style in (("f1", "-"), ("exact_match", "--")):
        for run, found in evaluations:
            points = [(each["step"], each[name]) for each in found if name in each]
            if points:
                x, y = (np.array(column, np.float64) for column in zip(*points, strict=True))
                kept = kept_points(y, MAX_POINTS)
                axes.plot(x[kept], y[kept], color=colour(run), linestyle=style, linewidth=1.2, marker="o", markersize=3)
        for final in finals:
            score = final[name]
            if score["low"] is not None:
                whiskers = [[max(0, score["value"] - score["low"])], [max(0, score["high"] - score["value"])]]
                style_of_run = {"color": colour(final["run"]), "capsize": 3, "elinewidth": 1}
                axes.errorbar([final["step"]], [score["value"]], yerr=whiskers, **style_of_run)
    return _svg(figure, axes, "F1 and exact match over steps")


def reliability(run: int, before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> str:
    """How many answers of a confidence match exactly: as given (larger dots: more answers), and with a temperature."""
    figure, axes = _figure(2.9)
    axes.plot([0, 100], [0, 100], color=_SOFT, linewidth=0.9, linestyle=":")
    most = max((each["n"] for each in before), default=1)
    axes.plot(*_points(after), color=_SOFT, linewidth=1.1, linestyle="--")
    axes.plot(*_points(before), color=colour(run), linewidth=1.2)
    sizes = [6 + 54 * each["n"] / most for each in before]
    axes.scatter(*_points(before), s=sizes, color=colour(run), zorder=3)
    axes.set_xlim(-3, 103)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("confidence, %")
    return _svg(figure, axes, "exact match over confidence")


def histogram(bins: Sequence[Mapping[str, int]], label: str) -> str:
    """How many values are in each bin of whole numbers, from `first` to `last`, both included."""
    figure, axes = _figure(1.9)
    starts = [each["first"] for each in bins]
    widths = [each["last"] - each["first"] + 1 for each in bins]
    axes.bar(
        starts,
        [each["n"] for each in bins],
        [0.92 * width for width in widths],
        align="edge",
        color=colour(0),
        linewidth=0,
    )
    axes.grid(visible=False, axis="x")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(_whole_numbers())
    axes.set_xlabel("tokens")
    return _svg(figure, axes, label)


def _points(bins: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    return [each["confidence"] for each in bins], [each["exact_match"] for each in bins]


def _figure(height: float, *, has_steps: bool = False) -> tuple[Any, Any]:
    # Not pyplot: it looks for a display and keeps every figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    if has_steps:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(_whole_numbers())
    return figure, axes


def _whole_numbers() -> Any:
    """Up to six ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(6, integer=True, min_n_ticks=1)


def _svg(figure: Any, axes: Any, label: str) -> str:
    """The figure as an element of a page, with what it shows for those who do not see it."""
    import matplotlib as mpl

    first, last = axes.dataLim.intervalx
    if first == last:
        # Around a single step the scale would have parts of steps.
        axes.set_xlim(first - 1, last + 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_LINE)
    axes.tick_params(labelsize=8.5, colors=_SOFT, length=0)
    axes.set_xlabel(axes.get_xlabel(), fontsize=8.5, color=_SOFT, loc="right")
    for text in (axes.yaxis.get_offset_text(), axes.xaxis.get_offset_text()):
        text.set_color(_SOFT)
        text.set_fontsize(8)
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    written = io.StringIO()
    # The same figures give the same text: no date, and names that do not change.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qa_dist", "path.simplify": True}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_a_page(written.getvalue(), label)


def _for_a_page(text: str, label: str) -> str:
    """What matplotlib writes as an element: without its prologue, its colours, its fonts and its names."""
    text = text[text.index("<svg") :]
    # A style in here would be one of the whole page.
    for unwanted in ("metadata", "style"):
        text = re.sub(rf"<{unwanted}\b[^>]*>.*?</{unwanted}>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    element = rf'<svg \1 class="chart" role="img" aria-label="{label}">'
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', element, text, count=1)
    # Groups are called the same in every chart; what is referred to (clip paths, markers) is named by its content.
    text = re.sub(r'<g id="[^"]*"(?:/>\s*|>\s*</g>\s*)', "", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub(r' (?:d|x|y|x1|y1|width|height|transform)="[^"]*"', lambda found: _rounded(found[0]), text)
    for hexadecimal, variable in _STANDS_FOR.items():
        text = text.replace(hexadecimal, variable)
    return re.sub(r"\n\s*", "\n", text).strip()


def _rounded(text: str) -> str:
    """The text with the digits of its numbers that can be seen."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)
