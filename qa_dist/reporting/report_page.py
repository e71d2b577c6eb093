"""The report of runs as one page: it loads nothing, needs no script, and is as light or dark as its reader likes.

All text goes through the template's escaping: what a context, an answer or a name holds is shown, never obeyed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qa_dist.reporting.drawings import NUM_COLOURS, curves, reliability, scores
from qa_dist.reporting.mistakes import KINDS
from qa_dist.reporting.pages import rendered
from qa_dist.reporting.report_runs import (
    chosen_options,
    duration,
    fact_rows,
    figures,
    option_rows,
    peak_memory,
    state,
)
from qa_dist.reporting.report_scores import Scored
from qa_dist.reporting.run_folders import Run
from qa_dist.reporting.slices import ORDERS, SLICINGS

MAX_SLICES = 12
"""Of a slicing without end, such as titles."""

MAX_EVALUATIONS = 40
"""Rows of a table of evaluations; the curve has all."""


class Chart(NamedTuple):
    """A chart: what it shows, and the element."""

    title: str
    svg: str


class Bar(NamedTuple):
    """A bar: a label, the number of its run, the figure in words, and its length as a percentage of the longest."""

    label: str
    run: int
    words: str
    percent: float


class Scale(NamedTuple):
    """The scale that scores are drawn on, from and to a multiple of ten."""

    low: int
    high: int

    @classmethod
    def of(cls, intervals: Sequence[Mapping[str, float | None]]) -> "Scale":
        """The narrowest scale that has these intervals, and their values."""
        ends = [each[name] for each in intervals for name in ("low", "value", "high")]
        known = [end for end in ends if end is not None] or [0.0, 100.0]
        low = 10 * math.floor(min(known) / 10)
        return cls(low, max(low + 10, 10 * math.ceil(max(known) / 10)))

    def place(self, score: float) -> float:
        """Where a score is on the scale, in percent of its length."""
        return 100 * (score - self.low) / (self.high - self.low)


def page(runs: Sequence[Run], scored: Scored) -> str:
    """The report as HTML: the same for the same runs, to the byte."""
    analysis = scored.analysis
    by_run: dict[int, Mapping[str, Any]] = {}
    if analysis is not None:
        by_run = dict(zip(scored.runs, analysis["systems"], strict=True))
    scale = Scale.of([each["f1"] for found in by_run.values() for each in found["slices"]])

    return rendered(
        "report.html",
        {
            "runs": runs,
            "colours": [number % NUM_COLOURS + 1 for number in range(len(runs))],
            "states": [state(run) for run in runs],
            "figures": [list(figures(run, by_run.get(number))) for number, run in enumerate(runs)],
            "scored": scored,
            "analysis": analysis,
            "by_run": by_run,
            "chosen": chosen_options(runs),
            "options": option_rows(runs),
            "facts": fact_rows(runs),
            "charts": list(_charts(runs, by_run)),
            "evaluations": [_evaluations(run) for run in runs],
            "phases": _phases(runs),
            "resumed": any(run.record.get("resumed_at_steps") for run in runs),
            "memory": _memory(runs),
            "scale": scale,
            "slicings": list(_slicings(by_run)),
            "mistakes": _mistakes(by_run),
            "kinds": KINDS,
            "reliabilities": _reliabilities(by_run),
            "calibrations": {
                number: list(run.calibration.lines()) for number, run in enumerate(runs) if run.calibration
            },
        },
        {
            "chance": lambda value: "\u2013" if value is None else f"{value:.4f}",
            "on_scale": lambda value: f"{scale.place(value):.2f}",
        },
    )


def _charts(runs: Sequence[Run], by_run: Mapping[int, Mapping[str, Any]]) -> Iterator[Chart]:
    """The curves of all runs that have any, one chart for each figure."""
    logged = [(number, run) for number, run in enumerate(runs) if len(run.steps["step"])]

    def series(name: str) -> list[tuple[int, Any, Any]]:
        return [(number, run.steps["step"], run.steps[name]) for number, run in logged if _has(run.steps[name])]

    evaluated = [
        (number, [each["step"] for each in found], [each["loss"] for each in found])
        for number, run in enumerate(runs)
        if (found := [each for each in run.evaluations if "loss" in each])
    ]
    if loss := series("loss"):
        dashed = ", validation (dashed)" if evaluated else ""
        yield Chart(f"Loss: training{dashed}", curves(loss, "loss over steps", dots=evaluated))
    finals = [
        {"run": number, "step": _step_of_weights(runs[number]), **{name: found[name] for name in ("f1", "exact_match")}}
        for number, found in by_run.items()
    ]
    noted = [(number, run.evaluations) for number, run in enumerate(runs) if any("f1" in e for e in run.evaluations)]
    if noted:
        yield Chart("F1 (solid), exact match (dashed), %", scores(noted, finals))
    if rates := series("learning_rate"):
        yield Chart("Learning rate", curves(rates, "learning rate over steps", is_noisy=False))
    if norms := series("grad_norm"):
        together = np.concatenate([y[np.isfinite(y)] for _, _, y in norms])
        is_log = bool(together.min() > 0 and together.max() > 30 * together.min())
        scale = ", logarithmic" if is_log else ""
        yield Chart(f"Gradient norm before clipping{scale}", curves(norms, "gradient norm over steps", is_log=is_log))
    if tokens := series("num_tokens"):
        yield Chart("Real tokens of a step, all ranks", curves(tokens, "tokens over steps"))
    timed = [(number, run.steps) for number, run in logged if _has(run.steps["step_seconds"])]
    rates = [(number, found["step"], found["num_tokens"] / found["step_seconds"]) for number, found in timed]
    if rates:
        yield Chart("Real tokens a second, all ranks", curves(rates, "tokens a second over steps"))
    shared = [
        (number, found["step"], found["most_tokens"] * found["world_size"] / found["num_tokens"])
        for number, found in timed
        if _has(found["world_size"]) and np.nanmax(found["world_size"]) > 1
    ]
    if shared:
        yield Chart("Tokens of the rank with the most, over the mean", curves(shared, "token balance over steps"))


def _has(values: Any) -> bool:
    return bool(np.isfinite(values).any())


def _step_of_weights(run: Run) -> float:
    noted = run.record.get("weights_of_step")
    return noted if isinstance(noted, int) else run.num_steps


def _evaluations(run: Run) -> list[dict[str, Any]]:
    """Evaluations of a run as rows; of many, evenly spread ones with the first and the last."""
    found = run.evaluations
    kept = range(len(found))
    if len(found) > MAX_EVALUATIONS:
        kept = sorted({round(place) for place in np.linspace(0, len(found) - 1, MAX_EVALUATIONS)})  # type: ignore[assignment]
    return [
        {"step": int(found[place]["step"]), **{name: found[place].get(name) for name in ("loss", "f1", "exact_match")}}
        for place in kept
    ]


def _phases(runs: Sequence[Run]) -> list[Bar]:
    rows = [(name, number, value) for number, run in enumerate(runs) for name, value in run.numbers("seconds").items()]
    longest = max((value for _, _, value in rows), default=0.0) or 1.0
    return [Bar(label, run, duration(value), 100 * value / longest) for label, run, value in rows]


def _memory(runs: Sequence[Run]) -> list[Bar]:
    """The memory of every rank; of more than 16 ranks of a run, those with the most and the least."""
    rows: list[tuple[str, int, float]] = []
    for number, run in enumerate(runs):
        memory = peak_memory(run)
        ranks = list(range(len(memory)))
        if len(memory) > 16:
            ranks = [int(np.argmax(memory)), int(np.argmin(memory))]
        rows += [(f"rank {rank}", number, memory[rank]) for rank in ranks]
    longest = max((value for _, _, value in rows), default=1.0) or 1.0
    return [Bar(label, run, f"{value / 2**30:.2f} GiB", 100 * value / longest) for label, run, value in rows]


def _slicings(by_run: Mapping[int, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every slicing that some run has: its slices in order, with the numbers and scores of each run."""
    for by, meaning in SLICINGS.items():
        rows: dict[str, dict[str, Any]] = {}
        for number, found in by_run.items():
            for each in found["slices"]:
                if each["by"] == by:
                    row = rows.setdefault(each["value"], {"value": each["value"], "scores": {}})
                    row["scores"][number] = each
        if rows:
            # The first run may have no question of a slice that others have.
            rows = {value: rows[value] for value in ORDERS.get(by, rows) if value in rows}
            yield {
                "by": by,
                "meaning": meaning,
                "rows": list(rows.values())[:MAX_SLICES],
                "num_more": max(0, len(rows) - MAX_SLICES),
            }


def _mistakes(by_run: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The kinds of mistakes that some run made, with how many of each."""
    rows = []
    for place, kind in enumerate(KINDS):
        found = {number: each["mistakes"][place] for number, each in by_run.items()}
        if any(each["n"] for each in found.values()):
            rows.append({"meaning": KINDS[kind], "runs": found})
    return rows


def _reliabilities(by_run: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """The reliability diagram of each run with a calibration."""
    return {
        number: reliability(number, found["calibration"]["before"]["bins"], found["calibration"]["after"]["bins"])
        for number, found in by_run.items()
        if found["calibration"] is not None
    }
