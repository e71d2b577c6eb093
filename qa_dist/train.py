"""Train a question answerer: `accelerate launch -m qa_dist.train ...`, torchrun, or plain python."""

import sys
from collections.abc import Sequence

from qa_dist.common.command import note_exit, run_command
from qa_dist.common.signals import StopSignals
from qa_dist.config.parsing import parse

PROG = "qa_dist.train"


def main(argv: Sequence[str] | None = None) -> int:
    return note_exit(run_command(PROG, lambda: _train(sys.argv[1:] if argv is None else argv)))


def _train(argv: Sequence[str]) -> int:
    config, _ = parse(argv, prog=PROG, description=__doc__ or "")
    with StopSignals() as stop:
        # Only now: these imports take seconds, and mistakes in the options should not.
        from qa_dist.distributed.failures import failures_named
        from qa_dist.training.loop import train

        with failures_named():
            train(config, asked_to_stop=lambda: stop.received)
    return 0


if __name__ == "__main__":
    sys.exit(main())
