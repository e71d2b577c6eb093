"""The memory of every rank of a run, by part, from its configuration alone."""

import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from qa_dist.common.errors import ConfigError, UserError
from qa_dist.common.libraries import reason
from qa_dist.config.optimizers import OPTIMIZERS
from qa_dist.config.options import RunConfig, option
from qa_dist.distributed.launch_config import Strategy, recipe_problems
from qa_dist.machine.checks import last_line
from qa_dist.machine.requirements import require_package
from qa_dist.memory.by_strategy import PARTS, MemoryUse, Setup, Sizes, TracedPass, at_peak, largest_budget, made_by

if TYPE_CHECKING:
    import torch

    from qa_dist.model.span_model import SpanModel

TRACED_FEATURES = (4, 32, 128)
"""Features of the passes that are traced; what lies between and beyond follows from them."""

DeviceKind = Literal["cpu", "cuda"]

_UNITS = {
    "": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
"""Bytes of each unit that a size of memory may be written in."""

_MIN_MEMORY = 64 * 2**20
"""Bytes below which no device is: who writes a smaller number has left out the unit."""

_TIMEOUT_SECONDS = 300


class NotEstimatedError(UserError):
    """The model is one whose memory cannot be told from shapes alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateConfig:
    """What is estimated, and for which device."""

    strategy: Literal["all", "ddp", "zero1", "zero2", "zero3", "fsdp2"] = option(
        "all", "how the ranks hold the model, see accelerate_configs/; all: every one that goes with the other options"
    )
    num_processes: int = option(1, "ranks of the run", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "kind of device; auto: what torch finds here")
    device_memory: str | None = option(
        None, "memory of one rank's device, such as 24GiB or 80GB; auto: of this machine's"
    )
    json: bool = option(False, "print JSON instead of a table")

    def problems(self) -> Iterable[str]:
        size = None if self.device_memory is None else num_bytes(self.device_memory)
        if size is not None and size < _MIN_MEMORY:
            what = f"{size:,} byte{'s' if size > 1 else ''}, less than any device has"
            yield f"--device_memory {self.device_memory} is {what}; name the unit, as in 24GiB"
        elif self.device_memory is not None and size is None:
            yield f"--device_memory {self.device_memory} is no size; write it as 24GiB, 80GB or a number of bytes"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one rank of a run takes.

    Attributes:
        strategy: how the ranks hold the model.
        num_tokens: tokens of a forward pass that it is for.
        use: bytes by part when memory peaks, on the device and beside it.
        largest_budget: most tokens that a forward pass may have on the device; None if its memory is not known.
    """

    strategy: Strategy
    num_tokens: int
    use: MemoryUse
    largest_budget: int | None

    def to_json(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            "max_tokens_per_device": self.num_tokens,
            "device_bytes": self.use.device_bytes,
            "device_parts": dict(self.use.device),
            "host_parts": dict(self.use.host),
            "largest_max_tokens_per_device": self.largest_budget,
        }


def num_bytes(text: str) -> int | None:
    """The size that text such as 24GiB, 80GB or 1000000 means; None if it means none."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([kKMGT]i?B)?", text)
    if match is None or (match[2] or "") not in _UNITS:
        return None
    size = round(float(match[1]) * _UNITS[match[2] or ""])
    return size or None


def device_kind(wanted: str) -> DeviceKind:
    """The kind of device that --device asks for."""
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if wanted == "cuda" else "cpu"


def choose_strategies(config: RunConfig, wanted: str, kind: DeviceKind) -> tuple[list[Strategy], dict[str, str]]:
    """The strategies to estimate, and why others that were not named are left out.

    Args:
        config: The run.
        wanted: A strategy, or "all".
        kind: Where it computes. On a CPU the libraries of a strategy are part of what a rank holds, and are loaded to
            measure it.

    Raises:
        ConfigError: The strategy that was named, or every one, does not go with the other options.
    """
    if config.training.torch_compile == "model":
        raise ConfigError(
            ["--torch_compile model keeps other tensors than what is estimated here; estimate without it"]
        )
    problems = {strategy: list(recipe_problems(strategy, config)) for strategy in typing.get_args(Strategy)}
    if kind == "cpu":
        for strategy in (name for name in problems if name.startswith("zero")):
            try:
                require_package("deepspeed", f"--strategy {strategy} with --device cpu")
            except ConfigError as error:
                problems[strategy] += error.problems
    chosen = [name for name, reasons in problems.items() if wanted in ("all", name) and not reasons]
    refused = {name: reasons[0] for name, reasons in problems.items() if wanted in ("all", name) and reasons}
    if not chosen:
        raise ConfigError(list(refused.values()))
    return chosen, refused


def estimate(
    config: RunConfig, options: EstimateConfig, strategies: Sequence[Strategy]
) -> tuple[list[Estimate], list[str]]:
    """The estimates for some strategies, and what the user should know about them.

    Raises:
        UserError: The model cannot be built, an option does not fit it, or its operations cannot be traced.
    """
    import torch

    from qa_dist.distributed.graph_choice import uses_graphs
    from qa_dist.distributed.lora_choice import wants_groups
    from qa_dist.model.families import require_trainable
    from qa_dist.model.pretrained import model_configuration

    # Before a process is started and the model built.
    require_trainable(model_configuration(config.model), config.training.mixed_precision)
    has_cuda, kind = torch.cuda.is_available(), device_kind(options.device)
    processes = _start_processes(strategies, config) if kind == "cpu" else {}

    def shards_one_type(strategy: Strategy) -> bool:
        # Without autocast nothing is held in another type.
        return strategy.startswith("zero") and config.training.mixed_precision != "no"

    def ways(strategy: Strategy) -> tuple[bool, bool]:
        return shards_one_type(strategy), wants_groups(config, kind, strategy)

    measured = {
        pair: _measure(config, kind, has_cuda=has_cuda, shards_one_type=pair[0], groups_adapters=pair[1])
        for pair in set(map(ways, strategies))
    }
    memory = num_bytes(options.device_memory) if options.device_memory else _memory_here(kind, options.num_processes)
    estimates = []
    for strategy in strategies:
        sizes, passes, padding, notes = measured[ways(strategy)]
        setup = Setup(
            strategy=strategy,
            num_processes=options.num_processes,
            device=kind,
            cpu_offload=config.training.cpu_offload,
            keeps_checkpoints=config.training.checkpointing_steps != "no",
            optim=config.training.optim,
            exchanges_halves=config.training.gradient_exchange_dtype == "bf16",
            has_graphs=kind == "cuda" and uses_graphs(config, strategy, padding),
        )
        process = processes[_imports(strategy, config)].result() if processes else 0
        estimates.append(_estimate(config, sizes, setup, passes, process, memory))
    may_compile = ("auto", "layers") if kind == "cuda" else ("layers",)
    if config.training.torch_compile in may_compile:
        # 0.81 (bf16, all-linear) to 1.00 (float32, no dropout) of what a layer of BERT keeps; CPU, torch 2.13.
        notes = (*notes, "layers that --torch_compile compiles hold as much as counted here or up to a fifth less")
    return estimates, [*notes, *_not_counted(kind, has_cuda)]


def _measure(
    config: RunConfig, kind: DeviceKind, *, has_cuda: bool, shards_one_type: bool, groups_adapters: bool
) -> tuple[Sizes, list[TracedPass], str, tuple[str, ...]]:
    """Sizes and passes of the model as it trains, how it pads, and what the user should know about it."""
    import torch

    from qa_dist.memory.tracing import trace_passes
    from qa_dist.model.attention import cuda_kernels
    from qa_dist.model.building import build_meta_model
    from qa_dist.model.casts import remove_redundant_casts
    from qa_dist.model.initial import require_fitting_adapter
    from qa_dist.model.loading import library_errors
    from qa_dist.model.rdrop import require_dropout
    from qa_dist.model.residual_stream import set_residual_dtype
    from qa_dist.model.span_model import transformers_model

    require_fitting_adapter(config.model)
    precision, device = config.training.mixed_precision, torch.device(kind)
    model = build_meta_model(
        config.model,
        max_seq_length=config.data.max_seq_length,
        gradient_checkpointing=config.training.gradient_checkpointing,
        device=device,
    )
    require_dropout(config.training.rdrop_alpha, model)
    model_config = transformers_model(model.model).config
    set_residual_dtype(model, config.training.residual_dtype)
    remove_redundant_casts(model, config.model, precision, device, shards_one_type=shards_one_type)
    sizes = sizes_of(model)
    kernels = nullcontext() if kind == "cpu" else cuda_kernels()
    with library_errors(lambda error: _not_traced(model_config.model_type, error)), kernels:
        passes = trace_passes(
            model,
            TRACED_FEATURES,
            length=config.data.max_seq_length,
            device=torch.device(kind if has_cuda else "cpu"),
            precision=precision,
            groups_adapters=groups_adapters,
        )
    return sizes, passes, model.padding, model.notes


def _not_traced(model_type: str, error: Exception) -> NotEstimatedError:
    return NotEstimatedError(
        f"the memory of a {model_type} model cannot be estimated: what it computes depends on values, which an "
        f"estimate does not have ({reason(error)}); train for some steps, and look at peak_memory_bytes_per_rank in "
        "run.json"
    )


def _estimate(
    config: RunConfig, sizes: Sizes, setup: Setup, passes: Sequence[TracedPass], process: int, memory: int | None
) -> Estimate:
    """The estimate for one strategy; `process` is the process's own bytes, `memory` the device's, None if unknown."""
    from qa_dist.features.token_budget import CPU_TOKENS, MARGIN
    from qa_dist.model.rdrop import copies

    budget, num_copies = None, copies(config.training.rdrop_alpha)
    if memory is not None:
        # It counts tokens once, however often a pass computes them.
        budget = largest_budget(sizes, setup, passes, int(memory * (1 - MARGIN)) - process) // num_copies
    tokens, length = config.training.max_tokens_per_device, config.data.max_seq_length
    if tokens is None:
        tokens = max(CPU_TOKENS, length) if setup.device == "cpu" or budget is None else max(length, budget)
    use = at_peak(sizes, setup, made_by(passes, tokens * num_copies))
    if process:
        use = replace(use, device={**use.device, "process": process})
    return Estimate(setup.strategy, tokens, use, budget)


def _not_counted(kind: DeviceKind, has_cuda: bool) -> list[str]:
    """What an estimate for this kind of device leaves out, a sentence each."""
    if kind == "cpu":
        return [
            "what glibc's heap keeps of freed memory is not counted and can be as much again; where jemalloc is "
            "installed training starts with it, and it keeps little"
        ]
    notes = ["what CUDA itself and its libraries take, some hundred MiB, is not counted"]
    if not has_cuda:
        notes.append("torch finds no CUDA here: but for attention, the tensors counted are of the CPU's operators")
    return notes


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


def sizes_of(model: "SpanModel") -> Sizes:
    """Sizes of a model's tensors, on whatever device they are."""
    from qa_dist.model.quantization import num_elements
    from qa_dist.model.span_model import head_parameters

    heads = set(head_parameters(model))
    tensors = dict(model.model.named_parameters())
    trained = dict(model.trainable())
    new = sum(weight.numel() for name, weight in trained.items() if "lora_" in name or name in heads)
    blocks = [sum(map(_stored_bytes, block.parameters())) for block in model.blocks()]
    total = sum(map(_stored_bytes, tensors.values()))
    return Sizes(
        frozen=tuple(_stored_bytes(tensor) for name, tensor in tensors.items() if name not in trained),
        trained=tuple(weight.numel() for weight in trained.values()),
        new=new,
        largest_block=max(blocks, default=0),
        outside=total - sum(blocks),
        quantised=sum(num_elements(tensor) for tensor in tensors.values() if not tensor.is_floating_point()),
    )


def _stored_bytes(parameter: "torch.Tensor") -> int:
    """Bytes of a parameter, with the scales of a quantised one."""
    size = parameter.numel() * parameter.element_size()
    scales: Any = getattr(parameter, "SCB", None)
    if scales is None:
        scales = getattr(getattr(parameter, "quant_state", None), "absmax", None)
    return size if scales is None else size + scales.numel() * scales.element_size()


def _memory_here(kind: DeviceKind, num_processes: int) -> int | None:
    """Memory that a rank of this machine has: of a GPU, or its share of the machine's."""
    import torch

    if kind == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_processes


_EMPTY_RUN = """
import sys
import torch
from transformers import BertConfig, BertForQuestionAnswering
import qa_dist.training.loop
from qa_dist.machine.usage import peak_resident_bytes
for name in sys.argv[1:]:
    __import__(name)
size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100)
model = BertForQuestionAnswering(BertConfig(**size))
optimizer = torch.optim.AdamW(model.parameters())
for precision in (torch.float32, torch.bfloat16):
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        output = model(input_ids=torch.ones(2, 64, dtype=torch.long), start_positions=torch.ones(2, dtype=torch.long),
                       end_positions=torch.ones(2, dtype=torch.long))
    output.loss.backward()
    optimizer.step()
print(peak_resident_bytes())
"""


def _imports(strategy: Strategy, config: RunConfig) -> tuple[str, ...]:
    """What a run imports beside what every run does."""
    packages = {OPTIMIZERS[config.training.optim].package}
    if config.model.quantization != "no":
        packages.add("bitsandbytes")
    if strategy.startswith("zero"):
        packages.add("deepspeed")
    return tuple(sorted(packages - {"torch"}))


def _start_processes(strategies: Iterable[Strategy], config: RunConfig) -> "dict[tuple[str, ...], Future[int]]":
    """`process_bytes` of what each strategy imports, measured while other work goes on."""
    pool = ThreadPoolExecutor()
    sizes = {
        modules: pool.submit(process_bytes, modules)
        for modules in {_imports(strategy, config) for strategy in strategies}
    }
    pool.shutdown(wait=False)
    return sizes


def process_bytes(modules: Sequence[str]) -> int:
    """Resident memory of a process that has imported what training does and these modules, and trained next to nothing.

    Measured in a process of its own: the interpreter, the libraries, their threads and caches.

    Raises:
        UserError: A module cannot be imported, or the process fails in another way.
    """
    command = [sys.executable, "-c", _EMPTY_RUN, *modules]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    if done.returncode:
        raise UserError(
            f"a process that imports what training does fails ({last_line(done.stderr)}); see qa-dist doctor"
        )
    return int(done.stdout.split()[-1])
