"""What a CUDA device would be asked to do, counted on a machine without one.

Tensors are fake: they have a shape, a type and the device "cuda", and no memory. Autograd and autocast treat them as
they treat real ones, so that operators, their types and their order are those of a real run. torch's build for CPUs
ends the process where autograd meets such a device, unless a library of a few lines (`cuda_shim.cpp`) says that there
is one; it must be loaded before torch, so what is counted runs in forks of a process that has loaded it:

    counts = run("tests.compiled.launch_counts:passes")      # in a test, marked with `needs_compiler`

    def passes() -> dict[str, Any]:                            # over there
        with fake_cuda():
            model = ...                                        # as `fake_weights` gives it
            return {"bert": asdict(count(lambda: step(model)))}
"""

import atexit
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)

_SOURCE = Path(__file__).with_name("cuda_shim.cpp")

_COMPILER = shutil.which("g++")

needs_compiler = pytest.mark.skipif(
    _COMPILER is None or sys.platform != "linux", reason="counting on fake CUDA tensors needs Linux and g++"
)

_NO_KERNEL = frozenset(
    f"aten::{name}"
    for name in (
        *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
        *("_unsafe_view", "lift_fresh", "set_"),
    )
)
"""Operators that launch nothing and are not marked as views."""

_MORE_KERNELS = {
    # Zeros and a copy.
    "aten::select_backward": 1,
    "aten::slice_backward": 1,
    "aten::nll_loss_backward": 1,
    # The sums over the head, the gradients, and the conversion of that of the queries.
    "aten::_flash_attention_backward": 2,
    "torch_attn::_varlen_attn_backward": 2,
}
"""Kernels of an operator beyond its first."""

