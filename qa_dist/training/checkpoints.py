"""Checkpoints of a run: written whole or not at all, verified before they are used.

A checkpoint is a folder `checkpoints/step-00000120` of safetensors and JSON files, so that reading one executes
nothing. It holds what cannot be computed again: the trained tensors, the optimiser's state, the best weights so far,
and how far the run is. The order of the features, the dropout and the learning rate are functions of seed and step.

A manifest with the size and SHA-256 of every file is written last, everything is flushed to the disk under another
name, and one rename makes it a checkpoint. Tensors are whole and named as in the model, whatever the strategy or the
number of ranks was, so that any other can go on.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from qa_dist.common.errors import CheckpointError
from qa_dist.common.files import staged
from qa_dist.model.span_model import Weights
from qa_dist.training.run_state import RunState

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints inside a run's folder."""

FORMAT = 1
WEIGHTS, OPTIMIZER, BEST, STATE, MANIFEST = (
    "trained.safetensors",
    "optimizer.safetensors",
    "best.safetensors",
    "state.json",
    "manifest.json",
)
REQUIRED = frozenset((WEIGHTS, OPTIMIZER, STATE))
_PREFIX = "step-"
_NAME = re.compile(rf"{_PREFIX}\d{{8,}}")
"""What folders of checkpoints are called; whatever else lies among them is somebody's, and is left alone."""

