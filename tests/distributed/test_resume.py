"""A run that is stopped or killed, at any instant, ends as if it had never been.

The runs are real ones, of a tiny model, forked from a server (see `forking`). `QA_DIST_KILLS` sets how often the random
kills strike, and `QA_DIST_SEED` when. `QA_DIST_THOROUGH=1` follows every run that is killed inside a save to its end.
"""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qa_dist.training.checkpoints import newest_checkpoint
from tests.distributed.disks import Trouble, end, run_rank_in, small_disk
from tests.distributed.forking import Fault, Group, run_rank_and_copy, start, start_ranks, torchrun_store
from tests.distributed.launching import lines
from tests.tiny import tiny_model, tiny_squad

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3000)]

NUM_KILLS = int(os.environ.get("QA_DIST_KILLS", "4"))
SEED = int(os.environ.get("QA_DIST_SEED", "0"))
IS_THOROUGH = os.environ.get("QA_DIST_THOROUGH") == "1"
EPOCHS = 3
NUM_STEPS = 18
NUM_FEATURES = 45
BATCH = 8
assert EPOCHS * math.ceil(NUM_FEATURES / BATCH) == NUM_STEPS
RESULTS = ("adapter_model.safetensors", "metrics.json", "predictions.json", "nbest.json", "metrics.jsonl")


