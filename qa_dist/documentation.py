"""Generated parts of the documentation: `python -m qa_dist.documentation FILE ...` rewrites them in place."""

import dataclasses
import importlib
import itertools
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_dist.cli import COMMANDS
from qa_dist.common.command import run_command
from qa_dist.common.errors import UserError
from qa_dist.config.options import GROUPS, ModelConfig, RunConfig, TrainingConfig
from qa_dist.config.texts import default_text, option_type
from qa_dist.distributed.launch_config import Strategy, recipe_problems
from qa_dist.model.families import FAMILIES, REFUSED
from qa_dist.sweeping.page import results_page

PROG = "qa_dist.documentation"

STRATEGY_NAMES = {
    "ddp": "data parallel (`single.yaml`, `ddp.yaml`)",
    "zero1": "ZeRO-1 (`zero1.yaml`)",
    "zero2": "ZeRO-2 (`zero2.yaml`)",
    "zero3": "ZeRO-3 (`zero3.yaml`)",
    "fsdp2": "FSDP2 (`fsdp2.yaml`)",
}
"""What the tables call each strategy, with the files of accelerate_configs/ that ask for it."""

_RESULTS = Path(__file__).parents[1] / "docs" / "results"
"""Where the checkout keeps what sweeps measured."""

_PART = re.compile(r"(<!-- generated: (?P<name>\w+) -->\n).*?(<!-- end of generated part -->)", re.DOTALL)


def parts() -> dict[str, str]:
    """Every generated part by name, as Markdown."""
    return {
        "commands": command_table(),
        "options": option_tables({**GROUPS, **own_options()}),
        "compatibility": compatibility_table(),
        "refusals": refusal_table(),
        "architectures": architecture_table(),
        "sweeps": results_page(_RESULTS),
    }


def command_table() -> str:
    """The commands as Markdown, as README.md shows them."""
    rows = []
    for name, command in COMMANDS.items():
        guides = ", ".join(f"[{guide.partition('.')[0]}](docs/{guide})" for guide in command.guides)
        rows.append(f"| `qa-dist {name}` | {command.summary} | {guides} |")
    return "\n".join(["| command | what it does | more |", "|---|---|---|", *rows, ""])


def own_options() -> dict[str, type[Any]]:
    """Options that only one command has, by group: the `MergeConfig` of `merge` as "merge only"."""
    groups = {}
    for name, command in COMMANDS.items():
        group = getattr(importlib.import_module(command.module), f"{name.capitalize()}Config", None)
        if group is not None:
            groups[f"{name} only"] = group
    return groups


