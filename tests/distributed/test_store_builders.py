"""Processes that build one store at once, are killed at it, or wait for each other."""

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qa_dist.features import workers
from qa_dist.features.store import STAGING_SUFFIX, FeatureStore
from tests.unit.data_fixtures import TINY_SQUAD, files_of, prepared, run_config
from tests.unit.features import conftest as of_stores

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]

tokenizer_folder, built = of_stores.tokenizer_folder, of_stores.built

# What a child process runs: the tokenizer without the seconds that importing transformers takes.
PREAMBLE = """
import os, signal, sys, types, logging
import tokenizers
from qa_dist.features import building
from qa_dist.config.options import DataConfig, RunConfig

def prepare(tokenizer_folder, train_file, store_dir, **options):
    tokenizer = types.SimpleNamespace(
        is_fast=True, name_or_path="tiny", padding_side="right", cls_token_id=2, bos_token_id=None,
        backend_tokenizer=tokenizers.Tokenizer.from_file(tokenizer_folder + "/tokenizer.json"),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        special_tokens_map={f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "PAD", "CLS", "SEP", "MASK")},
    )
    data = DataConfig(max_seq_length=96, doc_stride=24, train_file=train_file, store_dir=store_dir)
    return building.prepare_store(RunConfig(data=data), "train", tokenizer=tokenizer, **options)

folder, train_file, store_dir = sys.argv[1:4]
"""


