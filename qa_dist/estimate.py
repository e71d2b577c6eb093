"""Estimate the memory of a training run before it starts: `qa-dist estimate`, or `python -m qa_dist.estimate`.

Takes a recipe and the options of training, and prints for every strategy what a rank holds, by part, and the largest
--max_tokens_per_device that a device has room for. No weights are read and nothing is computed: the model's operations
run on tensors that have shapes only. docs/memory.md compares estimates with measured peaks.
"""

import json
import sys
from collections.abc import Sequence

from qa_dist.common.command import run_command
from qa_dist.common.errors import ConfigError
from qa_dist.config.parsing import parse
from qa_dist.memory.estimate import EstimateConfig, choose_strategies, device_kind, estimate, table

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
    strategies, refused = choose_strategies(config, options.strategy, device_kind(options.device))
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


if __name__ == "__main__":
    sys.exit(main())