class Runs:
    """Starts runs of one configuration, and keeps what the uninterrupted one of each world size left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        options = {
            "model_name_or_path": tiny_model("bert", folder / "bert", num_layers=1),
            "train_file": tiny_squad(folder / "train.json", NUM_FEATURES, seed=1, longest=40),
            "validation_file": tiny_squad(folder / "dev.json", 9, seed=2, longest=40),
            "store_dir": folder / "store",
            "max_seq_length": 64,
            "doc_stride": 16,
            "max_tokens_per_device": 192,
            "num_train_epochs": EPOCHS,
            "global_batch_size": BATCH,
            "learning_rate": 1e-3,
            "model_dropout": 0.1,
            "checkpointing_steps": 5,
            "eval_steps": 7,
        }
        self.words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self._whole: dict[tuple[int | str, ...], Path] = {}

    def start(self, output: Path, *more: str, num_processes: int = 1, fault: Fault | None = None) -> Group:
        words = [*self.words, "--disable_tqdm", "--output_dir", str(output), *more]
        return start(words, output.with_suffix(".log"), num_processes=num_processes, fault=fault)

    def start_in(self, trouble: Trouble, *, fault: Fault | None = None) -> Group:
        words = [*self.words, "--disable_tqdm", "--output_dir", str(trouble.disk)]
        return start_ranks(partial(run_rank_in, trouble, words, fault), trouble.disk.with_suffix(".log"))

    def resume(self, output: Path, *more: str, num_processes: int = 1, fault: Fault | None = None) -> Group:
        auto = ("--resume_from_checkpoint", "auto", *more)
        return self.start(output, *auto, num_processes=num_processes, fault=fault)

    def whole(self, num_processes: int, *more: str) -> Path:
        """Folder of the uninterrupted run."""
        key = (num_processes, *more)
        if key not in self._whole:
            output = self.folder / f"whole-{len(self._whole)}"
            group = self.start(output, *more, num_processes=num_processes)
            assert group.wait() == [0] * num_processes, group.text()[-4000:]
            self._whole[key] = output
        return self._whole[key]

    @cached_property
    def stopped(self) -> Path:
        """Folder of a run of one process that a signal has stopped after step 8."""
        output = self.folder / "stopped"
        assert self.start(output, fault=Fault("step", 8)).wait() == [85]
        return output


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("resume"))


def features_of_steps(output: Path) -> dict[int, list[int]]:
    """Features of every step; a step that was repeated had the same ones each time."""
    found: dict[int, list[int]] = {}
    for line in lines(output.with_suffix(".features.jsonl")):
        assert found.setdefault(line["step"], line["features"]) == line["features"]
    return found


def assert_same_run(output: Path, whole: Path, epochs: int = EPOCHS) -> None:
    """Bit for bit what the uninterrupted run left, and every feature once per epoch."""
    for name in RESULTS:
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    steps = features_of_steps(output)
    assert steps == features_of_steps(whole)
    per_epoch = -(-NUM_FEATURES // BATCH)
    assert len(steps) == epochs * per_epoch
    for epoch in range(epochs):
        seen = Counter(
            itertools.chain.from_iterable(steps[step] for step in range(epoch * per_epoch, (epoch + 1) * per_epoch))
        )
        assert seen == Counter(range(NUM_FEATURES))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_at_random_instants(runs: Runs, tmp_path: Path, num_processes: int) -> None:
    """SIGKILL to a random rank at random instants, again and again until enough kills have struck."""
    whole = runs.whole(num_processes)
    seconds = json.loads((whole / "run.json").read_text())["seconds"]
    longest = 0.5 + min(5.0, 1.5 * sum(seconds.values()))
    random_ = random.Random(1000 * SEED + num_processes)
    kills = 0
    for number in itertools.count():
        output = tmp_path / f"run-{number}"
        while True:
            group = runs.resume(output, num_processes=num_processes)
            # The instant is counted from the launch, so that the start is struck too.
            time.sleep(random_.uniform(0, longest) if kills < NUM_KILLS else 0)
            victim = group.ranks[random_.randrange(num_processes)]
            if kills == NUM_KILLS or not victim.is_alive():
                assert group.wait() == [0] * num_processes, group.text()[-4000:]
                break
            victim.kill()
            kills += 1
            # One that had not met the other yet would wait for it; the rest ends by itself.
            if group.end() == [0] * num_processes:
                break
        assert_same_run(output, whole)
        shutil.rmtree(output)
        if kills >= NUM_KILLS:
            return


@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_in_every_sub_step_of_a_save(runs: Runs, tmp_path: Path, num_processes: int) -> None:
    """What SIGKILL before each change of two saves leaves: the third save, which removes one as well, and the next."""
    output, copies = tmp_path / "run", tmp_path / "copies"
    # As late as can be: the save of step 10 goes on beside the steps behind it, on a busy disk for longer than three.
    group = runs.start(output, num_processes=num_processes, fault=Fault("step", 15, signal=signal.SIGKILL))
    assert group.wait() == [-signal.SIGKILL] * num_processes
    assert sorted(os.listdir(output / "checkpoints")) == ["step-00000005", "step-00000010"]
    words = [*runs.words, "--disable_tqdm", "--output_dir", str(output), "--resume_from_checkpoint", "auto"]
    body = partial(run_rank_and_copy, words, copies, "step-00000018")
    group = start_ranks(body, tmp_path / "log", num_processes=num_processes)
    assert group.wait() == [0] * num_processes, group.text()[-4000:]
    left = sorted(path for path in copies.iterdir() if path.is_dir())
    assert len(left) > 8
    for number, copy in enumerate(left):
        names = [name for name in os.listdir(copy / "checkpoints") if not name.startswith(".")]
        assert set(names) <= {f"step-{step:08d}" for step in (5, 10, 15)}
        assert newest_checkpoint(copy / "checkpoints", pytest.fail) is not None
        if number % (len(left) // 4) == 0 or IS_THOROUGH:
            # All of them are proven resumable above and in the unit tests; some go on to the end.
            assert runs.resume(copy, num_processes=num_processes).wait() == [0] * num_processes
            assert_same_run(copy, runs.whole(num_processes))


@pytest.mark.parametrize("saved_by", [1, 2, 3])
def test_any_number_of_ranks_and_any_token_budget_goes_on(runs: Runs, tmp_path: Path, saved_by: int) -> None:
    # Ranks draw different dropout; without any, the steps of every world size are the same.
    exact = ("--model_dropout", "0", "--lora_dropout", "0")
    whole = runs.whole(1, *exact)
    expected = [line for line in lines(whole / "metrics.jsonl") if "loss" in line]
    seed = tmp_path / "seed"
    fault = Fault("step", 11, signal=signal.SIGUSR1)
    assert runs.start(seed, *exact, num_processes=saved_by, fault=fault).wait() == [85] * saved_by
    for resumed_by, budget in ((1, "192"), (2, "64"), (3, "256")):
        if resumed_by == saved_by and not IS_THOROUGH:
            continue
        output = tmp_path / f"run-{resumed_by}"
        shutil.copytree(seed, output)
        shutil.copy(seed.with_suffix(".features.jsonl"), output.with_suffix(".features.jsonl"))
        group = runs.resume(output, *exact, "--max_tokens_per_device", budget, num_processes=resumed_by)
        assert group.wait() == [0] * resumed_by, group.text()[-4000:]
        assert "resumed after step 11 of 18" in group.text()
        assert features_of_steps(output) == features_of_steps(whole)
        found = [line for line in lines(output / "metrics.jsonl") if "loss" in line]
        assert [line["step"] for line in found] == list(range(1, NUM_STEPS + 1))
        assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)


STOPS = {
    1: [
        (Fault("load", 1), "after step 0;"),
        (Fault("step", 1), "after step 1;"),
        (Fault("step", 5, signal=signal.SIGINT), "after step 6;"),
        (Fault("evaluate", 3, signal=signal.SIGUSR1), "after step 18;"),
    ],
    2: [
        (Fault("step", 3, signal=signal.SIGUSR1), "after step 3;"),
        (Fault("evaluate", 1, rank=1), "after step 7;"),
        (Fault("step", 2, rank=1), "after step 9;"),
        (Fault("evaluate", 1), "after step 14;"),
        # It goes on in the background: which step the signal is noticed in depends on the disk.
        (Fault("save", 1, rank=0), "after step 1"),
    ],
}
"""For each number of processes, what stops a run again and again, and where it ends: counts are of each start."""


@pytest.mark.parametrize("num_processes", STOPS)
def test_a_signal_ends_in_a_checkpoint_in_every_phase(runs: Runs, tmp_path: Path, num_processes: int) -> None:
    output = tmp_path / "run"
    said_before = ""
    for fault, where in STOPS[num_processes]:
        group = runs.resume(output, num_processes=num_processes, fault=fault)
        codes, text = group.wait(), group.text().removeprefix(said_before)
        assert codes == [130 if fault.signal == signal.SIGINT else 85] * num_processes, text[-4000:]
        assert fault.signal is not None
        assert f"stopped by {signal.Signals(fault.signal).name} {where}" in text
        assert "Traceback" not in text
        assert not (output / "adapter_model.safetensors").exists()
        said_before = group.text()
    assert runs.resume(output, num_processes=num_processes).wait() == [0] * num_processes
    assert_same_run(output, runs.whole(num_processes))


def test_ranks_that_torchrun_starts_again_go_on(runs: Runs, tmp_path: Path) -> None:
    output = tmp_path / "run"
    attempt = tmp_path / "torchelastic_a1b2c3" / "none_d4e5f6" / "attempt_0"
    # The second strikes when step 15 is about to be saved: checkpoints are written beside the steps, one after another,
    # so that of step 10 is whole by then.
    faults = [Fault("step", 8, rank=1, signal=signal.SIGKILL), Fault("save", 2, rank=0, signal=signal.SIGKILL), None]
    words = [*runs.words, "--disable_tqdm", "--output_dir", str(output)]
    with torchrun_store() as meeting:
        # What torchrun keeps over the starts of its ranks: the store they meet in, and the folder for their errors.
        kept = {**meeting, "TORCHELASTIC_ERROR_FILE": str(attempt / "0" / "error.json")}
        for fault in faults:
            group = start(words, output.with_suffix(".log"), num_processes=2, fault=fault, environment=kept)
            codes = group.end(grace_seconds=60)
            assert (codes == [0, 0]) == (fault is None), group.text()
    assert re.findall(r"resumed after step (\d+)", group.text()) == ["5", "10"]
    assert_same_run(output, runs.whole(2))


def test_a_restart_of_a_command_that_overwrites_goes_on(runs: Runs, tmp_path: Path) -> None:
    """As `launch/slurm.sh` does it: the first start replaces old results, the next one must not replace its own."""
    output = tmp_path / "run"
    shutil.copytree(runs.whole(1), output)
    anew = ("--overwrite_output_dir", "true")
    assert runs.start(output, *anew, fault=Fault("step", 8)).wait() == [85]
    group = runs.resume(output, *anew)
    assert group.wait() == [0], group.text()
    assert "resumed after step 8 of 18" in group.text()
    assert_same_run(output, runs.whole(1))


def test_a_checkpoint_of_another_folder_does_not_open_one_with_results(runs: Runs, tmp_path: Path) -> None:
    stopped, taken, fresh = runs.stopped, tmp_path / "taken", tmp_path / "fresh"
    shutil.copytree(runs.whole(1), taken)
    before = {path: path.read_bytes() for path in taken.rglob("*") if path.is_file()}
    checkpoint = str(stopped / "checkpoints" / "step-00000008")
    group = runs.start(taken, "--resume_from_checkpoint", checkpoint)
    assert group.wait() == [2]
    assert f"--output_dir {taken} already holds results" in group.text()
    assert {path: path.read_bytes() for path in taken.rglob("*") if path.is_file()} == before
    group = runs.start(fresh, "--resume_from_checkpoint", checkpoint)
    assert group.wait() == [0], group.text()
    name = "adapter_model.safetensors"
    assert (fresh / name).read_bytes() == (runs.whole(1) / name).read_bytes()
    assert [line["step"] for line in lines(fresh / "metrics.jsonl") if "loss" in line] == list(range(9, NUM_STEPS + 1))


def test_a_run_of_another_kind_does_not_go_on(runs: Runs, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(runs.stopped, output)
    before = sorted(os.walk(output))
    changes: dict[str, tuple[str, ...]] = {
        "seed is 43 here and 42 there": ("--seed", "43"),
        "global_batch_size is 9 here and 8 there": ("--global_batch_size", "9"),
        "lora_r is 4 here and 8 there": ("--lora_r", "4"),
        "training data is": ("--max_train_samples", "30"),
        "base model is": ("--model_name_or_path", str(tiny_model("bert", tmp_path / "other", seed=5))),
    }
    for sentence, more in changes.items():
        group = runs.resume(output, *more)
        assert group.wait() == [2], sentence
        assert sentence in group.text()
        assert "Traceback" not in group.text()
    names: list[Any] = sorted(os.walk(output))
    assert names == before


def test_a_finished_run_has_nothing_to_do_and_says_the_same(runs: Runs, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(runs.whole(1), output)
    shutil.copy(runs.whole(1).with_suffix(".features.jsonl"), output.with_suffix(".features.jsonl"))
    assert runs.resume(output).wait() == [0]
    assert_same_run(output, runs.whole(1))


def test_damaged_checkpoints_are_passed_over_and_said(runs: Runs, tmp_path: Path) -> None:
    output = tmp_path / "run"
    # Asked to stop, it waits until its checkpoint is on the disk.
    assert runs.start(output, fault=Fault("step", 10)).wait() == [85]
    newest = output / "checkpoints" / "step-00000010"
    data = bytearray((newest / "trained.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "trained.safetensors").write_bytes(data)
    group = runs.resume(output)
    assert group.wait() == [0]
    assert "passed over step-00000010" in group.text()
    assert "SHA-256 differs" in group.text()
    assert "resumed after step 5 of 18" in group.text()
    assert_same_run(output, runs.whole(1))
    weights = load_file(output / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


REASONS = {"full": "No space left on device", "read-only": "Read-only file system"}


@pytest.mark.parametrize("kind", REASONS)
def test_a_disk_that_takes_no_checkpoint_for_a_while_is_a_warning(runs: Runs, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "run"
    with small_disk(output):
        group = runs.start_in(Trouble(output, kind, begin=13, end=17))
        assert group.wait() == [0], group.text()
        found = [line for line in group.text().splitlines() if "cannot be written" in line]
        assert len(found) == 1, group.text()
        assert found[0].startswith("warning: the checkpoint of step 15 cannot be written")
        assert REASONS[kind] in found[0]
        assert_same_run(output, runs.whole(1))


@pytest.mark.parametrize("kind", REASONS)
def test_a_disk_that_takes_no_results_ends_the_run_which_goes_on_later(runs: Runs, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "run"
    with small_disk(output):
        trouble = Trouble(output, kind, begin=6, end=None)
        group = runs.start_in(trouble)
        assert group.wait() == [1], group.text()
        said = [line for line in group.text().splitlines() if "cannot be written" in line]
        assert said[-1].startswith("[rank 0 of 1] the run stops: what belongs to step 7 cannot be written"), (
            group.text()
        )
        assert REASONS[kind] in said[-1]
        assert "Traceback" not in group.text()
        end(trouble)
        # What is there is whole: the checkpoint from before, no other, and no result.
        found = newest_checkpoint(output / "checkpoints", pytest.fail)
        assert found is not None
        assert found.step == 5
        assert os.listdir(output / "checkpoints") == ["step-00000005"]
        assert not [name for name in os.listdir(output) if name in RESULTS[:-1]]
        assert runs.resume(output).wait() == [0]
        assert_same_run(output, runs.whole(1))


def test_a_run_that_is_stopped_and_cannot_write_its_checkpoint_says_so(runs: Runs, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with small_disk(output):
        trouble = Trouble(output, "full", begin=13, end=None)
        group = runs.start_in(trouble, fault=Fault("step", 14))
        assert group.wait() == [2], "not 85, or it would be started again at once"
        assert "error: the run stopped after step 14 and its last checkpoint could not be written" in group.text()
        assert "Traceback" not in group.text()
        end(trouble)
        assert runs.resume(output).wait() == [0]
        assert_same_run(output, runs.whole(1))


def test_a_rank_that_hangs_ends_the_run_and_says_where(runs: Runs, tmp_path: Path) -> None:
    output = tmp_path / "run"
    fault = Fault("data", 10, rank=1, signal=None)
    group = runs.start(output, "--hang_timeout", "3", num_processes=2, fault=fault)
    assert group.wait(60) == [1, 1]
    text = group.text()
    assert "[rank 1] has made no progress for 3 s in step " in text
    assert "in strike" in text, "the stack shows what it hangs in"
    assert "[rank 0] stops: another rank has gone; it was in step " in text
    assert runs.resume(output, num_processes=2).wait() == [0, 0]
    assert_same_run(output, runs.whole(2))


SHORT = ("--num_train_epochs", "2", "--model_dropout", "0", "--lora_dropout", "0")


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_quantised_run_goes_on_and_is_the_same_on_two_ranks(runs: Runs, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")
    options = ("--quantization", kind, "--gradient_checkpointing", *SHORT)
    if kind == "8bit":
        # Adapters of 4,096 numbers: bitsandbytes keeps the moments of smaller tensors in 32 bits.
        options += ("--optim", "adamw_8bit", "--lora_r", "128")
    whole, output, two = (tmp_path / name for name in ("whole", "run", "two"))
    assert runs.start(whole, *options).wait() == [0]
    moments = load_file(whole / "checkpoints" / "step-00000012" / "optimizer.safetensors")
    first = "state1" if kind == "8bit" else "exp_avg"
    assert {value.dtype for key, value in moments.items() if key.startswith(first) and "lora_" in key} == {
        torch.uint8 if kind == "8bit" else torch.float32
    }
    assert runs.start(output, *options, fault=Fault("step", 8)).wait() == [85]
    group = runs.resume(output, *options)
    assert group.wait() == [0], group.text()[-3000:]
    assert_same_run(output, whole, epochs=2)
    group = runs.start(two, *options, num_processes=2)
    assert group.wait() == [0, 0], group.text()[-3000:]
    losses = [[line["loss"] for line in lines(folder / "metrics.jsonl") if "loss" in line] for folder in (whole, two)]
    # Inputs are rounded to integers, or to float16 on the way: a last bit may fall either way.
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_a_float16_run_goes_on_from_its_loss_scale(runs: Runs, tmp_path: Path) -> None:
    options = ("--mixed_precision", "fp16", "--max_grad_norm", "none", *SHORT)
    whole, output, two, plain = (tmp_path / name for name in ("whole", "run", "two", "plain"))
    group = runs.start(whole, *options)
    assert group.wait() == [0], group.text()[-3000:]
    assert runs.start(output, *options, fault=Fault("step", 3)).wait() == [85]
    assert runs.resume(output, *options).wait() == [0]
    assert_same_run(output, whole, epochs=2)
    # The scale itself changes after thousands of steps; how many it has kept is counted on.
    states = [
        json.loads((folder / "checkpoints" / "step-00000012" / "state.json").read_text()) for folder in (whole, output)
    ]
    scalers = [state["progress"]["gradient_scaler"] for state in states]
    assert scalers[1] == scalers[0]
    assert scalers[0]["_growth_tracker"] > 9
    assert runs.start(two, *options, num_processes=2).wait() == [0, 0]
    assert runs.start(plain, *options[2:]).wait() == [0]
    losses = {
        folder.name: [line["loss"] for line in lines(folder / "metrics.jsonl") if "loss" in line]
        for folder in (whole, two, plain)
    }
    assert losses["two"] == pytest.approx(losses["whole"], rel=1e-2)
    assert losses["plain"] == pytest.approx(losses["whole"], rel=2e-2)
    assert losses["plain"] != losses["whole"]
