"""The charts of a bench.json."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qa_dist.benchmarking.report import machine_name
from qa_dist.common.errors import UserError

_COLOUR, _SECOND, _THIRD = "#2f6f8f", "#c8553d", "#8a8f98"
_INCHES_PER_BAR = 0.32


def require_matplotlib() -> None:
    """Make sure that charts can be drawn, before anything is measured for them.

    Raises:
        UserError: They cannot.
    """
    if find_spec("matplotlib") is None:
        raise UserError("charts need matplotlib, which is not installed; pip install 'qa-dist[bench]'")


def draw(report: Mapping[str, Any], directory: Path) -> list[str]:
    """Draw what a bench.json has, and return the names of the files."""
    sections = report["sections"]
    drawn = []
    for name, title in (("trainer", "Training throughput"), ("paths", "Training throughput by path")):
        if name in sections:
            drawn.append(_bars(sections[name], title, directory / f"{name}.png"))
    if sections.get("scaling", {}).get("efficiency"):
        drawn.append(_efficiency(sections["scaling"], directory / "scaling.png"))
    return drawn


def _bars(section: Mapping[str, Any], title: str, path: Path) -> str:
    """Features per second of every result, the spread as whiskers."""
    results = [result for result in section["results"] if not result.get("out_of_memory")]
    rates = [result["features_per_second"] for result in results]
    medians = [rate["median"] for rate in rates]
    figure, axes = _figure(height=1.4 + _INCHES_PER_BAR * len(results))
    names = [result["name"] for result in results]
    colours = [_THIRD if name.startswith(("Trainer", "padded")) else _COLOUR for name in names]
    whiskers = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
    axes.barh(range(len(names)), medians, color=colours, xerr=whiskers, error_kw={"elinewidth": 1, "capsize": 2})
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    for place, value in enumerate(medians):
        axes.annotate(
            f" {value:.3g}", (value, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.margins(x=0.12)
    axes.set_xlabel("features per second (median; whiskers: least and greatest)")
    return _saved(figure, axes, f"{title}, {machine_name(section)}", path)


def _efficiency(section: Mapping[str, Any], path: Path) -> str:
    """Efficiency at every world size, and the ideal."""
    efficiencies = section["efficiency"]
    sizes = [1, *(entry["world_size"] for entry in efficiencies)]
    figure, axes = _figure(height=3.6)
    axes.plot(sizes, [1.0] * len(sizes), color="black", linestyle="--", linewidth=1, label="ideal")
    lines = {
        "weak_over_independent": ("weak, over independent processes at the same time", _COLOUR),
        "weak_over_one_process": ("weak, over one process alone", _SECOND),
        "strong_over_one_process": ("strong, over one process alone", _THIRD),
    }
    for name, (label, colour) in lines.items():
        measured = [(entry["world_size"], entry[name]) for entry in efficiencies if entry[name] is not None]
        middles = [1.0, *(values["median"] for _, values in measured)]
        below = [0.0, *(values["median"] - values["min"] for _, values in measured)]
        above = [0.0, *(values["max"] - values["median"] for _, values in measured)]
        places = [1, *(size for size, _ in measured)]
        axes.errorbar(places, middles, yerr=[below, above], color=colour, marker="o", capsize=3, label=label)
    axes.set_xticks(sizes)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ranks")
    axes.set_ylabel("efficiency")
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    return _saved(figure, axes, f"Scaling, {machine_name(section)}", path)


def _figure(height: float) -> tuple[Any, Any]:
    # Not pyplot: it looks for a display and keeps every figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained", dpi=150)
    return figure, figure.add_subplot()


def _saved(figure: Any, axes: Any, title: str, path: Path) -> str:
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    # No version and no date in the file: the same figures give the same bytes.
    figure.savefig(path, metadata={"Software": None})
    return path.name
