"""`python -m qa_dist.bench gpu`: is everything right on this GPU, and how fast is it?

Part A checks: attention, loss and search for spans against oracles, every family unpadded against padded, steps against
the CPU, float16 that overflows, memory that runs out, waits of the host, two ranks on one GPU, FSDP2 and ZeRO, a run
that is stopped and resumed, 4 and 8 bits, a compiled model, the unit tests. Part B measures: LoRA and full training at
several batch sizes, transformers' Trainer beside them, an epoch, and SQuAD itself where --squad and --model name it.

Every item has a limit of its own and is a line of DIR/gpu.jsonl as soon as it ends. The exit code is 0 if none failed.
`--rehearse` runs all of it in miniature on a CPU. See docs/gpu.md.
"""

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qa_dist.common.command import Parser
from qa_dist.common.errors import UserError
from qa_dist.common.files import make_writable
from qa_dist.machine.cuda_environment import prepare_cuda

if TYPE_CHECKING:
    from qa_dist.benchmarking.gpu.items import Item
    from qa_dist.benchmarking.gpu.scene import Scene

FORMAT = 1
_STARTED = time.monotonic()
_MEGABYTES = 2**20
_REHEARSAL_SECONDS = 240
"""Longest that an item may take on a CPU, which others may be using."""

_BEST: dict[str, Any] = {"dynamic_padding": True, "group_by_length": True}
"""What `Trainer` can do for speed at these lengths."""


def main(argv: Sequence[str], prog: str) -> int:
    """Run the items, or gather what they need elsewhere, or write the page."""
    if argv and argv[0] == "pack":
        return _pack(argv[1:], f"{prog} pack")
    if argv and argv[0] == "report":
        from qa_dist.benchmarking.gpu import page

        return page.main(argv[1:], f"{prog} report")
    return _run(_parser(prog).parse_args(argv))


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description=f"{__doc__}\nTwo more commands: `{prog} pack --help`, `{prog} report --help`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", required=True, type=Path, metavar="DIR", help="folder of gpu.jsonl")
    parser.add_argument("--part", choices=("a", "b"), help="checks or measurements alone; default: both")
    parser.add_argument("--rehearse", action="store_true", help="everything in miniature on a CPU")
    parser.add_argument("--squad", type=Path, metavar="DIR", help="folder of train-v1.1.json.gz and dev-v1.1.json.gz")
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder of the encoder to train on SQuAD")
    parser.add_argument("--seconds", type=float, metavar="N", help="time for everything; default: no limit")
    parser.add_argument("--only", metavar="TEXT", help="only items whose names begin so; several with commas")
    parser.add_argument("--note", default="", metavar="TEXT", help="kept beside the results, such as a commit")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.seconds is not None and not options.seconds > 0:
        raise UserError(f"--seconds {options.seconds:g} is no time; give more than 0")
    make_writable(options.output_dir, "--output_dir")
    # As a run does, before CUDA starts.
    prepare_cuda(os.environ, deterministic=False)
    import torch

    from qa_dist.benchmarking.gpu.items import Log, run_items, table
    from qa_dist.benchmarking.gpu.scene import Scene
    from qa_dist.benchmarking.gpu.squad import find_files

    find_files(options.squad, options.model)
    if not options.rehearse and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here; use --rehearse to run everything in miniature on the CPU")
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    with tempfile.TemporaryDirectory(prefix="qa_dist-gpu-") as name:
        scene = Scene(device, options.rehearse, Path(name), options.squad, options.model)
        items = _chosen(all_items(scene), options.part, options.only)
        log = Log(options.output_dir / "gpu.jsonl")
        log.write(_origin(options))
        outcomes = run_items(
            items,
            log,
            seconds=options.seconds,
            started=_STARTED if options.seconds is not None else time.monotonic(),
            notice=lambda line: sys.stderr.write(f"{line}\n"),
        )
    sys.stdout.write(table(outcomes))
    sys.stdout.write(f"results: {options.output_dir / 'gpu.jsonl'}\n")
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _chosen(items: Sequence["Item"], part: str | None, only: str | None) -> list["Item"]:
    beginnings = tuple(only.split(",")) if only else ("",)
    of_part = [item for item in items if part in (None, item.part)]
    chosen = [item for item in of_part if item.name.startswith(beginnings)]
    # One of the other part is right, and leaves this one without items.
    wrong = [each for each in beginnings if not any(item.name.startswith(each) for item in items)]
    if wrong or not chosen:
        names = ", ".join(item.name for item in of_part)
        raise UserError(f"--only {wrong[0] if wrong else only} is the beginning of no item; there are: {names}")
    return chosen