@contextlib.contextmanager
def running(code: str, tokenizer_folder: str, store_dir: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that runs PREAMBLE and `code`, and does not outlive the test."""
    arguments = [tokenizer_folder, str(TINY_SQUAD), str(store_dir)]
    with subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def stuck(place: str, tokenizer_folder: str, store_dir: Path, more: str = "") -> Iterator["subprocess.Popen[str]"]:
    """A process that builds a store and has come to this function of `building`, where it stays."""
    code = (
        "def stuck(*args, **options):\n"
        "    print('stuck', flush=True)\n"
        "    signal.pause()\n"
        f"building.{place} = stuck\n{more}\n"
        "prepare(folder, train_file, store_dir)"
    )
    with running(code, tokenizer_folder, store_dir) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "stuck\n"
        yield builder


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_CHUNK_EXAMPLES", 2)
    monkeypatch.setattr(workers, "_MIN_EXAMPLES_PER_WORKER", 1)
    contents = []
    for num_workers in (1, 2, 3):
        config = run_config(tokenizer_folder, tmp_path / str(num_workers), preprocessing_num_workers=num_workers)
        contents.append(files_of(prepared(config, "train").path))
    assert sorted(contents[0]) == ["examples.arrow", "features.arrow", "manifest.json"]
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize("moment", ["_example_batch", "_feature_batch", "_file_entry", "os.fsync", "os.replace"])
def test_a_killed_builder_leaves_nothing_that_counts(tokenizer_folder: str, tmp_path: Path, moment: str) -> None:
    kill = f"building.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    code = f"{kill}\nprepare(folder, train_file, store_dir)"
    with running(code, tokenizer_folder, tmp_path) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    (staging,) = visible(tmp_path)
    assert staging.endswith(".building")
    store = prepared(run_config(tokenizer_folder, tmp_path), "train")
    assert visible(tmp_path) == [store.fingerprint]


BUILD_ONCE = "print('go', flush=True)\nprepare(folder, train_file, store_dir)\nprint('built', flush=True)"
FEWEST_KILLS, MOST_KILLS = 9, 50


def seconds_of_a_build(tokenizer_folder: str, store_dir: Path) -> float:
    with running(BUILD_ONCE, tokenizer_folder, store_dir) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        start = time.monotonic()
        assert process.stdout.readline() == "built\n"
        return time.monotonic() - start


def delays(seconds: float, outcomes: dict[float, str]) -> Iterator[float]:
    """When to kill builders, as `outcomes` by delay come in: over a whole build, then where an outcome is missing.

    How long a build takes differs from one to the next, most of all on a busy machine.
    """
    yield from np.linspace(0, 1.2 * seconds, FEWEST_KILLS).tolist()
    for number in range(FEWEST_KILLS, MOST_KILLS):
        found = {*outcomes.values()}
        if found == {"nothing", "begun", "whole"}:
            return
        if "whole" not in found:
            yield 1.5 * max(outcomes)
        elif "nothing" not in found:
            # A number of its own for each.
            yield number * 1e-9
        else:
            low = max(delay for delay, outcome in outcomes.items() if outcome == "nothing")
            high = min(delay for delay, outcome in outcomes.items() if outcome == "whole")
            # Fractions that fill the space between them evenly, however many there will be.
            yield low + (high - low) * (number * 0.618 % 1)


def test_a_builder_that_is_killed_at_any_time_leaves_a_whole_store_or_none(
    tokenizer_folder: str, built: FeatureStore, tmp_path: Path
) -> None:
    seconds = seconds_of_a_build(tokenizer_folder, tmp_path / "measured")
    root = tmp_path / "stores"
    root.mkdir()
    outcomes: dict[float, str] = {}
    for delay in delays(seconds, outcomes):
        before = visible(root)
        with running(BUILD_ONCE, tokenizer_folder, root) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "go\n"
            time.sleep(delay)
            process.kill()
        left = visible(root)
        whole = [name for name in left if not name.endswith(STAGING_SUFFIX)]
        assert whole in ([], [built.fingerprint])
        # Each sweeps what the one before it left, and only then begins.
        assert len(left) <= 1
        for name in whole:
            FeatureStore(root / name)
            assert files_of(root / name) == files_of(built.path)
            shutil.rmtree(root / name)
        outcomes[delay] = "whole" if whole else "begun" if {*left} - {*before} else "nothing"
    assert {*outcomes.values()} == {"nothing", "begun", "whole"}, outcomes
    prepared(run_config(tokenizer_folder, root), "train")
    assert visible(root) == [built.fingerprint]


def test_several_processes_at_once_get_one_store_that_one_of_them_builds(
    tokenizer_folder: str, built: FeatureStore, tmp_path: Path
) -> None:
    code = (
        "build = building.build_columns\n"
        "def counted(*args, **options):\n"
        "    print('building', flush=True)\n"
        "    import time; time.sleep(0.5)\n"
        "    return build(*args, **options)\n"
        "building.build_columns = counted\n"
        "found = prepare(folder, train_file, store_dir)\n"
        "print(found.fingerprint, int(found.flat(range(found.num_features))[0].sum()))"
    )
    outputs = []
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(running(code, tokenizer_folder, tmp_path)) for _ in range(4)]
        for process in processes:
            output, errors = process.communicate()
            assert process.returncode == 0, errors
            outputs.append(output.split("\n"))
    assert sum("building" in lines for lines in outputs) == 1
    total = int(built.flat(range(built.num_features))[0].sum())
    assert {lines[-2] for lines in outputs} == {f"{built.fingerprint} {total}"}
    assert visible(tmp_path) == [built.fingerprint]


def test_waiting_for_a_builder_is_said_once_and_ends_with_it(
    tokenizer_folder: str, built: FeatureStore, tmp_path: Path
) -> None:
    with (
        stuck("build_columns", tokenizer_folder, tmp_path) as builder,
        running("prepare(folder, train_file, store_dir)\nprint('done')", tokenizer_folder, tmp_path) as waiter,
    ):
        assert waiter.stderr is not None
        message = waiter.stderr.readline()
        assert "waiting for another process" in message
        assert waiter.poll() is None
        # However the builder ends, its lock is free.
        builder.kill()
        output, errors = waiter.communicate()
    assert (output, errors, waiter.returncode) == ("done\n", "", 0)
    assert visible(tmp_path) == [built.fingerprint]


def test_only_what_dead_builders_left_is_swept(tokenizer_folder: str, built: FeatureStore, tmp_path: Path) -> None:
    dead = tmp_path / f".{'0' * 64}.1234.building"
    own = tmp_path / f".{built.fingerprint}.1234.building"
    for folder in (dead, own):
        folder.mkdir()
        (folder / "features.arrow").touch()
    fewer = "DataConfig.__init__.__kwdefaults__['max_train_samples'] = 3"
    with stuck("_file_entry", tokenizer_folder, tmp_path, fewer):
        (alive,) = (path for path in tmp_path.glob(".*.building") if path not in (dead, own))
        prepared(run_config(tokenizer_folder, tmp_path), "train")
        assert alive.exists()
        assert visible(tmp_path) == sorted([alive.name, built.fingerprint])
