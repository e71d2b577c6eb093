"""The process that measures: `python -m qa_dist.benchmarking.worker WORK.json`, alone or under torchrun.

`bench` starts it; what it found is in a file when it ends.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qa_dist.benchmarking.job import Result, Work
from qa_dist.common.command import run_command
from qa_dist.config.options import RunConfig
from qa_dist.config.parsing import parse
from qa_dist.distributed.failures import failures_named

PROG = "qa_dist.benchmarking.worker"


def main(argv: Sequence[str] | None = None) -> int:
    """Do the work that a file describes; returns the exit code."""
    (path,) = sys.argv[1:] if argv is None else argv
    return run_command(PROG, lambda: _work(Path(path)))


def _work(path: Path) -> int:
    spec = json.loads(path.read_text(encoding="utf-8"))
    work = Work.from_json(spec["work"])
    config, _ = parse([], prog=PROG, description="", groups=(), base=work.options)
    result: Result | None
    try:
        with failures_named():
            result = _measured(work, config, spec)
    except torch.OutOfMemoryError:
        result = {"out_of_memory": True}
    if result is not None:
        Path(spec["result"]).write_text(json.dumps(result), encoding="utf-8")
    return 0


def _measured(work: Work, config: RunConfig, spec: dict[str, Any]) -> Result | None:
    from qa_dist.benchmarking import hugging_face, qa_dist_side

    if work.kind == "train":
        return qa_dist_side.train(work, config, spec)
    if work.kind == "evaluate":
        return qa_dist_side.evaluate(config)
    if work.kind == "train_hugging_face":
        return hugging_face.train(work, config)
    return hugging_face.evaluate(work, config)


if __name__ == "__main__":
    sys.exit(main())
