"""Look at this machine: `python -m qa_dist.doctor`, or `qa-dist doctor`.

Devices, drivers, versions, communication, bitsandbytes and DeepSpeed, disks, limits and the hub: a line each with ok,
warning or failure, and what to do. Exit code 1 if there is a failure, else 0.

--launch adds up data on all GPUs of this machine (two processes without a GPU) for ten seconds and prints the
bandwidth. Under torchrun, accelerate launch or srun it measures the processes that those started instead:

    srun python -m qa_dist.doctor --launch
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qa_dist.common.command import run_command
from qa_dist.common.hosts import host_name
from qa_dist.config.options import DataConfig, option
from qa_dist.config.parsing import parse
from qa_dist.distributed.roll_call import Member, places
from qa_dist.distributed.slurm_step import join_slurm_step
from qa_dist.machine import checks
from qa_dist.machine.allocator import find_jemalloc, glibc_version
from qa_dist.machine.checks import Check
from qa_dist.machine.environment import installed
from qa_dist.machine.requirements import requirements
from qa_dist.machine.usage import num_cores

PROG = "qa_dist.doctor"
FORMULA = "GB/s are bus bandwidth, bytes * 2 (n - 1) / n / seconds with n processes, as in NCCL tests (PERFORMANCE.md)"
_SECONDS = 10.0
_TIMEOUT_SECONDS = 120
_STATUSES = ("ok", "warning", "failure")


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorConfig:
    """What is looked at."""

    launch: bool = option(False, "measure the bandwidth between processes as well; under a launcher, only that")
    num_processes: int | None = option(None, "processes that --launch starts; auto: one per GPU, else 2", minimum=2)
    seconds: float | None = option(None, "how long --launch measures; auto: 10", above=0)
    json: bool = option(False, "print JSON instead of a table")
    output_dir: str = option("outputs", "folder whose disk is looked at: --output_dir of a run to come")
    store_dir: str | None = option(None, "folder whose disk is looked at: --store_dir of a run to come; auto: as there")

    def problems(self) -> Iterable[str]:
        if self.num_processes is not None and not self.launch:
            yield "--num_processes is for --launch; add --launch or drop it"
        if self.seconds is not None and not self.launch:
            yield "--seconds is for --launch; add --launch or drop it"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(PROG, lambda: _doctor(sys.argv[1:] if argv is None else argv))


def _doctor(argv: Sequence[str]) -> int:
    _, options = parse(argv, prog=PROG, description=__doc__ or "", groups=(), entry=DoctorConfig)
    if options.launch:
        join_slurm_step()
        if "RANK" in os.environ:
            return _join(options)
    results = examine(options.output_dir, options.store_dir)
    measured = None
    if options.launch:
        rates, measured = launch(options.num_processes or _default_processes(), options.seconds or _SECONDS)
        results += rates
    sys.stdout.write(as_json(results, measured) if options.json else table(results))
    return int(any(check.status == "failure" for check in results))


def examine(output_dir: str, store_dir: str | None) -> list[Check]:
    """All checks of this machine."""
    import torch
    from huggingface_hub import constants

    from qa_dist.features.building import store_root

    required = requirements()
    versions = installed(item.name for item in required)
    gpus = checks.find_devices()
    cores = num_cores()
    talking, extras, hub = _examine_together(("gloo", "nccl") if gpus else ("gloo",), versions)
    return [
        checks.python(),
        *checks.packages(required, versions),
        *checks.devices(
            gpus,
            cuda=torch.version.cuda,
            driver=checks.find_driver(),
            visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
            num_cores=cores,
        ),
        checks.threads(cores, os.environ.get("OMP_NUM_THREADS")),
        *(checks.heap(find_jemalloc(), os.environ.get("LD_PRELOAD"), has_gpu=bool(gpus)) if glibc_version() else ()),
        *talking,
        checks.address(host_name({}), checks.host_address),
        *checks.interfaces(checks.find_interfaces(), os.environ),
        *extras,
        checks.find_disk("output", Path(output_dir), "choose another --output_dir"),
        checks.find_disk("feature store", store_root(DataConfig(store_dir=store_dir)), "choose another --store_dir"),
        checks.find_disk("temporary files", checks.temporary(), "set TMPDIR to another folder"),
        checks.find_disk("hub cache", Path(constants.HF_HUB_CACHE), "set HF_HOME to another folder"),
        checks.shared_memory(checks.find_shared_memory()),
        checks.open_files(checks.find_limit("NOFILE")),
        checks.locked_memory(checks.find_limit("MEMLOCK"), infiniband=checks.has_infiniband()),
        hub,
    ]


def _examine_together(
    backends: Sequence[str], versions: Mapping[str, str | None]
) -> tuple[list[Check], list[Check], Check]:
    """The checks that wait for processes of their own or for the network: of backends, of extras, and of the hub."""
    from huggingface_hub import constants

    optional = (
        ("bitsandbytes", "8-bit and 4-bit models and 8-bit optimisers", "quant", checks.TRY_BITSANDBYTES),
        ("deepspeed", "ZeRO", "deepspeed", checks.TRY_DEEPSPEED),
    )
    with ThreadPoolExecutor() as pool:
        talking = [
            pool.submit(checks.backend, name, partial(checks.try_python, checks.TRY_BACKEND.format(name=name)))
            for name in backends
        ]
        extras = [
            pool.submit(checks.optional, name, purpose, extra, versions[name], partial(checks.try_python, trial))
            for name, purpose, extra, trial in optional
        ]
        hub = pool.submit(checks.hub, constants.ENDPOINT, os.environ, checks.reach)
    return [future.result() for future in talking], [future.result() for future in extras], hub.result()


def launch(num_processes: int, seconds: float) -> tuple[list[Check], dict[str, Any] | None]:
    """Measure that many processes of this machine; lines of the table, and what JSON says of it, None if nothing."""
    if num_processes == 1:
        return [Check("all-reduce", "ok", "one process, which has nobody to exchange data with")], None
    module = ["-m", PROG, "--launch", "--json", "--seconds", str(seconds)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    # Standard output is the result, and NCCL writes its log there unless it is told otherwise.
    environment = {"NCCL_DEBUG_FILE": "/dev/stderr", **os.environ}
    process = subprocess.Popen(
        [*command, *module], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        output, errors = process.communicate(timeout=seconds + 3 * _TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        # torchrun passes it on to its processes.
        process.terminate()
        output, errors = process.communicate()
    return launched(num_processes, process.returncode, output, errors)


def launched(num_processes: int, code: int, output: str, errors: str) -> tuple[list[Check], dict[str, Any] | None]:
    """What the measuring processes said, as `launch` returns it."""
    if code == 0:
        measured: dict[str, Any] = json.loads(output)["all_reduce"]
        return rate_checks(measured), measured
    said = [line for line in errors.splitlines() if "error:" in line or "failed:" in line]
    reason = said[0].strip() if said else checks.last_line(errors) or f"exit code {code}"
    mend = (
        "with NCCL_DEBUG=INFO (GPUs) or TORCH_CPP_LOG_LEVEL=INFO it says more: torchrun --standalone --nproc_per_node "
        f"{num_processes} -m {PROG} --launch"
    )
    return [Check("all-reduce", "failure", f"{num_processes} processes: {reason}", mend)], None


def rate_checks(measured: dict[str, Any]) -> list[Check]:
    """A line per size."""
    return [
        Check(
            f"all-reduce {rate['num_bytes'] // checks.MIB} MiB",
            "ok",
            f"{rate['bus_bytes_per_second'] / 1e9:.2f} GB/s, {rate['seconds'] * 1e3:.2f} ms; "
            f"{measured['world_size']} processes ({measured['device']}) on {measured['places']}",
        )
        for rate in measured["rates"]
    ]


def table(results: Sequence[Check]) -> str:
    """All results as aligned lines, and how many there are of each status."""
    width = max(len(check.name) for check in results) + 2
    lines = [
        f"{check.status:<9}{check.name:<{width}}{check.found}{f' -> {check.remedy}' if check.remedy else ''}"
        for check in results
    ]
    if any(check.name.startswith("all-reduce ") for check in results):
        lines.append(FORMULA)
    counts = {status: sum(check.status == status for check in results) for status in _STATUSES}
    return "\n".join([*lines, ", ".join(f"{status}: {count}" for status, count in counts.items())]) + "\n"


def as_json(results: Sequence[Check], measured: dict[str, Any] | None) -> str:
    """All results and what was measured, as JSON."""
    whole = {"host": host_name(), "checks": [asdict(check) for check in results], "all_reduce": measured}
    return json.dumps(whole, indent=2) + "\n"


def _join(options: DoctorConfig) -> int:
    """Measure the processes that a launcher started, of which this is one; rank 0 prints."""
    from qa_dist.distributed.bandwidth import measure
    from qa_dist.distributed.failures import failures_named
    from qa_dist.distributed.ranks import Ranks

    with failures_named():
        ranks = Ranks(timeout_seconds=_TIMEOUT_SECONDS)
        rates = measure(ranks, seconds=options.seconds or _SECONDS)
        members = ranks.gather(Member(ranks.rank, host_name(), {}))
        if ranks.is_main:
            measured = {
                "world_size": ranks.world_size,
                "device": ranks.device.type,
                "places": places(members),
                "formula": FORMULA,
                "rates": [asdict(rate) for rate in rates],
            }
            results = rate_checks(measured)
            sys.stdout.write(as_json(results, measured) if options.json else table(results))
        ranks.close()
    return 0


def _default_processes() -> int:
    import torch

    return torch.cuda.device_count() or 2


if __name__ == "__main__":
    sys.exit(main())
