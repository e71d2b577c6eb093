"""Measure speed and memory: `python -m qa_dist.bench trainer|paths|scaling|evaluation|all --output_dir DIR`.

trainer     transformers' Trainer (the tutorials' recipe, and with its best options) against qa_dist
paths       padded, sorted and unpadded computation, LoRA and full, beside the rate of matrix products alone
scaling     one process against several: weak and strong scaling, time by phase, balance of tokens
evaluation  tokenising, forward pass, decoding and scoring against the Hugging Face way
all         all of them
report      `report BENCH.JSON ... --output FILE`: the results of several machines as one page
memory      `memory measure|estimate|long|report`: peaks of memory, estimates beside them, long runs, and their page
decoding    decoding and scoring of a data set of SQuAD's size, against nested loops
checkpoints what a checkpoint costs the training loop
budgets     what a token costs on a CPU at different token budgets
answering   questions a second of a trained model, beside other readers
gpu         whether everything is right on a GPU, and how fast: see docs/gpu.md; with --rehearse on a CPU

The last seven have options of their own: see `memory --help` and so on.
Features have the lengths of SQuAD and tokens of no meaning, so nothing is downloaded; the model is the six-layer
encoder of the quickstart extra unless --model_name_or_path or --model_config says otherwise. Results go to bench.json,
bench.md and charts in --output_dir; further commands into the same folder add to them. A measurement beside which
others used more than a quarter of a core is made again, and marked if that does not help.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from qa_dist.benchmarking import charts, report
from qa_dist.benchmarking.settings import REFERENCE, BenchConfig, Settings
from qa_dist.common.command import run_command
from qa_dist.common.errors import UserError
from qa_dist.common.files import make_writable
from qa_dist.config.given import asks_for_help
from qa_dist.config.parsing import parse

PROG = "qa_dist.bench"
TOOLS = {name: name for name in ("report", "memory", "decoding", "checkpoints", "budgets", "answering")} | {
    "gpu": "gpu.command"
}
"""Commands with options of their own, and the modules of `qa_dist.benchmarking` whose `main` takes the words behind."""
COMMANDS = (*report.SECTIONS, "all", *TOOLS)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(PROG, lambda: _bench(list(sys.argv[1:] if argv is None else argv)))


def _bench(argv: list[str]) -> int:
    command = argv[0] if argv and not argv[0].startswith("-") else ""
    if command not in COMMANDS and not asks_for_help(argv):
        said = repr(command) if command else "nothing"
        raise UserError(f"{said} cannot be measured; use {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}")
    if command in TOOLS:
        code: int = import_module(f"qa_dist.benchmarking.{TOOLS[command]}").main(argv[1:], f"{PROG} {command}")
        return code
    config, options = parse(
        _joined(argv[1:] if command else argv),
        prog=f"{PROG} {command}".strip(),
        description=__doc__ or "",
        groups=(),
        entry=BenchConfig,
        base=REFERENCE,
    )
    charts.require_matplotlib()
    settings = Settings.of(config, options)
    directory = Path(str(options.output_dir))
    make_writable(directory, "--output_dir")
    if (directory / "bench.json").exists():
        # Before anything is measured: results are added to this file.
        report.read(directory / "bench.json")
    sections = report.SECTIONS if command == "all" else (command,)
    if "evaluation" in sections:
        import_module("qa_dist.benchmarking.evaluation").require_answers(settings)
    for name in sections:
        _measure(name, settings, directory)
    return 0


def _measure(name: str, settings: Settings, directory: Path) -> None:
    """Measure one section and write everything that shows it."""

    def notice(line: str) -> None:
        sys.stderr.write(f"{name} {line}\n")

    section = import_module(f"qa_dist.benchmarking.{name}").measure_section(settings, notice)
    whole = report.merge(directory / "bench.json", name, section, settings.to_json())
    drawn = charts.draw(whole, directory)
    (directory / "bench.md").write_text(report.summary(whole, drawn), encoding="utf-8")
    for key, value in section["headline"].items():
        sys.stdout.write(f"{key} {value if isinstance(value, str) else f'{value:.3f}'}\n")
    if "unstable" in section["headline"].values():
        notice("unstable: fewer than two repeats without others on the machine; measure again when it is quiet")
    sys.stdout.flush()


def _joined(argv: Sequence[str]) -> list[str]:
    """The words with `--num_processes 1 2 4` written as `--num_processes 1,2,4`, the form of all other lists."""
    words: list[str] = []
    for word in argv:
        if word.isdecimal() and len(words) > 1 and words[-2] == "--num_processes":
            words[-1] += f",{word}"
        else:
            words.append(word)
    return words


if __name__ == "__main__":
    sys.exit(main())
