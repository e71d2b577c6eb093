"""Writes the results into docs/gpu.md, between its markers, from the files that `bench gpu` wrote."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qa_dist.benchmarking.counted import markdown_table
from qa_dist.benchmarking.gpu.items import is_number
from qa_dist.benchmarking.report import NOT_MEASURED, write_page
from qa_dist.common.command import Parser
from qa_dist.common.errors import UserError
from qa_dist.common.parsers import read_json

BEGIN, END = "<!-- results: written by `python -m qa_dist.bench gpu report` -->", "<!-- end of results -->"

Figures = Mapping[str, Any]
Results = dict[str, dict[str, Any]]

_LAUNCHED = "train q, v, batch 32"
_GRAPHS = f"{_LAUNCHED}, graphs"
_EVALUATION = "evaluation with graphs"
_COMPILED = f"{_LAUNCHED}, compiled layers"

PREDICTIONS: tuple[tuple[str, str, str, str, float], ...] = (
    (f"{_LAUNCHED}, peft", "ms_per_step", "ms a step, LoRA on q and v by peft, batch of 32", "at most 11", 1),
    (f"{_LAUNCHED}, peft", "launches_per_step", "launches of the same, the optimiser's included", "at most 1,200", 1),
    (_LAUNCHED, "ms_per_step", "ms a step with LoRA layers in groups", "at most 35", 1),
    (_GRAPHS, "ms_per_step", "ms a step with groups, replayed as graphs", "7 to 16", 1),
    (_GRAPHS, "fraction_of_989", "share of 989 TFLOP/s of the same", "0.18 to 0.20", 1),
    (_GRAPHS, "syncs_per_step", "waits of the host a step", "at most 1", 1),
    ("epoch", "seconds", "seconds an epoch of the same", "at most 30", 1),
    (_COMPILED, "ms_per_step", "ms a step with compiled layers", "at most 41", 1),
    (f"{_GRAPHS}, compiled layers", "ms_per_step", "ms a step with both", "12 to 14", 1),
    (_COMPILED, "launches_per_step", "launches a step with compiled layers", "at most 700", 1),
    (_COMPILED, "start_seconds", "seconds to compile and compare them", "70 to 100", 1),
    (_EVALUATION, "launched_ms_16384", "ms an evaluation batch of 16,384 tokens, launched", "9 to 13", 1),
    (_EVALUATION, "replayed_ms_16384", "ms the same, replayed", "9 to 12", 1),
    (_EVALUATION, "launched_ms_2048", "ms an evaluation batch of 2,048 tokens, launched", "6 to 10", 1),
    (_EVALUATION, "replayed_ms_2048", "ms the same, replayed", "1.2 to 2.5", 1),
    ("machine", "bf16_flops_per_second", "TFLOP/s of large bf16 products", "about 800", 1e-12),
)
"""Item, figure, what it is, what was predicted for one H100, and the factor of the unit."""


def main(argv: Sequence[str], prog: str) -> int:
    """Write the page."""
    parser = Parser(prog=prog, description=__doc__, allow_abbrev=False)
    parser.add_argument("files", nargs="*", type=Path, metavar="GPU.JSONL", help="results; none: not yet measured")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the page, as docs/gpu.md")
    options = parser.parse_args(argv)
    try:
        text = options.output.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--output {options.output} cannot be read ({error}); name a page with the markers") from error
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"--output {options.output} has no lines {BEGIN} and {END}; put them where results belong")
    write_page(
        "".join([before, begin, results_text([read(path) for path in options.files]), end, after]), options.output
    )
    return 0


def read(path: Path) -> tuple[Figures, Results]:
    """Where the items of a file ran, and what became of each: of several runs the last in which it was reached.

    Raises:
        UserError: It is no such file, or of a rehearsal.
    """
    origin: dict[str, Any] = {}
    results: Results = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            values = read_json(line)
            if "format" in values:
                origin = values
            elif values["status"] != "not reached" or values["item"] not in results:
                results[values["item"]] = dict(values)
        name = origin["machine"]["devices"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as results of bench gpu ({error!s:.200}); give a gpu.jsonl") from error
    if origin["rehearsal"] or not name:
        raise UserError(f"{path} is of a rehearsal, whose figures mean nothing; give the gpu.jsonl of a GPU")
    return origin, results


def results_text(measured: Sequence[tuple[Figures, Results]]) -> str:
    """The part between the markers."""
    if not measured:
        rows = [[what, predicted, NOT_MEASURED] for _, _, what, predicted, _ in PREDICTIONS]
        return "\n".join([*_table(["one H100", "predicted", "measured"], rows), "", ""])
    return "\n".join(line for origin, results in measured for line in _machine(origin, results))


def _machine(origin: Figures, results: Results) -> list[str]:
    devices, used = origin["machine"]["devices"], origin["versions"]
    lines = [f"### {len(devices)} x {devices[0]}", ""]
    lines += [
        f"{origin['started'][:10]}, torch {used['torch']}, CUDA {used['cuda']}, driver {used['driver']}, transformers "
        f"{used['transformers']}, commit {(origin['commit'] or 'unknown')[:12]}{' ' if origin['note'] else ''}"
        f"{origin['note']}.",
        "",
    ]
    rows = [
        [what, predicted, _number(_figure(results, item, name), unit)]
        for item, name, what, predicted, unit in PREDICTIONS
    ]
    lines += [*_table(["", "predicted", "measured"], rows), ""]
    lines += ["Training, bf16, features of SQuAD's lengths, BERT base with random weights and its dropout:", ""]
    lines += [*_speed_table(results), ""]
    lines += ["SQuAD v1.1, MiniLM-L6, two epochs, batch of 128, bf16:", "", *_squad_table(results), ""]
    lines += ["Checks:", "", *_check_table(results), ""]
    return lines


def _speed_table(results: Results) -> list[str]:
    heads = ["", "ms a step", "real tokens/s", "of products", "of 989", "launches", "waits", "ms on the device", "GiB"]
    names = ["ms_per_step", "tokens_per_second", "fraction_of_measured_products", "fraction_of_989"]
    names += ["launches_per_step", "syncs_per_step", "device_ms_per_step"]
    rows = []
    for item, values in results.items():
        if values.get("part") != "b" or item.startswith("SQuAD"):
            continue
        figures = values["figures"]
        cells = [_number(figures.get(name), 1) for name in names]
        cells.append(_number(figures.get("peak_memory_bytes"), 2**-30))
        rows.append(_row(item, values, cells))
    return _table(heads, rows)


def _squad_table(results: Results) -> list[str]:
    rows = []
    for item, values in results.items():
        if not item.startswith("SQuAD"):
            continue
        figures, phases = values["figures"], values["figures"].get("phase_seconds") or {}
        cells = [_number(figures.get("exact_match"), 1, 2), _number(figures.get("f1"), 1, 2)]
        cells += [_number(phases.get(phase), 1) for phase in ("prepare", "train", "evaluate")]
        cells.append(_number(values["seconds"], 1))
        rows.append(_row(item, values, cells))
    heads = ["", "EM", "F1", "s for features", "s training", "s evaluation", "s in all"]
    return _table(heads, rows) if rows else [f"{NOT_MEASURED.capitalize()}."]


def _check_table(results: Results) -> list[str]:
    rows = []
    for item, values in results.items():
        if values.get("part") == "a":
            figures = ", ".join(
                f"{name} {value:.3g}" for name, value in list(values["figures"].items())[:6] if is_number(value)
            )
            rows.append([item, values["status"], values.get("reason") or figures, f"{values['seconds']:.1f}"])
    return _table(["check", "", "", "s"], rows) if rows else [f"{NOT_MEASURED.capitalize()}."]


def _row(item: str, values: Figures, cells: Sequence[str]) -> list[str]:
    """The cells of an item that passed, or what became of it in the place of all of them."""
    if values["status"] != "passed":
        cells = [f"{values['status']}: {values.get('reason', '')!s:.80}", *[""] * (len(cells) - 1)]
    return [item, *cells]


def _figure(results: Results, item: str, name: str) -> Any:
    return results.get(item, {}).get("figures", {}).get(name)


def _number(value: Any, unit: float, digits: int | None = None) -> str:
    if not is_number(value):
        return NOT_MEASURED if value is None else str(value)
    value *= unit
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def cell(text: str) -> str:
        return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())

    return markdown_table([cell(head) for head in heads], [list(map(cell, row)) for row in rows])
