"""Estimate the memory of a training run before it starts: `qa-dist estimate`, or `python -m qa_dist.estimate`.

Takes a recipe and the options of training, and prints for every strategy what a rank holds, by part, and the largest
--max_tokens_per_device that a device has room for. No weights are read and nothing is computed: the model's operations
run on tensors that have shapes only. docs/memory.md compares estimates with measured peaks.
"""

import json
import sys
from collections.abc import Iterable, Sequence

from qa_dist.common.command import run_command
from qa_dist.common.errors import ConfigError
from qa_dist.config.parsing import parse
from qa_dist.memory.by_strategy import PARTS
from qa_dist.memory.estimate import Estimate, EstimateConfig, choose_strategies, estimate

PROG = "qa_dist.estimate"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(PROG, lambda: _estimate(sys.argv[1:] if argv is None else argv))


def _estimate(argv: Sequence[str]) -> int:
    config, options = parse(
        argv,
        prog=PROG,
        description=__doc__ or "",
        groups=("data", "model", "training"),
        entry=EstimateConfig,
        # Nothing is written.
        base={"output_dir": "outputs"},
    )
    strategies, refused = choose_strategies(config, options.strategy)
    tokens, length = config.training.max_tokens_per_device, config.data.max_seq_length
    if tokens is not None and tokens < length:
        raise ConfigError(
            [
                f"--max_tokens_per_device {tokens} is less than one feature, which may have {length} tokens; raise it "
                "or lower --max_seq_length"
            ]
        )
    estimates, notes = estimate(config, options, strategies)
    if options.json:
        whole = {"estimates": [each.to_json() for each in estimates], "refused": refused, "notes": notes}
        sys.stdout.write(json.dumps(whole, indent=2) + "\n")
    else:
        sys.stdout.write(table(estimates, [*refused.values(), *notes]))
    return 0


def table(estimates: Sequence[Estimate], notes: Sequence[str]) -> str:
    """Estimates as aligned columns, MiB each, and sentences below them."""

    def row(name: str, values: Iterable[str]) -> str:
        return f"{name:<24}" + "".join(f"{value:>12}" for value in values)

    lines = [row("MiB of each rank", (each.strategy for each in estimates))]
    for where in ("device", "host"):
        parts = [part for part in PARTS if any(getattr(each.use, where).get(part) for each in estimates)]
        if where == "host" and parts:
            lines.append("in the host's memory")
        lines += [row(part, (_mib(getattr(each.use, where).get(part, 0)) for each in estimates)) for part in parts]
        if where == "device":
            lines.append(row("together", (_mib(each.use.device_bytes) for each in estimates)))
    lines.append(row("with tokens per pass", (f"{each.num_tokens:,}" for each in estimates)))
    if any(each.largest_budget is not None for each in estimates):
        lines.append(row("most that fit", (f"{each.largest_budget:,}" for each in estimates)))
    return "\n".join([*lines, *(f"note: {note}" for note in notes)]) + "\n"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


if __name__ == "__main__":
    sys.exit(main())