def _origin(options: argparse.Namespace) -> dict[str, Any]:
    """Where and with what the items run."""
    import torch

    from qa_dist.machine.environment import git_commit, hardware, versions

    return {
        "format": FORMAT,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rehearsal": options.rehearse,
        "part": options.part,
        "seconds": options.seconds,
        "note": options.note,
        "commit": git_commit(),
        "machine": hardware(),
        "versions": versions() | {"cuda": torch.version.cuda, "driver": _driver()},
    }


def _driver() -> str | None:
    """Version of the NVIDIA driver; None where nothing tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def all_items(scene: "Scene") -> list["Item"]:
    """Every item, the most important first: what is wrong spoils figures, so short checks come before them."""
    from qa_dist.benchmarking.gpu import evaluation_graphs, graphs, lora, numerics, processes, squad, steps
    from qa_dist.benchmarking.gpu.items import Item

    def check(name: str, seconds: float, work: Callable[["Scene"], Any], least: float = 3) -> Item:
        return Item(name, "a", scene.choose(seconds, _REHEARSAL_SECONDS), partial(work, scene), scene.choose(least, 0))

    return [
        check("machine", 30, numerics.machine),
        check("attention", 60, numerics.attention),
        check("loss", 20, numerics.loss),
        check("spans", 20, numerics.spans),
        check("steps against CPU", 40, steps.cpu_against_device),
        check("half precision", 30, steps.half_precision),
        check("overflow", 20, steps.overflow),
        check("LoRA layers", 30, lora.grouped_layers),
        check("evaluation", 40, squad.evaluation),
        check("syncs", 20, steps.syncs),
        check("CUDA graphs", 60, graphs.graphs, 15),
        check("evaluation with graphs", 60, evaluation_graphs.evaluation_graphs, 15),
        *_first_measurements(scene),
        check("families", 60, numerics.families),
        check("out of memory", 40, steps.out_of_memory),
        check("out of memory at start", 30, steps.out_of_memory_at_start),
        check("budget", 30, steps.budget),
        check("resume", 100, processes.resume, 40),
        check("two ranks", 60, processes.two_ranks, 20),
        check("strategies", 100, processes.strategies, 30),
        *_whole_runs(scene),
        check("quantised", 40, steps.quantised, 8),
        check("moments in 8 bits", 30, steps.small_moments, 5),
        check("compiled", 180, steps.compiled, 60),
        check("CUDA graphs that fail", 30, graphs.graphs_that_fail, 8),
        *_second_measurements(scene),
        check("unit tests", 100, processes.unit_tests, 30),
        *(_squad(scene, recipe, seed) for seed in scene.choose((2, 3), ()) for recipe in squad.RECIPES),
    ]


def _first_measurements(scene: "Scene") -> list["Item"]:
    """What the pages promise figures of."""
    return [
        _training(scene, "q, v", 32),
        _training(scene, "q, v", 32, graphs=True),
        _training(scene, "all-linear", 32),
        _training(scene, "all-linear", 32, graphs=True),
        *_with_peft(scene),
        _training(scene, "full", 32),
        _training(scene, "full", 32, graphs=True),
        _trainer(scene, "best options", "q, v", 32, **_BEST),
        _trainer(scene, "tutorial", "q, v", 32, precision="no"),
        _training(scene, "q, v", 128),
        _training(scene, "q, v", 128, graphs=True),
        _training(scene, "full", 128),
    ]


def _with_peft(scene: "Scene") -> list["Item"]:
    """The same with peft's own forward passes; one will do in a rehearsal."""
    items = [
        _training(scene, "all-linear", 32, graphs=True, lora_implementation="peft"),
        _training(scene, "all-linear", 32, lora_implementation="peft"),
        _training(scene, "q, v", 32, graphs=True, lora_implementation="peft"),
        _training(scene, "q, v", 32, lora_implementation="peft"),
    ]
    return items[: scene.choose(len(items), 1)]


def _whole_runs(scene: "Scene") -> list["Item"]:
    """SQuAD itself, and an epoch."""
    from qa_dist.benchmarking.gpu import speed, squad
    from qa_dist.benchmarking.gpu.items import Item

    lora, full = (_squad(scene, recipe, 1) for recipe in squad.RECIPES)
    return [lora, Item("epoch", "b", 180, partial(speed.epoch, scene), scene.choose(40, 0)), full]


