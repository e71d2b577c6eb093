"""Checkpoints on disk: whole or absent, verified, pruned, and refused with a sentence if they are damaged."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from qa_dist.common.errors import CheckpointError
from qa_dist.config.optimizers import OPTIMIZERS, OptimizerName
from qa_dist.config.options import TrainingConfig
from qa_dist.distributed.strategies.optimizer_state import load_optimizer_tensors, optimizer_tensors
from qa_dist.training import checkpoints
from qa_dist.training.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    discard_after,
    newest_checkpoint,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from qa_dist.training.optimizer import make_optimizer
from qa_dist.training.run_state import BestScore, RunState


def checkpoint(step: int, *, best: bool = True) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weights = {"layer.lora_A": torch.randn(4, 3, generator=generator), "head.bias": torch.randn(2, generator=generator)}
    return Checkpoint(
        step=step,
        weights=weights,
        optimizer={f"exp_avg/{name}": tensor * 0.1 for name, tensor in weights.items()},
        best={name: tensor + 1 for name, tensor in weights.items()} if best else None,
        identity={"seed": 1, "learning_rate": 1e-3, "lora_target_modules": ["attention"]},
        state=RunState(best=BestScore(1 / 3, 2) if best else None, world_size=2, max_tokens_per_device=64),
    )


def same(one: Checkpoint, other: Checkpoint) -> bool:
    tensors = [(one.weights, other.weights), (one.optimizer, other.optimizer), (one.best or {}, other.best or {})]
    equal = all(
        left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        for left, right in tensors
    )
    return equal and (one.step, one.identity, one.state) == (other.step, other.identity, other.state)


@pytest.mark.parametrize("best", [True, False])
def test_what_is_written_is_read_back(tmp_path: Path, best: bool) -> None:
    written = checkpoint(120, best=best)
    path = write_checkpoint(written, tmp_path / "checkpoints")
    assert path.name == "step-00000120"
    assert same(read_checkpoint(path), written)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000120"]


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def reseal(path: Path, name: str, data: bytes) -> None:
    """Put a file into a checkpoint as its maker could have."""
    (path / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": checkpoints._digest(data)}
    edit_manifest(path, lambda manifest: manifest["files"].update({name: entry}))


def edit_progress(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    position = json.loads((path / "state.json").read_text())
    change(position["progress"])
    reseal(path, "state.json", json.dumps(position).encode())


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("bomb-went-off",)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path / "trained.safetensors", 20), "has 20 bytes instead of"),
    "empty": (lambda path: os.truncate(path / "optimizer.safetensors", 0), "has 0 bytes"),
    "bit flipped": (lambda path: flip(path / "optimizer.safetensors"), "SHA-256 differs"),
    "bit flipped in the state": (lambda path: flip(path / "state.json"), "SHA-256 differs"),
    "file missing": (lambda path: (path / "trained.safetensors").unlink(), "trained.safetensors is missing"),
    "manifest missing": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest cut": (lambda path: os.truncate(path / "manifest.json", 30), "is not JSON"),
    "manifest a list": (lambda path: (path / "manifest.json").write_text("[]"), "is not a JSON object"),
    "manifest too deep": (lambda path: (path / "manifest.json").write_text("[" * 100_000), "is not JSON"),
    "manifest with endless digits": (
        lambda path: (path / "manifest.json").write_text(f'{{"format": {"1" * 5000}}}'),
        "is not JSON",
    ),
    "another step's": (
        lambda path: reseal(
            path, "state.json", (path / "state.json").read_bytes().replace(b'"step": 10', b'"step": 11')
        ),
        "not that of the folder's name",
    ),
    "foreign version": (lambda path: edit_manifest(path, lambda m: m.update(format=99)), "format 99"),
    "file not listed": (lambda path: edit_manifest(path, lambda m: m["files"].pop("state.json")), "does not list"),
    "foreign file listed": (
        lambda path: edit_manifest(path, lambda m: m["files"].update({"../../x": {}})),
        "does not list",
    ),
    "entry no object": (lambda path: edit_manifest(path, lambda m: m["files"].update({"state.json": 3})), "damaged"),
    "link": (lambda path: replace_by_link(path / "trained.safetensors"), "not a plain file"),
    "a folder in a file's place": (
        lambda path: ((path / "state.json").unlink(), (path / "state.json").mkdir()),
        "not a plain file",
    ),
    "state without a step": (lambda path: reseal(path, "state.json", b'{"identity": {}}'), "does not describe"),
    "state of another version": (
        lambda path: edit_progress(path, lambda progress: progress.pop("world_size")),
        "progress lacks world_size",
    ),
    "best without its tensors": (
        lambda path: edit_manifest(path, lambda m: m["files"].pop("best.safetensors")),
        "do not agree on whether there is a best evaluation",
    ),
    "a pickle": (lambda path: reseal(path, "trained.safetensors", pickle.dumps(Bomb())), "not a safetensors file"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, sentence = DAMAGES[name]
    folder = tmp_path / "checkpoints"
    write_checkpoint(checkpoint(5), folder)
    newest = write_checkpoint(checkpoint(10), folder)
    damage(newest)
    with pytest.raises(CheckpointError, match=sentence):
        read_checkpoint(newest)
    told: list[str] = []
    found = newest_checkpoint(folder, told.append)
    assert found is not None
    assert found.step == 5
    assert len(told) == 1
    assert told[0].startswith("passed over step-00000010: ")
    assert sentence in told[0]
    assert not (tmp_path / "bomb-went-off").exists()


def test_a_disk_that_cannot_read_a_file_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5, 10):
        write_checkpoint(checkpoint(step), tmp_path)
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.match("step-00000010/optimizer.safetensors"):
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    told: list[str] = []
    found = newest_checkpoint(tmp_path, told.append)
    assert found is not None
    assert found.step == 5
    assert len(told) == 1
    assert "optimizer.safetensors cannot be read: Input/output error" in told[0]


def test_a_linked_or_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(checkpoint(5), tmp_path / "elsewhere")
    link = tmp_path / "step-00000005"
    link.symlink_to(path)
    with pytest.raises(CheckpointError, match="is a link"):
        read_checkpoint(link)
    with pytest.raises(CheckpointError, match="is missing"):
        read_checkpoint(tmp_path / "step-00000006")


def test_no_checkpoint_is_not_the_same_as_none_that_can_be_used(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "checkpoints", pytest.fail) is None
    path = write_checkpoint(checkpoint(5), tmp_path / "checkpoints")
    (path / "state.json").unlink()
    told: list[str] = []
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        newest_checkpoint(tmp_path / "checkpoints", told.append)
    assert "state.json is missing" in told[0]


class Killed(BaseException):
    """Stands for SIGKILL: nothing behind it runs."""


def interruptions(monkeypatch: pytest.MonkeyPatch, folder: Path, act: Callable[[], object]) -> int:
    """How many system calls `act` makes; with each of them as the last one, the newest checkpoint stays readable."""
    calls = 0
    limit: int | None = None

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            if calls == limit:
                raise Killed(name)
            calls += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (os, "open")):
        counted(module, name)
    pristine = folder.with_name("pristine")
    shutil.copytree(folder, pristine)
    calls = 0
    act()
    total = calls
    for limit in range(total):
        calls = -(10**6)
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)
        calls = 0
        with pytest.raises(Killed):
            act()
        calls = -(10**6)
        told: list[str] = []
        found = newest_checkpoint(folder, told.append)
        assert found is not None, limit
        assert found.step in (10, 15), limit
        assert not told, "a write or removal cut short must not look like a checkpoint"
        # The next writer clears what is left.
        write_checkpoint(checkpoint(20), folder)
        prune(folder, 2)
        assert [name for name in os.listdir(folder) if name.startswith(".")] == []
    return total


def test_killed_at_any_instant_of_a_save_leaves_the_checkpoints_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    for step in (5, 10):
        write_checkpoint(checkpoint(step), folder)

    def save() -> None:
        write_checkpoint(checkpoint(15), folder)
        prune(folder, 2)

    assert interruptions(monkeypatch, folder, save) > 10


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_is_one_warning_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "checkpoints"
    told: list[str] = []
    writer = CheckpointWriter(folder, 2, told.append)
    writer.save(checkpoint(5))
    assert writer.wait()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, name, full)
        writer.save(checkpoint(10))
        assert not writer.wait()
    assert len(told) == 1
    assert "the checkpoint of step 10 cannot be written" in told[0]
    assert "No space left on device" in told[0]
    assert os.listdir(folder) == ["step-00000005"]
    writer.save(checkpoint(15))
    assert writer.wait()
    found = newest_checkpoint(folder, pytest.fail)
    assert found is not None
    assert same(found, checkpoint(15))


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning_beside_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where somebody still reads it: a run that is stopped there can go on all the same."""

    def busy(directory: Path, keep: int | None) -> None:
        raise OSError(16, "Device or resource busy")

    told: list[str] = []
    writer = CheckpointWriter(tmp_path, 1, told.append)
    writer.save(checkpoint(5))
    assert writer.wait()
    monkeypatch.setattr(checkpoints, "prune", busy)
    writer.save(checkpoint(10))
    assert writer.wait(), "the last checkpoint is there"
    assert told == [f"warning: old checkpoints cannot be removed from {tmp_path}: [Errno 16] Device or resource busy"]
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 10