_NOT_ELEMENTWISE = frozenset(
    f"aten::{name}"
    for name in (
        *("mm", "addmm", "bmm", "baddbmm", "embedding", "embedding_dense_backward"),
        *("_flash_attention_forward", "_flash_attention_backward"),
        *("_efficient_attention_forward", "_efficient_attention_backward"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward"),
    )
) | {"torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"}

_PRELOADED = (
    *("peft", "transformers.models.bert.modeling_bert", "qa_dist.model.building", "qa_dist.training.trainer"),
    "qa_dist.distributed.ranks",
)


@dataclass(frozen=True, slots=True)
class Counts:
    """What a piece of work asked of the device.

    Attributes:
        launches: kernels and copies.
        syncs: times that the host waited for the device.
        elementwise_bytes: what is read and written by all but products, attention and embeddings.
        by_name: launches by operator.
        sync_names: waits by operator.
        dtypes: for operators asked for in `count`, the types of their first tensors, each combination once.
    """

    launches: int
    syncs: int
    elementwise_bytes: int
    by_name: Mapping[str, int]
    sync_names: Mapping[str, int]
    dtypes: Mapping[str, list[str]] = field(default_factory=dict)


class _Counter(TorchDispatchMode):
    def __init__(self, watched: tuple[str, ...]) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.sync_names: Counter[str] = Counter()
        self.elementwise_bytes = 0
        self.dtypes: dict[str, set[str]] = {name: set() for name in watched}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in inputs if tensor.device.type == "cuda"]
        name = func._schema.name
        if name == "aten::_local_scalar_dense" and on_device:
            self.by_name[name] += 1
            self.sync_names[name] += 1
            # Nobody knows the number: none that is not finite, no flag that is set.
            with _disable_current_modes():
                return torch.zeros((), dtype=args[0].dtype).item()
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type == "cpu" and not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            # The host's own work is done.
            with _disable_current_modes():
                return func(*args, **kwargs)
        output = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if on_device and made and all(tensor.device.type == "cpu" for tensor in made) and "copy" in name:
            self.by_name[f"{name} to the host"] += 1
            if _is_waited_for(name, args, kwargs):
                self.sync_names[f"{name} to the host"] += 1
            return output if name == "aten::copy_" else _zeros(made[0])
        if not on_device and not any(tensor.device.type == "cuda" for tensor in made):
            return output
        self._note(func, name, inputs, made, args, kwargs)
        return output

    def _note(self, func: Any, name: str, inputs: Any, made: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        returns = func._schema.returns
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
        if is_view or name in _NO_KERNEL or name.startswith("prim::"):
            return
        is_upload = "copy" in name and any(tensor.device.type == "cpu" and tensor.ndim for tensor in inputs)
        if is_upload and _is_waited_for(name, args, kwargs):
            self.sync_names[f"{name} from the host"] += 1
        self.by_name[name] += 1 + _MORE_KERNELS.get(name, 0)
        if name in self.dtypes:
            self.dtypes[name].add(" ".join(str(tensor.dtype).removeprefix("torch.") for tensor in inputs[:3]))
        if name not in _NOT_ELEMENTWISE:
            tensors = {id(tensor): tensor for tensor in (*inputs, *made) if tensor.device.type == "cuda"}
            self.elementwise_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _is_waited_for(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the host waits for a copy: `copy_` takes `non_blocking` as its third argument as well."""
    return not kwargs.get("non_blocking", args[2] if name == "aten::copy_" and len(args) > 2 else False)


def _zeros(like: torch.Tensor) -> torch.Tensor:
    """A tensor of the host, with memory, in the place of what the device would have sent."""
    with _disable_current_modes():
        return torch.zeros(like.shape, dtype=like.dtype)


def count(work: Callable[[], object], watched: tuple[str, ...] = ()) -> Counts:
    """What `work` asks of the device, inside `fake_cuda`; `watched` are operators whose types are noted, "aten::mm"."""
    with _Counter(watched) as counter:
        work()
    return Counts(
        launches=sum(counter.by_name.values()),
        syncs=sum(counter.sync_names.values()),
        elementwise_bytes=counter.elementwise_bytes,
        by_name=dict(counter.by_name.most_common()),
        sync_names=dict(counter.sync_names),
        dtypes={name: sorted(found) for name, found in counter.dtypes.items()},
    )


class _FakeMode(FakeTensorMode):
    # There is nothing to initialise.
    avoid_device_init = True  # type: ignore[assignment]


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Context in which tensors can be made on `CUDA`, in a process that `run` started; tensors of the CPU stay real."""
    init = torch.autocast.__init__
    many = [FakeTensor, torch.nn.Parameter]

    def believing(self: Any, *args: Any, **options: Any) -> None:
        with (
            mock.patch.object(torch.cuda, "is_available", return_value=True),
            mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        ):
            init(self, *args, **options)

    with (
        mock.patch.object(torch.autocast, "__init__", believing),
        # What torch does to many tensors at once on a device it does to these, too.
        mock.patch.object(_foreach_utils, "_foreach_supported_types", many),
        mock.patch.object(sys.modules[torch.optim.Optimizer.__module__], "_foreach_supported_types", many),
        _FakeMode(allow_non_fake_inputs=True),
    ):
        yield


def run(function: str) -> Any:
    """What a function named "package.module:function" returns, as JSON, in a process that has a fake CUDA device.

    Raises:
        AssertionError: It failed; the message is what the process wrote.
    """
    with tempfile.TemporaryDirectory() as name:
        server, result, errors = _server(), Path(name) / "result", Path(name) / "errors"
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps([function, str(result), str(errors)]) + "\n")
        server.stdin.flush()
        code = server.stdout.readline().strip()
        assert code == "0", f"{function} ended with {code or 'its server'}:\n{errors.read_text()[-4000:]}"
        return json.loads(result.read_text(encoding="utf-8"))


@cache
def _server() -> "subprocess.Popen[str]":
    """A process that has a fake CUDA device, and what it has imported so far; it ends with this one."""
    libraries = Path(torch.__file__).parent / "lib"
    environment = {**os.environ, "LD_PRELOAD": str(_shim()), "LD_LIBRARY_PATH": str(libraries)}
    command = [sys.executable, "-W", "ignore", "-m", __name__]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    atexit.register(server.communicate)
    return server


def _shim() -> Path:
    """The shim, compiled for the installed torch: once, and kept."""
    key = hashlib.sha256(_SOURCE.read_bytes() + f"{torch.__version__} {torch.__file__}".encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"qa_dist_cuda_shim_{os.getuid()}_{key}.so"
    if not path.exists():
        torch_dir = Path(torch.__file__).parent
        aside = path.with_suffix(f".{os.getpid()}")
        command = [str(_COMPILER), "-O0", "-std=c++20", "-shared", "-fPIC", str(_SOURCE), "-o", str(aside)]
        command += [f"-I{torch_dir / 'include'}", f"-L{torch_dir / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
        aside.replace(path)
    return path


def _main() -> None:
    """Serve requests for a function, until there are no more; each is done by a fork, which leaves nothing behind."""
    answers = os.fdopen(os.dup(1), "w")
    # What libraries print is no answer.
    os.dup2(2, 1)
    for name in _PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        function, result, errors = json.loads(line)
        with suppress(Exception):
            # Here, so that others find it imported; the fork says what is wrong.
            importlib.import_module(function.partition(":")[0])
        if not (child := os.fork()):
            _answer(function, Path(result), errors)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def _answer(function: str, result: Path, errors: str) -> None:
    """Write what a function returns, and end this process."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(2, 1)
    try:
        module, _, name = function.partition(":")
        result.write_text(json.dumps(getattr(importlib.import_module(module), name)()), encoding="utf-8")
    except Exception:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    _main()