def _second_measurements(scene: "Scene") -> list["Item"]:
    """The other batch sizes, the other rivals."""
    items = [
        _training(scene, "q, v", 32, compiled=True),
        # Compiled code is on the disk by now.
        _training(scene, "q, v", 32, compiled=True, graphs=True),
        _training(scene, "all-linear", 128),
        _training(scene, "q, v", 256),
        _trainer(scene, "best options", "full", 32, **_BEST),
        _trainer(scene, "best options, 4 workers", "q, v", 32, **_BEST, num_workers=4),
        _training(scene, "full", 256),
        _training(scene, "all-linear", 256),
        _training(scene, "q, v", 32, dropout=False),
        _trainer(scene, "best options", "q, v", 128, **_BEST),
        _trainer(scene, "tutorial in bf16", "q, v", 32),
    ]
    if scene.is_rehearsal:
        # Workers take seconds to start, and nothing here depends on the size.
        items = [item for item in items if "no dropout" in item.name or "full, batch 32" in item.name]
    return items


def _training(
    scene: "Scene",
    tuning: str,
    batch_size: int,
    *,
    dropout: bool = True,
    graphs: bool = False,
    compiled: bool = False,
    **options: str,
) -> "Item":
    from qa_dist.benchmarking.gpu import speed
    from qa_dist.benchmarking.gpu.items import Item

    changes = [*options.values(), *([] if dropout else ["no dropout"]), *(["graphs"] if graphs else [])]
    name = ", ".join([f"train {tuning}", f"batch {batch_size}", *changes])
    options |= {"cuda_graphs": "auto"} if graphs else {}
    if compiled:
        work = partial(speed.train, scene, tuning, batch_size, dropout=dropout, torch_compile="layers", **options)
        return Item(f"{name}, compiled layers", "b", 240, work, 60 if graphs else 120)
    work = partial(speed.train, scene, tuning, batch_size, dropout=dropout, **options)
    return Item(name, "b", 40, work, scene.choose(8, 0))


def _trainer(scene: "Scene", name: str, tuning: str, batch_size: int, **setup: Any) -> "Item":
    from qa_dist.benchmarking.gpu import speed
    from qa_dist.benchmarking.gpu.items import Item

    work = partial(speed.hugging_face_trainer, scene, tuning, batch_size, **setup)
    return Item(f"Trainer {name}, {tuning}, batch {batch_size}", "b", 45, work, scene.choose(10, 0))


def _squad(scene: "Scene", recipe: str, seed: int) -> "Item":
    from qa_dist.benchmarking.gpu import squad
    from qa_dist.benchmarking.gpu.items import Item

    work = partial(squad.squad, scene, recipe, seed)
    return Item(f"SQuAD {recipe}, seed {seed}", "b", 150, work, scene.choose(45, 0))


def _pack(argv: Sequence[str], prog: str) -> int:
    from qa_dist.benchmarking.gpu import packing

    parser = Parser(
        prog=prog,
        description=packing.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.tar.xz", help="the archive")
    parser.add_argument("--squad", type=Path, metavar="DIR", help="folder of SQuAD v1.1; default: it is left out")
    parser.add_argument("--python_version", default="3.12", help="of the other machine; default: 3.12")
    parser.add_argument("--cuda", default="130", help="version of its CUDA, without a point; default: 130")
    options = parser.parse_args(argv)
    if not options.output.name.endswith(".tar.xz"):
        raise UserError(f"--output {options.output} is the name of no archive; give one that ends in .tar.xz")
    sizes = packing.pack(
        options.output,
        squad=options.squad,
        python_version=options.python_version,
        cuda=options.cuda,
        notice=lambda line: sys.stderr.write(f"{line}\n"),
    )
    for name, size in sizes.items():
        sys.stdout.write(f"{name} {size / _MEGABYTES:.1f} MiB\n")
    archive, checkout = options.output.stat().st_size, packing.checkout_bytes()
    sys.stdout.write(f"{options.output} {archive / _MEGABYTES:.1f} MiB")
    if checkout is not None:
        sys.stdout.write(f", with the checkout {(archive + checkout) / _MEGABYTES:.1f} MiB")
    sys.stdout.write("\n")
    return 0
