"""The files that a benchmark leaves: bench.json, and the tables made of it.

bench.json holds a section per command with its machine, versions, commit, settings and every repeat, and in `headline`
the figures of all sections by name. Tables are made of such files alone.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qa_dist.benchmarking.counted import counts_part, markdown_table, read_counts, short_commit
from qa_dist.benchmarking.neighbours import is_disturbed
from qa_dist.benchmarking.trainer import TUTORIAL
from qa_dist.common.command import Parser
from qa_dist.common.errors import UserError
from qa_dist.common.files import staged, write_json
from qa_dist.common.parsers import read_json
from qa_dist.machine.environment import git_commit, hardware, versions

FORMAT = 1
SECTIONS = ("trainer", "paths", "scaling", "evaluation")
NOT_MEASURED = "not yet measured"
_MARK = "\N{DAGGER}"
"""Marks what was disturbed."""

Section = Mapping[str, Any]

HEADLINES = {
    "speedup_vs_tutorial_recipe": (
        "features/s: qa_dist's recipe (on a CPU without dropout) over the tutorials' `Trainer` recipe as published"
    ),
    "speedup_vs_tutorial_recipe_equal_dropout": "the same, qa_dist with the model's dropout too, but for attention",
    "speedup_vs_best_trainer": (
        "features/s: qa_dist's recipe (on a CPU without dropout) over `Trainer` with its best options and the model's"
        " dropout"
    ),
    "speedup_vs_best_trainer_equal_dropout": "the same, qa_dist with the model's dropout too, but for attention",
    "speedup_vs_best_trainer_no_dropout": "the same, both without any dropout",
    "fraction_of_matmul_ceiling": "model FLOP/s of unpadded LoRA training over those of the matrix products alone",
    "weak_scaling_efficiency": "features/s of all ranks over as many independent processes at the same time",
    "weak_scaling_vs_one_process": "features/s of all ranks over as many times one process alone",
    "strong_scaling_efficiency": "features/s of all ranks sharing one process's batch over as many times one process",
    "weak_scaling_efficiency_full": "features/s with full fine-tuning, over as many independent processes",
    "weak_scaling_vs_one_process_full": "the same, over as many times one process alone",
    "strong_scaling_efficiency_full": "the same, the ranks sharing one process's batch",
    "evaluation_speedup": "seconds of the Hugging Face way over qa_dist's, from questions to scores",
    "evaluation_speedup_vs_dynamic_padding": "the same, where the Hugging Face way pads batches to their longest",
    "decoding_speedup": "seconds of decoding and scoring alone",
}
"""What each headline means."""


def main(argv: Sequence[str], prog: str) -> int:
    """Write docs/benchmarks.md."""
    parser = Parser(prog=prog, description="Results of one or several machines as a Markdown page.", allow_abbrev=False)
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="BENCH.JSON", help="what benchmarks wrote; none: a page that says so"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the page, as docs/benchmarks.md")
    options = parser.parse_args(argv)
    counts = {path: read_counts(path) for path in options.files}
    reports = [read(path) for path, counted in counts.items() if counted is None]
    write_page(documentation(reports, [counted for counted in counts.values() if counted is not None]), options.output)
    return 0


def write_page(text: str, path: Path) -> None:
    """Write a page to the file that --output names; it appears whole, and replaces one of the same title.

    Raises:
        UserError: It cannot be written, or is another file.
    """
    try:
        if path.exists() and path.stat().st_size:
            with path.open(encoding="utf-8", errors="replace") as file:
                if file.readline().strip() != text.partition("\n")[0].strip():
                    raise UserError(f"--output {path} exists and is no such page; name another file")
        with staged(path) as aside:
            aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}; name another file") from error


# ------------------------------------------------------------------------------------------------------- bench.json


def merge(path: Path, name: str, section: Section, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put a section into bench.json, beside those of earlier commands, and return all of it.

    Raises:
        UserError: The file is there but was not written by this program.
    """
    origin: dict[str, Any] = {
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": hardware(),
        "versions": versions(),
        "commit": git_commit(),
        "settings": dict(settings),
    }
    report: dict[str, Any] = read(path) if path.exists() else {"format": FORMAT, "headline": {}, "sections": {}}
    sections: dict[str, Any] = report["sections"] | {name: {**origin, **section}}
    report |= {key: origin[key] for key in ("machine", "versions", "commit")}
    report["sections"] = {known: sections[known] for known in SECTIONS if known in sections}
    report["headline"] = {key: value for part in report["sections"].values() for key, value in part["headline"].items()}
    write_json(path, report)
    return report


