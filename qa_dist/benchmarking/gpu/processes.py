"""Part A: whole commands and several ranks, in processes of their own that end when their time is over."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file

from qa_dist.benchmarking.gpu.items import Failed, Figures, Skipped, require_installed
from qa_dist.benchmarking.gpu.scene import Scene, alone, furthest
from qa_dist.benchmarking.job import PACKAGE_ROOT, environment_for_children
from qa_dist.common.shipped import find_shipped
from qa_dist.common.signals import EXIT_STOPPED
from qa_dist.config.options import RunConfig, TrainingConfig, defaults

STRATEGIES = ("fsdp2", "zero1", "zero2", "zero3")
_POLL_SECONDS = 0.01


class Process:
    """A command in a session of its own; a context manager that leaves nothing of it behind."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment_for_children() | quiet | dict(environment or {}),
                cwd=PACKAGE_ROOT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_running:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def terminate(self) -> None:
        """Ask it to stop, with SIGTERM."""
        self._process.terminate()

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        return self._process.wait()

    def text(self, longest: int = 3000) -> str:
        """The end of what it said."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-longest:]

    def require(self, code: int = 0) -> None:
        """Wait for it.

        Raises:
            Failed: It ended with another exit code.
        """
        if (found := self.wait()) != code:
            raise Failed(f"exit code {found} instead of {code}", {"output": self.text().splitlines()[-30:]})


def words(config: RunConfig, **changes: Any) -> list[str]:
    """The configuration as flags of a command."""
    found = []
    for name, value in (config.flat() | changes).items():
        if value is None or value == []:
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        found += [f"--{name}", text.lower() if isinstance(value, bool) else text]
    return found


def _training(scene: Scene, output: str, **options: Any) -> RunConfig:
    """A run of the small model on data of its own."""
    return scene.config(
        output_dir=str(scene.folder / output),
        overwrite_output_dir=True,
        dataset_name="synthetic:64",
        tokenizer_name=str(scene.small_model()),
        preprocessing_num_workers=1,
        eval_steps="no",
        checkpointing_steps="no",
        cuda_graphs="auto",
        **{"keep": "last", "learning_rate": 1e-3, "adam_epsilon": 1e-3, **options},
    )


def prepare(scene: Scene) -> None:
    """Write the features that all these runs use, so that they do not wait for each other."""
    from qa_dist.features.building import prepare_store
    from qa_dist.model.pretrained import load_tokenizer

    config = _training(scene, "none")
    tokenizer = load_tokenizer(config.model)
    for split in ("train", "validation"):
        prepare_store(config, split, tokenizer=tokenizer)


# ----------------------------------------------------------------------------------------------------- stop and resume


def resume(scene: Scene) -> Figures:
    """SIGTERM in the middle of a run: exit code 85; the run that goes on ends with the same bytes as one in one go."""
    prepare(scene)
    can_be_exact = "deterministic" in defaults(TrainingConfig)
    options: dict[str, Any] = {"max_train_steps": scene.choose(300, 60), "num_train_epochs": 100}
    if can_be_exact:
        options["deterministic"] = True
    if scene.is_cuda:
        options["mixed_precision"] = "bf16"
    command = [sys.executable, "-m", "qa_dist.train"]
    stopped, whole = (_training(scene, name, **options) for name in ("stopped", "whole"))
    with ExitStack() as stack:
        runs = [
            stack.enter_context(Process([*command, *words(config)], scene.folder / f"{name}.log"))
            for name, config in (("whole", whole), ("stopped", stopped))
        ]
        folder = scene.folder / "stopped"
        while _num_steps(folder) < 3 and runs[1].is_running:
            time.sleep(_POLL_SECONDS)
        runs[1].terminate()
        runs[1].require(EXIT_STOPPED)
        done = _num_steps(folder)
        again = words(stopped, resume_from_checkpoint="auto", overwrite_output_dir=False)
        with Process([*command, *again], scene.folder / "resumed.log") as resumed:
            resumed.require()
        runs[0].require()
    paths = [scene.folder / name / "adapter_model.safetensors" for name in ("stopped", "whole")]
    figures: Figures = {
        "stopped_after": done,
        "steps": _num_steps(folder),
        "same_bytes": paths[0].read_bytes() == paths[1].read_bytes(),
        "weights_error": furthest(load_file(paths[0]), load_file(paths[1])),
    }
    if not 3 <= done < figures["steps"]:
        raise Failed("the run was not stopped in its middle", figures)
    if scene.is_cuda and not can_be_exact:
        raise Skipped(
            "--deterministic is no option of this version; without it the exit code was 85, the run went on to its "
            f"end, and the weights differ by {figures['weights_error']:.3g}"
        )
    if not figures["same_bytes"]:
        raise Failed("a run that was stopped and resumed ends with other weights than one in one go", figures)
    return figures


def _num_steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count('"loss"') if path.exists() else 0


# ---------------------------------------------------------------------------------------------------------- strategies


def strategies(scene: Scene) -> Figures:
    """FSDP2 and ZeRO through `accelerate launch`, five steps on one rank, against the same run without a launcher."""
    prepare(scene)
    # In float32: in bf16, Adam makes whole steps of what is rounding in small gradients.
    options = {"max_train_steps": 5, "mixed_precision": "no", "max_tokens_per_device": 4 * 384}
    names, missing = list(scene.choose(STRATEGIES, ("fsdp2", "zero2"))), ""
    if find_spec("deepspeed") is None:
        names, missing = ["fsdp2"], "deepspeed is not installed: ZeRO was not tried"
    figures: Figures = {"missing": missing} if missing else {}
    wrong: list[str] = []
    with ExitStack() as stack:
        plain = _training(scene, "plain", **options)
        command = [sys.executable, "-m", "qa_dist.train"]
        alone_run = stack.enter_context(Process([*command, *words(plain)], scene.folder / "plain.log"))
        runs = {name: stack.enter_context(_launched(scene, name, options)) for name in names}
        alone_run.require()
        losses, weights = _result(scene, "plain")
        for name, run in runs.items():
            if code := run.wait():
                wrong.append(f"{name}: exit code {code}")
                figures[f"{name}_output"] = run.text().splitlines()[-15:]
                continue
            record = json.loads((scene.folder / name / "run.json").read_text(encoding="utf-8"))
            found, theirs = _result(scene, name)
            figures[f"{name}_loss_error"] = max(abs(a - b) / b for a, b in zip(found, losses, strict=True))
            figures[f"{name}_weights_error"] = furthest(theirs, weights)
            if record["strategy"] != name:
                wrong.append(f"{name}: it ran {record['strategy']}")
            if not (figures[f"{name}_loss_error"] <= 5e-3 and figures[f"{name}_weights_error"] <= 5e-2):
                wrong.append(f"{name}: other losses or weights")
    if wrong:
        raise Failed("; ".join(wrong), figures)
    if missing and not scene.is_rehearsal:
        raise Skipped(f"{missing}; FSDP2 gave the same as one process")
    return figures


def _launched(scene: Scene, name: str, options: Mapping[str, Any]) -> Process:
    _, path = find_shipped(f"accelerate_configs/{name}.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), "--num_processes", "1"]
    command = [*launcher, "-m", "qa_dist.train", *words(_training(scene, name, **options))]
    # Nothing is compiled: the operators that DeepSpeed would build are not used.
    return Process(command, scene.folder / f"{name}.log", {"DS_BUILD_OPS": "0"})


def _result(scene: Scene, name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a run, and its adapter."""
    lines = (scene.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [entry["loss"] for entry in entries if "grad_norm" in entry], load_file(
        scene.folder / name / "adapter_model.safetensors"
    )


def two_ranks(scene: Scene) -> Figures:
    """Two ranks on one device, through gloo: the same losses and weights as one."""
    from qa_dist.benchmarking.gpu.two_ranks import NUM_STEPS, step_and_save

    config = scene.config(learning_rate=1e-3, adam_epsilon=1e-3, max_tokens_per_device=4 * 384, cuda_graphs="auto")
    spec, theirs, ours = (scene.folder / name for name in ("two.json", "two.safetensors", "one.safetensors"))
    spec.write_text(json.dumps({"options": config.flat(), "result": str(theirs)}), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "-m", "qa_dist.benchmarking.gpu.two_ranks", str(spec)]
    with Process(command, scene.folder / "two.log") as process:
        with alone(config) as ranks:
            step_and_save(config, ranks, ours)
        process.require()
    found, wanted = load_file(theirs), load_file(ours)
    losses = {name: tensors.pop("losses") for name, tensors in (("two", found), ("one", wanted))}
    figures: Figures = {"steps": NUM_STEPS, "weights_error": furthest(found, wanted)}
    figures["loss_error"] = float(((losses["two"] - losses["one"]).abs() / losses["one"]).max())
    if not max(figures["weights_error"], figures["loss_error"]) <= 1e-4:
        raise Failed("two ranks do not give what one gives", figures)
    return figures


# ---------------------------------------------------------------------------------------------------------- unit tests


def unit_tests(scene: Scene) -> Figures:
    """The unit tests of the checkout, as they are, on this machine's device and versions."""
    folder = PACKAGE_ROOT / "tests" / "unit"
    if not folder.is_dir():
        raise Skipped("there are no tests beside the package")
    require_installed("pytest", "pytest_timeout", "hypothesis")
    what = scene.choose(str(folder), str(folder / "features" / "test_token_budget.py"))
    command = [sys.executable, "-m", "pytest", "-W", "default", "-q", "-p", "no:cacheprovider", what]
    if find_spec("xdist") is not None and not scene.is_rehearsal:
        command += ["-n", str(max(2, min(12, (os.cpu_count() or 2) - 2))), "--dist", "loadfile"]
    with Process(command, scene.folder / "pytest.log") as process:
        code = process.wait()
        text = process.text(20_000)
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    figures: Figures = {**counts, "failing": failed[:60]}
    if code or not counts.get("passed"):
        raise Failed(f"pytest ended with {code}", figures | {"output": text.splitlines()[-25:]})
    return figures
