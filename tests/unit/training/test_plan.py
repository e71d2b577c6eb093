"""`--dry_run`: it says what the run then does, finds what would stop it, and writes nothing."""

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qa_dist import train
from qa_dist.config.options import RunConfig, TrainingConfig
from qa_dist.features.batching import steps_in
from qa_dist.memory import estimate
from qa_dist.training import output_folder
from qa_dist.training.plan import Plan
from tests import refusals
from tests.distributed.launching import lines
from tests.tiny import tiny_inputs, tiny_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    return tiny_inputs(folder, num_train=20, num_validation=12, unanswerable=True)


@pytest.fixture
def run(inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Train, or say what training would do, with these options on top of a small run; returns the exit code."""
    from accelerate.state import AcceleratorState

    # A process of its own would be started to measure what every process takes.
    monkeypatch.setattr(estimate, "process_bytes", lambda modules: 2**20)

    def start(*flags: str, **options: Any) -> int:
        small = {"max_seq_length": 64, "doc_stride": 16, "global_batch_size": 8, "num_train_epochs": 2}
        settings = {**inputs, **small, "output_dir": tmp_path / "out", "store_dir": tmp_path / "store", **options}
        words = [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
        AcceleratorState._reset_state(reset_partial_state=True)
        return train.main([*words, "--disable_tqdm", *flags])

    yield start
    AcceleratorState._reset_state(reset_partial_state=True)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: when it was written, and what is in it."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_is_planned_is_what_the_run_does(run: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    options = {"lora_r": 4, "gather": "logits"}
    assert run("--dry_run", **options) == 0
    plan = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    stores = {path.name for path in (tmp_path / "store").iterdir() if path.is_dir()}
    assert stores, "features are prepared, and kept for the run"
    assert all(str(tmp_path / "store" / name) in plan for name in stores)
    assert run(**options) == 0
    said = capsys.readouterr().err
    assert {path.name for path in (tmp_path / "store").iterdir() if path.is_dir()} == stores
    assert f"{tmp_path / 'out'} is made" in plan

    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    steps = [line for line in lines(tmp_path / "out" / "metrics.jsonl") if "learning_rate" in line]
    per_epoch = sum(line["num_tokens"] for line in steps if line["epoch"] <= 1)
    in_all = sum(line["num_tokens"] for line in steps)
    assert f"{record['num_steps']} optimiser steps, {len(steps) // 2} per epoch; up to 8 features each" in plan
    assert f"{per_epoch:,} tokens per epoch, {per_epoch * 2 / len(steps):,.0f} per step" in plan
    assert f"on average; {in_all:,} in all" in plan
    if not torch.cuda.is_available():
        assert "up to 1,024 tokens at once" in plan
    for split in ("train", "validation"):
        data = record["data"][split]
        assert f"{split}: {data['num_examples']} examples, {data['num_unanswerable']} of them unanswerable" in plan
        assert data["fingerprint"] in plan
    # The table of parameters, line by line.
    table = [line for line in said.splitlines() if line.startswith(("parameters ", "before  ", "after  "))]
    assert len(table) == 3
    assert all(f"  {line}\n" in plan for line in table)

    planned = set(re.findall(r"[\w.]+\.(?:yaml|jsonl?|npy|safetensors)", plan.partition("\nfiles\n")[2]))
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    written = {path.name for path in (tmp_path / "out").iterdir() if path.is_file() and not path.name.startswith(".")}
    assert planned | tokenizer == written
    folders = set(re.findall(r"^    (\w+)/ with", plan, re.MULTILINE))
    assert folders == {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}


def test_the_tokens_are_those_of_the_steps_that_are_taken(run: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    # 20 features are two whole batches and a short one; the run ends in the second epoch, behind a whole one.
    options = {"max_train_steps": 4, "eval_steps": "no"}
    assert run("--dry_run", **options) == 0
    plan = capsys.readouterr().out
    assert run(**options) == 0
    steps = [line["num_tokens"] for line in lines(tmp_path / "out" / "metrics.jsonl") if "learning_rate" in line]
    assert len(steps) == 4
    assert f"{sum(steps) / 4:,.0f} per step on average; {sum(steps):,} in all" in plan
    assert sum(steps) != round(sum(steps[:3]) / 3 * 4), "an average would do as well"


def test_a_batch_is_no_larger_than_the_data(run: Callable[..., int], capsys: Any) -> None:
    assert run("--dry_run", global_batch_size=100_000, num_train_epochs=3) == 0
    plan = capsys.readouterr().out
    features = re.search(r"train: .*; ([\d,]+) features", plan)
    assert features
    assert f"3 optimiser steps, 1 per epoch; up to {features[1]} features each" in plan


def test_the_memory_is_that_of_the_estimate(run: Callable[..., int], capsys: Any) -> None:
    assert run("--dry_run", max_tokens_per_device=2000) == 0
    memory = capsys.readouterr().out.partition("\nmemory\n")[2]
    assert re.search(r"^  MiB of each rank +ddp$", memory, re.MULTILINE)
    assert re.search(r"^  with tokens per pass +2,000$", memory, re.MULTILINE)
    # Of the host's memory; there is no such row for a GPU.
    assert bool(re.search(r"^  process +1\.0$", memory, re.MULTILINE)) != torch.cuda.is_available()


def test_mistakes_in_folder_data_and_model_are_said_at_once(
    run: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    options = {"train_file": tmp_path / "none.json", "model_name_or_path": tmp_path / "no_model"}
    assert run("--dry_run", **options, tokenizer_name=tmp_path / "no_tokenizer") == 2
    said = capsys.readouterr().err
    for sentence in (
        f"--output_dir {tmp_path / 'out'} cannot be used: Not a directory",
        f"{tmp_path / 'none.json'}",
        f"{tmp_path / 'no_tokenizer'} does not exist",
        f"{tmp_path / 'no_model'} does not exist",
    ):
        assert said.count(sentence) == 1, said


def test_a_folder_with_results_is_looked_at_and_left_as_it_was(
    run: Callable[..., int], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(checkpointing_steps=2) == 0
    before = contents(out)
    capsys.readouterr()
    assert run("--dry_run") == 2
    assert "already holds results" in capsys.readouterr().err
    assert run("--dry_run", "--overwrite_output_dir") == 0
    assert f"{out} holds results of an earlier run, which are replaced" in capsys.readouterr().out
    resumed = {"checkpointing_steps": 2, "resume_from_checkpoint": "auto"}
    assert run("--dry_run", **resumed) == 0
    plan = capsys.readouterr().out
    assert f"{out} keeps what is there" in plan
    assert "goes on after step 6" in plan
    assert run("--dry_run", **resumed, learning_rate=0.5) == 2
    assert "the checkpoint belongs to another run: learning_rate is 0.5 here" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        newest = output_folder.newest_checkpoint
        patched.setattr(output_folder, "newest_checkpoint", lambda *words: replace(newest(*words), optimizer={}))
        assert run("--dry_run", **resumed) == 2
    assert "the checkpoint cannot be used: its optimiser state is empty" in capsys.readouterr().err
    assert run("--dry_run", resume_from_checkpoint=tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
    assert contents(out) == before
    # Another run has the folder.
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert run("--dry_run", "--overwrite_output_dir") == 2
    assert "another run is writing to --output_dir" in capsys.readouterr().err
    os.close(descriptor)
    assert run("--dry_run", "--overwrite_output_dir") == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_tokens_per_device": 20}, "--max_tokens_per_device 20 is less than one feature"),
        ({"validation_file": None}, "there is no validation data to evaluate on during training"),
        ({"report_to": "sheets"}, "--report_to sheets is no tracker"),
        ({"max_seq_length": 400}, "max_seq_length"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_end_the_run_before_its_first_step_ends_the_dry_run(
    run: Callable[..., int], tmp_path: Path, capsys: Any, options: dict[str, Any], sentence: str
) -> None:
    assert run("--dry_run", **options) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("epochs", "per_epoch", "steps"), [(2.2, 25, 55), (1.1, 50, 55), (0.1, 5, 1), (1e-5, 3, 1)])
def test_fractions_of_epochs_are_the_decimals_that_were_given(epochs: float, per_epoch: int, steps: int) -> None:
    assert steps_in(epochs, per_epoch) == steps


@pytest.mark.parametrize("flags", [("--dry_run",), ()])
def test_epochs_that_end_before_the_steps_that_were_asked_for_are_said(
    run: Callable[..., int], capsys: Any, flags: tuple[str, ...]
) -> None:
    assert run(*flags, max_train_steps=7) == 0
    shown = "".join(capsys.readouterr())
    assert "note: --num_train_epochs 2 ends after 6 steps, before --max_train_steps 7; raise it for more\n" in shown
    assert run("--overwrite_output_dir", *flags, max_train_steps=6) == 0
    assert "before --max_train_steps" not in "".join(capsys.readouterr())


def test_a_compiled_model_has_no_estimate() -> None:
    config = RunConfig(training=TrainingConfig(torch_compile="model"))
    plan = Plan(world_size=1, device="cpu", strategy="ddp", max_tokens=1024, sections={})
    (line,) = train._memory_lines(config, plan)
    assert line.startswith("not estimated: --torch_compile model")


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
def test_what_differs_in_dropout_alone_needs_some(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], tmp_path: Path
) -> None:
    assert run(*flags, rdrop_alpha=1, model_dropout=0, lora_dropout=0) == 2
    told = refusals.sentence(capsys.readouterr().err)
    assert told.startswith(
        "--rdrop_alpha compares what a feature gives with other dropout, and this model drops nothing"
    )
    assert run("--dry_run", rdrop_alpha=1, model_dropout=0, lora_dropout=0.1) == 0
    # XLM drops by a function, so that no module says so.
    xlm = str(tiny_model("xlm", tmp_path / "xlm"))
    assert run("--dry_run", rdrop_alpha=1, model_dropout=0.1, lora_dropout=0, model_name_or_path=xlm) == 0