def read(path: Path) -> dict[str, Any]:
    """A bench.json.

    Raises:
        UserError: It is not one.
    """
    try:
        report: dict[str, Any] = read_json(path.read_text(encoding="utf-8"))
        known = report["format"] == FORMAT
        for section in report["sections"].values() if known else ():
            # What every table needs; the rest was written together with it.
            machine_name(section)
            _origin(section)
            dict(section["headline"])
        dict(report["headline"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is no bench.json ({reason}); give one that a benchmark wrote") from error
    if not known:
        raise UserError(f"{path} has a format that this version does not read; measure again in another folder")
    return report


# --------------------------------------------------------------------------------------------------------- Markdown


def summary(report: Mapping[str, Any], charts: Sequence[str] = ()) -> str:
    """bench.md: the tables of one bench.json, with its charts."""
    return "\n".join(["# Benchmark", "", *_body([report]), *(f"![{name}]({name})\n" for name in charts)])


def documentation(reports: Sequence[Mapping[str, Any]], counts: Sequence[Mapping[str, Any]] = ()) -> str:
    """docs/benchmarks.md: the tables of several bench.json, side by side, and what was counted."""
    return "\n".join(
        [
            "# Benchmarks",
            "",
            "<!-- Written by `python -m qa_dist.bench report`; do not edit. -->",
            "",
            "Every figure but counts is from a bench.json of `python -m qa_dist.bench`: the median over the repeats,",
            "and in brackets the least and the greatest. Measurements that are compared alternate, each in a process",
            "of its own. Features have the lengths of SQuAD v1.1 at 384/128; a feature per second means forward pass,",
            "backward pass and its share of the optimiser step. To measure again:",
            "",
            "```bash",
            "python -m qa_dist.bench all --output_dir outputs/bench --validation_file dev-v1.1.json.gz",
            "python -m qa_dist.bench report outputs/bench/bench.json --output docs/benchmarks.md",
            "```",
            "",
            "`bash launch/benchmark_gpu.sh outputs/gpu` checks and measures a machine with GPUs (docs/gpu.md), and",
            "adds scaling over all of them to a bench.json. Several bench.json make one page.",
            "",
            *_body(reports),
            *(line for counted in counts for line in counts_part(counted)),
        ]
    )


def _body(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = _headline_table(reports)
    for name, (text, tables) in _TEXTS.items():
        lines += [f"## bench {name}", "", text, ""]
        measured = [report["sections"][name] for report in reports if name in report["sections"]]
        for section in measured:
            lines += [f"**{machine_name(section)}**", "", _origin(section), ""]
            for table in tables:
                lines += [*table(section), ""]
            lines += _disturbances(section)
        if not measured:
            lines += [f"{NOT_MEASURED.capitalize()}.", ""]
    return lines


def machine_name(section: Section) -> str:
    """What a section was measured on, in a few words."""
    machine = section["machine"]
    if section["settings"]["device"] == "cuda":
        return f"{len(machine['devices'])} x {machine['devices'][0]}"
    return f"{section['settings']['num_devices']} cores of {machine['processor']}"


def _headline_table(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = [(_column_name(report), report["headline"]) for report in reports]
    devices = {section["settings"]["device"] for report in reports for section in report["sections"].values()}
    columns += [(f"a {device.upper()} machine", {}) for device in ("cpu", "cuda") if device not in devices]
    rows = [
        [f"`{key}`", meaning, *(_figure(figures.get(key)) for _, figures in columns)]
        for key, meaning in HEADLINES.items()
    ]
    return ["## Headline", "", *markdown_table(["figure", "what it is", *(name for name, _ in columns)], rows), ""]


def _column_name(report: Mapping[str, Any]) -> str:
    sections = list(report["sections"].values())
    return machine_name(sections[0]) if sections else "nothing measured"


def _origin(section: Section) -> str:
    settings, used = section["settings"], section["versions"]
    model = settings["model_config"] or settings["model_name_or_path"]
    return (
        f"{model}{' with random weights' if settings['model_config'] else ''}, "
        f"batch of {settings['global_batch_size']}, LoRA r={settings['lora_r']} on "
        f"{', '.join(settings['lora_target_modules'])}, {settings['num_features']} features per measurement, "
        f"{settings['repeats']} repeats; torch {used['torch']}, transformers {used['transformers']}, "
        f"commit {short_commit(section['commit'])}, {section['finished'][:10]}."
    )


def _trainer_table(section: Section) -> list[str]:
    medians = {
        result["name"]: float(result["features_per_second"]["median"])
        for result in section["results"]
        if not result.get("out_of_memory")
    }

    def times(result: Section) -> str:
        return f"{medians[result['name']] / medians[TUTORIAL]:.2f}" if TUTORIAL in medians else ""

    rows = [[_name(result), *_cells(result, _rate, times, _tokens, _step, _memory)] for result in section["results"]]
    return markdown_table(["", "features/s", "times tutorial", "real tokens/s", "step, s", "peak memory, GiB"], rows)


def _paths_table(section: Section) -> list[str]:
    def share(result: Section) -> str:
        return _spread(result["fraction_of_matmul_ceiling"], 3)

    def operations(result: Section) -> str:
        return _spread(result["model_flops_per_second"], 1, 1e9)

    def ceiling(result: Section) -> str:
        return _spread(result["matmul_ceiling_flops_per_second"], 1, 1e9)

    rows = [
        [_name(result), *_cells(result, _rate, _tokens, _memory, operations, ceiling, share)]
        for result in section["results"]
    ]
    heads = ["", "features/s", "real tokens/s", "peak memory, GiB", "model GFLOP/s", "ceiling, GFLOP/s", "fraction"]
    return markdown_table(heads, rows)


def _scaling_table(section: Section) -> list[str]:
    rows = []
    for result in section["results"]:
        shares = result["phase_shares"]
        in_words = "" if shares is None else ", ".join(f"{name} {value:.1%}" for name, value in shares.items())
        rows.append([_name(result), *_cells(result, _rate, _tokens, _step, _memory), in_words])
    return markdown_table(
        ["", "features/s", "real tokens/s", "step, s", "peak memory of a rank, GiB", "time of a step on rank 0"], rows
    )


def _exchange_table(section: Section) -> list[str]:
    rows = [
        [
            _name(result),
            _spread(result["exchanged_bytes_per_step"], 1, 1e6),
            _spread(result["exchanged_bytes_per_second"], 1, 1e6),
            _spread(result["exchanged_bytes_per_second_alone"], 1, 1e6),
        ]
        for result in section["results"]
        if "exchanged_bytes_per_step" in result
    ]
    if not rows:
        return []
    return markdown_table(["", "gradients of a step, MB", "MB/s in training", "MB/s in an all-reduce alone"], rows)


def _efficiency_table(section: Section) -> list[str]:
    names = ("weak_over_independent", "weak_over_one_process", "strong_over_one_process")
    rows = [
        [f"{entry['world_size']}{trained}", *(_spread(entry[name], 3) for name in names)]
        for key, trained in (("efficiency", ""), ("efficiency_full", ", full"))
        for entry in section.get(key, ())
    ]
    if not rows:
        return ["One world size only: no efficiency."]
    return markdown_table(["ranks", "weak, over independent processes", "weak, over one process", "strong"], rows)


def _balance_table(section: Section) -> list[str]:
    rows = [
        [str(entry["world_size"]), f"{entry['dealt']:.4f}", f"{entry['plain']:.3f}"] for entry in section["balance"]
    ]
    return markdown_table(["ranks", "most tokens of a rank over the mean", "by position, as data loaders divide"], rows)


def _evaluation_table(section: Section) -> list[str]:
    phases = ("tokenise", "forward", "decode", "score", "seconds")
    rows = [
        [
            _name(result),
            *([_spread(result[phase], 3) for phase in phases] if "seconds" in result else ["out of memory"]),
        ]
        for result in section["results"]
    ]
    size = f"{section['num_examples']:,} questions in {section['num_features']:,} features; seconds."
    return [size, "", *markdown_table(["", *phases[:-1], "together"], rows)]


_TEXTS: dict[str, tuple[str, tuple[Callable[[Section], list[str]], ...]]] = {
    "trainer": (
        "The same model, adapters, features and batch size through transformers' `Trainer` and through qa_dist."
        " *Tutorial* is the recipe as published: padding to 384, default collator, peft, the model's dropout. *Best"
        " options* are dynamic padding, batches grouped by length, fused AdamW, bf16 where the device has it. qa_dist's"
        " own recipe has no dropout on a CPU, where masks cost much, and the model's on CUDA; on a CPU, unpadded"
        " attention never has any.",
        (_trainer_table,),
    ),
    "paths": (
        "qa_dist's training loop on every way to compute a batch. Model FLOP/s count the matrix products that a step"
        " needs, on real tokens only: forward 2 per weight of a linear layer and token and 4 x hidden x L^2 per"
        " attention layer and feature of L tokens, backward what the gradients need that are computed, and nothing for"
        " recomputation (Chowdhery et al. 2022, appendix B). The ceiling is the rate of the model's matrix products"
        " alone, at the shapes and in the precision of its layers, measured before and after each measurement in the"
        " same process.",
        (_paths_table,),
    ),
    "scaling": (
        "*Weak*: every rank has the features of one process per step. *Strong*: the ranks share them. *Independent*:"
        " single processes at the same time, which share the machine as ranks do but exchange nothing. *Full* is full"
        " fine-tuning, all else LoRA. `gradient_sync` holds the wait for the slowest rank, and of the exchange what the"
        " backward pass does not hide. Exchanged MB/s are what each rank sends and receives, 2 (n - 1) / n times the"
        " gradients of n ranks.",
        (_scaling_table, _exchange_table, _efficiency_table, _balance_table),
    ),
    "evaluation": (
        "From questions to exact match and F1. *Hugging Face* is `Dataset.map`, `Trainer.predict` on features padded to"
        " 384, decoding by nested loops written from the description of the published script, and scores text by text."
        " `decode` is from logits to answers. qa_dist's `tokenise` includes reading and validating the file and writing"
        " its store, its `forward` the validation loss.",
        (_evaluation_table,),
    ),
}


def _rate(result: Section) -> str:
    return _spread(result["features_per_second"], 2)


def _tokens(result: Section) -> str:
    return f"{result['tokens_per_second']['median']:,.0f}"


def _step(result: Section) -> str:
    return _spread(result["median_step_seconds"], 3)


def _memory(result: Section) -> str:
    return f"{result['peak_memory_bytes']['median'] / 2**30:.2f}"


def _cells(result: Section, *parts: Callable[[Section], str]) -> list[str]:
    if result.get("out_of_memory"):
        return ["out of memory", *[""] * (len(parts) - 1)]
    return [part(result) for part in parts]


def _spread(values: Mapping[str, float] | None, digits: int, unit: float = 1.0) -> str:
    if values is None:
        return NOT_MEASURED
    middle, least, most = (f"{values[name] / unit:,.{digits}f}" for name in ("median", "min", "max"))
    return middle if least == most else f"{middle} ({least}-{most})"


def _figure(value: float | str | None) -> str:
    if isinstance(value, str):
        return value
    return NOT_MEASURED if value is None else f"{value:.3g}"


def _name(result: Section) -> str:
    """The name of a row, marked if some of its repeats were disturbed."""
    return f"{result['name']} {_MARK}" if result.get("num_disturbed") else str(result["name"])


def _disturbances(section: Section) -> list[str]:
    """What the mark means, for the rows that have it."""
    said = []
    for result in section["results"]:
        noted = [repeat["neighbours"] for repeat in result.get("repeats", ()) if is_disturbed(repeat)]
        if noted:
            most = max(entry["others_cores"] for entry in noted)
            said.append(f"{result['name']}: {len(noted)} of {len(result['repeats'])} repeats, up to {most:.2f} cores")
    return [f"{_MARK} Others used the machine meanwhile. {'; '.join(said)}.", ""] if said else []