def test_whatever_fails_beside_the_training_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    writer = CheckpointWriter(tmp_path, 2, told.append)

    def exhausted(*arguments: object) -> bytes:
        raise MemoryError("no more")

    monkeypatch.setattr(checkpoints, "save", exhausted)
    writer.save(checkpoint(5))
    assert not writer.wait(), "a run that stops must know"
    assert told == ["warning: the checkpoint of step 5 cannot be written: MemoryError: no more"]


def test_the_limit_keeps_the_newest(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    writer = CheckpointWriter(folder, 3, pytest.fail)
    for step in range(5, 35, 5):
        writer.save(checkpoint(step))
    assert writer.wait()
    assert sorted(os.listdir(folder)) == ["step-00000020", "step-00000025", "step-00000030"]
    told: list[str] = []
    discard_after(folder, 20, told.append)
    assert os.listdir(folder) == ["step-00000020"]
    assert told == [f"step-000000{step} of a later step was removed; the run writes it again" for step in (25, 30)]


def test_what_no_run_wrote_stays(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (5, 10, 15):
        write_checkpoint(checkpoint(step), folder)
    own = ["notes.txt", "step-00000010.bak", "step-00000010_good", "step-notes.txt", "step-3"]
    for name in own:
        (folder / name).mkdir() if "." not in name else (folder / name).write_text("mine")
    found = newest_checkpoint(folder, pytest.fail)
    assert found is not None
    assert found.step == 15
    prune(folder, 2)
    discard_after(folder, 10, lambda text: None)
    assert sorted(os.listdir(folder)) == sorted([*own, "step-00000010"])


def test_a_later_checkpoint_of_another_version_is_kept_aside_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write_checkpoint(checkpoint(step), tmp_path)
    edit_manifest(tmp_path / "step-00000010", lambda manifest: manifest.update(format=2))
    flip(tmp_path / "step-00000015" / "state.json")
    told: list[str] = []
    discard_after(tmp_path, 5, told.append)
    assert told == [
        "step-00000010 of a later step is now called kept-step-00000010, as it cannot be read here",
        "step-00000015 of a later step, which is damaged, was removed",
    ]
    assert sorted(os.listdir(tmp_path)) == ["kept-step-00000010", "step-00000005"]


def test_the_folder_of_a_run_is_no_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(checkpoint(5), tmp_path / "checkpoints")
    for path in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match=r"is no checkpoint but holds some; name one, such as .*05,"):
            read_checkpoint(path)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = write_checkpoint(checkpoint(5), tmp_path / "checkpoints")
    flip(path / "state.json")
    write_checkpoint(checkpoint(5), tmp_path / "checkpoints")
    assert same(read_checkpoint(path), checkpoint(5))


# On a CPU bitsandbytes pages nothing, and says so: which is why `require_optimizer` refuses it there.
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimiser_goes_on_from_its_tensors_bit_for_bit(kind: OptimizerName) -> None:
    pytest.importorskip(OPTIMIZERS[kind].package, reason="an extra is not installed")

    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 2))
        training = TrainingConfig(optim=kind, learning_rate=0.1, adam_beta2=0.99, weight_decay=0.1)
        return model, make_optimizer(training, model.named_parameters())

    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            inputs = torch.randn(5, 96, generator=torch.Generator().manual_seed(number))
            model(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = build()
    steps(model, optimizer, range(3))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = optimizer_tensors(optimizer, model.named_parameters())
    steps(model, optimizer, range(3, 6))

    expected = optimizer_tensors(optimizer, model.named_parameters())
    assert {value.dtype for key, value in tensors.items() if key.endswith("/0.weight")} >= (
        {torch.float32} if OPTIMIZERS[kind].quantisation is None else {torch.uint8, torch.float32}
    )
    again, fresh = build()
    # As in a new process, and in one that has gone on meanwhile.
    for _ in range(2):
        again.load_state_dict(weights)
        load_optimizer_tensors(fresh, again.named_parameters(), load(save(tensors)))
        steps(again, fresh, range(3, 6))
        found = optimizer_tensors(fresh, again.named_parameters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    load_optimizer_tensors(fresh, again.named_parameters(), {})
    assert optimizer_tensors(fresh, again.named_parameters()) == {}