_ASIDE = "kept-"
_PARTIAL = ".partial-"
_MOMENTS = frozenset(("exp_avg", "exp_avg_sq", "state1", "state2"))
_DOOMED = ".doomed-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A position in a run and everything needed to go on from it.

    Attributes:
        step: Optimiser steps done.
        weights: The trained tensors by parameter name, on the CPU.
        optimizer: The optimiser's tensors as `kind/parameter`, on the CPU.
        best: The trained tensors of the best evaluation so far; None before the first evaluation.
        identity: What a run must share with this one to go on from here: see `run_identity`.
        state: What the run knows besides.
    """

    step: int
    weights: Weights
    optimizer: Weights
    best: Weights | None
    identity: Mapping[str, Any]
    state: RunState


class _UnreadError(CheckpointError):
    """A checkpoint that another version, or the disk at another time, may give."""


def write_checkpoint(checkpoint: Checkpoint, directory: Path) -> Path:
    """Write a checkpoint into the folder of checkpoints; returns its own folder.

    Raises:
        CheckpointError: It cannot be written: the disk is full, the folder read-only. Nothing is left of it, and
            other checkpoints are as they were.
    """
    final = directory / _name(checkpoint.step)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with staged(final, aside=directory / f"{_PARTIAL}{final.name}") as aside:
            aside.mkdir()
            for name, data in _files_of(checkpoint).items():
                (aside / name).write_bytes(data)
            # A checkpoint of this step that is there did not verify, or the run would have gone on from it.
            _remove(final)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} cannot be written to {directory}: {error.strerror or error}; "
            "free some space or make the folder writable"
        ) from error
    return final


def _files_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Content of every file of a checkpoint by name; the manifest, which is about the others, is last."""
    position = {"step": checkpoint.step, "identity": checkpoint.identity, "progress": checkpoint.state.to_json()}
    files = {WEIGHTS: save(checkpoint.weights), OPTIMIZER: save(checkpoint.optimizer)}
    if checkpoint.best is not None:
        files[BEST] = save(checkpoint.best)
    files[STATE] = json.dumps(position, indent=1).encode()
    entries = {name: {"bytes": len(data), "sha256": _digest(data)} for name, data in files.items()}
    files[MANIFEST] = json.dumps({"format": FORMAT, "files": entries}, indent=1).encode()
    return files


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint whose files are all there and as they were written.

    Raises:
        CheckpointError: It is incomplete, damaged, of another format, or holds links or foreign files.
    """
    _require_folder(path)
    if not os.path.lexists(path / MANIFEST) and (
        inside := [*checkpoints_in(path), *checkpoints_in(path / CHECKPOINTS)]
    ):
        raise CheckpointError(
            f"{path} is no checkpoint but holds some; name one, such as {inside[-1]}, or go on in a run's own folder "
            "with --output_dir and --resume_from_checkpoint auto"
        )
    manifest = _json(path, MANIFEST, _read(path, MANIFEST))
    version = manifest.get("format")
    if version != FORMAT:
        raise _UnreadError(
            f"{path} has format {version!r} and this version reads {FORMAT}; use the version that wrote it"
        )
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not REQUIRED <= set(entries) <= REQUIRED | {BEST}:
        raise CheckpointError(f"{path}: {MANIFEST} does not list the files of a checkpoint; it is damaged")
    data = {name: _verified(path, name, entry) for name, entry in entries.items()}
    position = _json(path, STATE, data[STATE])
    step, identity = position.get("step"), position.get("identity")
    if not isinstance(step, int) or step < 0 or not isinstance(identity, dict) or "progress" not in position:
        raise CheckpointError(f"{path}: {STATE} does not describe a position in a run; it is damaged")
    if _NAME.fullmatch(path.name) and path.name != _name(step):
        raise CheckpointError(f"{path}: {STATE} is about step {step}, not that of the folder's name; it is damaged")
    state = RunState.from_json(position["progress"], path / STATE)
    if (state.best is None) != (BEST not in data):
        raise CheckpointError(f"{path}: {STATE} and {BEST} do not agree on whether there is a best evaluation")
    return Checkpoint(
        step=step,
        weights=_tensors(path, WEIGHTS, data[WEIGHTS]),
        optimizer=_tensors(path, OPTIMIZER, data[OPTIMIZER]),
        best=_tensors(path, BEST, data[BEST]) if BEST in data else None,
        identity=identity,
        state=state,
    )


def newest_checkpoint(directory: Path, notice: Callable[[str], object]) -> Checkpoint | None:
    """The newest checkpoint in the folder that verifies; `notice` hears which were passed over, and why.

    Returns:
        None if the folder holds no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, and none can be used.
    """
    paths = checkpoints_in(directory)
    for path in reversed(paths):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            notice(f"passed over {path.name}: {error}")
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {directory} can be used, for the reasons above; remove the "
            "folder to start anew"
        )
    return None


def misfit(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], num_steps: int) -> str | None:
    """Why a run cannot go on from a checkpoint whose files are as they were written; None if it can.

    Args:
        checkpoint: The checkpoint, of a run with the same options.
        shapes: Of the trained tensors, by parameter name.
        num_steps: Optimiser steps of the run.
    """
    if checkpoint.step > num_steps:
        return f"it is of step {checkpoint.step} and the run has {num_steps} steps"
    for what, weights in (("weights", checkpoint.weights), ("best weights", checkpoint.best)):
        if weights is not None and {name: tuple(tensor.shape) for name, tensor in weights.items()} != dict(shapes):
            return f"its {what} have other names or shapes than the model's"
    for key, tensor in checkpoint.optimizer.items():
        kind, _, name = key.partition("/")
        if name not in shapes or (kind in _MOMENTS and tuple(tensor.shape) != shapes[name]):
            return f"its optimiser state has {key} [{', '.join(map(str, tensor.shape))}], which fits no tensor"
    # With loss scaling all steps so far may have been left out.
    if checkpoint.step and not checkpoint.optimizer and checkpoint.state.gradient_scaler is None:
        return "its optimiser state is empty"
    return None


def discard_after(directory: Path, step: int, notice: Callable[[str], object]) -> None:
    """Remove the checkpoints of later steps than `step`: a run that goes on from there writes them again.

    One that only another version can read, or that the disk does not give now, is renamed and kept.

    Args:
        directory: The folder of checkpoints.
        step: The step that the run goes on after.
        notice: Hears what becomes of each.
    """
    for path in checkpoints_in(directory):
        if path.name <= _name(step):
            continue
        try:
            read_checkpoint(path)
        except _UnreadError:
            aside = path.with_name(f"{_ASIDE}{path.name}")
            _remove(aside)
            os.replace(path, aside)
            notice(f"{path.name} of a later step is now called {aside.name}, as it cannot be read here")
        except CheckpointError:
            _remove(path)
            notice(f"{path.name} of a later step, which is damaged, was removed")
        else:
            _remove(path)
            notice(f"{path.name} of a later step was removed; the run writes it again")


def prune(directory: Path, keep: int | None) -> None:
    """Remove all but the `keep` newest checkpoints, and what an interrupted writer or pruner left."""
    for left in [*directory.glob(f"{_PARTIAL}*"), *directory.glob(f"{_DOOMED}*")]:
        _remove(left)
    if keep is not None:
        for path in checkpoints_in(directory)[:-keep]:
            _remove(path)


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time, and removes the oldest ones.

    A checkpoint that cannot be written is a warning to `notice`, and the run goes on: the ones before it are whole.
    """

    def __init__(self, directory: Path, keep: int | None, notice: Callable[[str], object]) -> None:
        self.directory = directory
        self._keep = keep
        self._notice = notice
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._complaint: str | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Start writing; waits for the checkpoint before, if that is still being written."""
        self.wait()
        # Not a daemon: the interpreter ends after it.
        self._thread = threading.Thread(target=self._work, args=(checkpoint,), name="checkpoint")
        self._thread.start()

    def wait(self) -> bool:
        """Wait for the disk; whether the last checkpoint is there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        complaint, self._complaint = self._complaint, None
        for problem in (failure, complaint):
            if problem is not None:
                self._notice(f"warning: {problem}")
        return failure is None

    def _work(self, checkpoint: Checkpoint) -> None:
        try:
            write_checkpoint(checkpoint, self.directory)
        except CheckpointError as error:
            self._failure = error
        except Exception as error:
            # Memory may have run out, say. Nobody sees an exception of this thread, and the run would go on, or even
            # stop, in the belief that the checkpoint is there.
            self._failure = CheckpointError(
                f"the checkpoint of step {checkpoint.step} cannot be written: {type(error).__name__}: {error}"
            )
        else:
            try:
                prune(self.directory, self._keep)
            except OSError as error:
                self._complaint = f"old checkpoints cannot be removed from {self.directory}: {error}"