def option_tables(groups: Mapping[str, type[Any]]) -> str:
    """Every option of these groups as Markdown, a table each."""
    lines: list[str] = []
    for name, group in groups.items():
        hints = typing.get_type_hints(group)
        lines += [f"## {name}", "", str(group.__doc__), ""]
        lines += ["| option | values | default | meaning |", "|---|---|---|---|"]
        for item in dataclasses.fields(group):
            values = option_type(hints[item.name]).replace("|", " \\| ")
            default = default_text(item).removeprefix("default: ")
            # As code, so that no underscore or asterisk in a name is taken for emphasis.
            meaning = re.sub(r"--[\w*-]+", r"`\g<0>`", item.metadata["help"]).replace("|", "\\|")
            lines.append(f"| `--{item.name}` | {values} | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def regenerated(text: str) -> str:
    """`text` with each generated part as it should be.

    Raises:
        UserError: It marks a part that nobody generates.
    """
    known = parts()

    def part(match: re.Match[str]) -> str:
        if match["name"] not in known:
            raise UserError(f"nothing generates the part {match['name']}; the parts are {', '.join(known)}")
        return f"{match[1]}\n{known[match['name']]}\n{match[3]}"

    return _PART.sub(part, text)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)

    def work() -> int:
        for word in words:
            path = Path(word)
            try:
                path.write_text(regenerated(path.read_text(encoding="utf-8")), encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise UserError(f"{path} cannot be rewritten ({error}); name a text file") from error
        return 0

    return run_command(PROG, work)


@dataclass(frozen=True, slots=True)
class Combination:
    """One way to train.

    Attributes:
        strategy: How the ranks hold the model.
        options: The recipe's side of it, by option name.
        problem: Why it is refused; None if it is allowed.
    """

    strategy: Strategy
    options: dict[str, Any]
    problem: str | None


def combinations() -> Iterator[Combination]:
    """Every combination of strategy, precision, quantisation and activation checkpointing, with the rules' verdict."""
    precisions = _choices(TrainingConfig, "mixed_precision")
    quantizations = _choices(ModelConfig, "quantization")
    for strategy in typing.get_args(Strategy):
        for precision, quantization, checkpointing in itertools.product(precisions, quantizations, (False, True)):
            config = RunConfig(
                model=ModelConfig(quantization=quantization),
                training=TrainingConfig(mixed_precision=precision, gradient_checkpointing=checkpointing),
            )
            problems = [
                *config.model.problems(),
                *config.training.problems(),
                *recipe_problems(strategy, config),
            ]
            options = {
                "mixed_precision": precision,
                "quantization": quantization,
                "gradient_checkpointing": checkpointing,
            }
            yield Combination(strategy, options, problems[0] if problems else None)


def compatibility_table() -> str:
    """The combinations as Markdown: a row per strategy and precision, a column per quantisation."""
    verdicts = list(combinations())
    quantizations = _choices(ModelConfig, "quantization")
    lines = [
        "| strategy | `--mixed_precision` | " + " | ".join(f"`--quantization {name}`" for name in quantizations) + " |",
        "|---|---|" + "---|" * len(quantizations),
    ]
    notes: list[str] = []
    for strategy in typing.get_args(Strategy):
        for precision in _choices(TrainingConfig, "mixed_precision"):
            cells = []
            for quantization in quantizations:
                wanted = {"mixed_precision": precision, "quantization": quantization}
                problems = {
                    each.problem
                    for each in verdicts
                    if each.strategy == strategy and wanted.items() <= each.options.items()
                }
                cells.append(_cell(problems, notes))
            lines.append(f"| {STRATEGY_NAMES[strategy]} | {precision} | " + " | ".join(cells) + " |")
    return _with_notes(lines, notes)


def refusal_table() -> str:
    """Options that a strategy may refuse, whatever else is chosen, as Markdown: a row per option and value."""
    rows: dict[str, dict[str, Any]] = {
        f"`--optim {kind}`": {"optim": kind} for kind in _choices(TrainingConfig, "optim")
    }
    rows["`--gradient_exchange_dtype bf16`"] = {"gradient_exchange_dtype": "bf16"}
    rows["`--cpu_offload`"] = {"cpu_offload": True}
    # With auto, layers are left as they are where this does not work.
    rows |= {f"`--torch_compile {kind}`": {"torch_compile": kind} for kind in ("layers", "model")}
    strategies = typing.get_args(Strategy)
    lines = [
        "| option | " + " | ".join(STRATEGY_NAMES[strategy] for strategy in strategies) + " |",
        "|---|" + "---|" * len(strategies),
    ]
    notes: list[str] = []
    for name, options in rows.items():
        config = RunConfig(training=TrainingConfig(**options))
        cells = [_cell(set(recipe_problems(each, config)) or {None}, notes) for each in strategies]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return _with_notes(lines, notes)


def architecture_table() -> str:
    """What is trained of every architecture with a question-answering head, or why it is not, as Markdown."""
    rows: dict[str, str] = {}
    for name, family in FAMILIES.items():
        layers = f"`{'`, `'.join(family.projections)}`" if family.projections else "none: use `all-linear`"
        batches = "without padding" if family.unpadded else "padded, sorted by length"
        if family.depends_on_padding:
            batches = "padded to `--max_seq_length`"
        if family.full_attention:
            batches = "padded, sorted by length; to `--max_seq_length` where that is too long for full attention"
        trained = "yes" if family.half_precision else "with `--mixed_precision no`"
        rows[name] = f"| `{name}` | {trained} | {layers} | {batches} |"
    for name, why in REFUSED.items():
        rows[name] = f"| `{name}` | no: {why} | | |"
    heading = [
        "| `model_type` | trained | layers of `--lora_target_modules attention` | batches |",
        "|---|---|---|---|",
    ]
    return "\n".join([*heading, *(rows[name] for name in sorted(rows)), ""])


def _with_notes(lines: list[str], notes: list[str]) -> str:
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), ""])


def _cell(problems: set[str | None], notes: list[str]) -> str:
    """Of one row and column: with and without activation checkpointing."""
    if problems == {None}:
        return "yes"
    refused = [problem for problem in sorted(filter(None, problems)) if problem]
    notes += [problem for problem in refused if problem not in notes]
    numbers = ", ".join(str(notes.index(problem) + 1) for problem in refused)
    return f"no ({numbers})" if None not in problems else f"in part ({numbers})"


def _choices(group: type[Any], name: str) -> tuple[Any, ...]:
    return typing.get_args(typing.get_type_hints(group)[name])


if __name__ == "__main__":
    sys.exit(main())
