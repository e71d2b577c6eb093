"""The process that measures: `python -m qa_dist.benchmarking.worker JOB.json`, alone or under torchrun.

`bench` starts it; its result is in a file when it ends.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qa_dist.benchmarking.job import Job, Result
from qa_dist.common.command import run_command
from qa_dist.config.options import RunConfig
from qa_dist.config.parsing import parse
from qa_dist.distributed.failures import failures_named
from qa_dist.machine.cuda_environment import prepare_cuda

PROG = "qa_dist.benchmarking.worker"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code after measuring the job that a file describes."""
    (path,) = sys.argv[1:] if argv is None else argv
    return run_command(PROG, lambda: _run_job(Path(path)))


def _run_job(path: Path) -> int:
    spec = json.loads(path.read_text(encoding="utf-8"))
    job = Job.from_json(spec["job"])
    config, _ = parse([], prog=PROG, description="", groups=(), base=job.options)
    prepare_cuda(os.environ, deterministic=config.training.deterministic)
    result: Result | None
    try:
        with failures_named():
            result = _measured(job, config, spec)
    except torch.OutOfMemoryError:
        result = {"out_of_memory": True}
    if result is not None:
        Path(spec["result"]).write_text(json.dumps(result), encoding="utf-8")
    return 0


def _measured(job: Job, config: RunConfig, spec: dict[str, Any]) -> Result | None:
    from qa_dist.benchmarking import hugging_face, qa_dist_side

    if job.kind == "train":
        return qa_dist_side.train(job, config, spec)
    if job.kind == "evaluate":
        return qa_dist_side.evaluate(config)
    if job.kind == "train_hugging_face":
        return hugging_face.train(job, config)
    return hugging_face.evaluate(job, config)


if __name__ == "__main__":
    sys.exit(main())