def _name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def checkpoints_in(directory: Path) -> list[Path]:
    """What is named as checkpoints are, oldest first."""
    found = directory.glob(f"{_PREFIX}*") if directory.is_dir() else ()
    return sorted(path for path in found if _NAME.fullmatch(path.name))


def _remove(path: Path) -> None:
    """Remove a folder; a checkpoint is renamed first, so that a removal cut short leaves no half of one."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        if path.name.startswith(_PREFIX):
            doomed = path.with_name(f"{_DOOMED}{path.name}")
            _remove(doomed)
            os.replace(path, doomed)
            path = doomed
        shutil.rmtree(path)


def _require_folder(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        what = "a link" if path.is_symlink() else "not a folder" if path.exists() else "missing"
        raise CheckpointError(f"the checkpoint {path} is {what}; give a folder that a run wrote")


def _read(path: Path, name: str) -> bytes:
    """Content of one file of a checkpoint; links and devices are refused."""
    file = path / name
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            raise CheckpointError(f"{file} is not a plain file; a checkpoint holds nothing else")
        return file.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is incomplete: {name} is missing") from error
    except OSError as error:
        raise _UnreadError(f"{file} cannot be read: {error.strerror or error}") from error


def _verified(path: Path, name: str, entry: Any) -> bytes:
    data = _read(path, name)
    expected = entry if isinstance(entry, dict) else {}
    if len(data) != expected.get("bytes"):
        raise CheckpointError(f"{path / name} has {len(data)} bytes instead of {expected.get('bytes')}; it is damaged")
    if _digest(data) != expected.get("sha256"):
        raise CheckpointError(f"{path / name} is not what was written (its SHA-256 differs); it is damaged")
    return data


def _json(path: Path, name: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        # Besides what is no UTF-8 and no JSON: numbers with thousands of digits.
        raise CheckpointError(f"{path / name} is not JSON; it is damaged") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path / name} is not a JSON object; it is damaged")
    return value


def _tensors(path: Path, name: str, data: bytes) -> Weights:
    try:
        weights: Weights = load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path / name} is not a safetensors file; it is damaged") from error
    return weights


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
