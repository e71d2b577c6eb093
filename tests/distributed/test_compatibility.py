"""Every combination that the rules allow trains, is saved and evaluated on two ranks; every other one is refused."""

import importlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qa_dist import train
from qa_dist.documentation import Combination, combinations
from tests.distributed.forking import Group, in_a_fork, start_ranks
from tests.distributed.launching import free_port, lines
from tests.distributed.test_strategies import launched
from tests.tiny import tiny_run

pytestmark = pytest.mark.distributed


def label(combination: Combination) -> str:
    return "-".join([combination.strategy, *(str(value) for value in combination.options.values())])


ALLOWED = [combination for combination in combinations() if combination.problem is None]
REFUSED = [combination for combination in combinations() if combination.problem is not None]


def needed(combination: Combination) -> None:
    if combination.strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    if combination.options["quantization"] != "no":
        pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")


def environment(strategy: str, folder: Path) -> dict[str, str]:
    return {} if strategy == "ddp" else launched(strategy, folder)


class Runs:
    """The runs of all combinations; those of one strategy are done by one pair of ranks, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Two steps: what ZeRO-3 notes down in the first it uses in the second. One evaluation.
        self.words = [*tiny_run(folder), "--disable_tqdm", "--num_train_epochs", "1", "--global_batch_size", "8"]
        self.of_strategy = cache(self._of_strategy)

    def arguments(self, combination: Combination) -> list[str]:
        options = [word for name, value in combination.options.items() for word in (f"--{name}", str(value).lower())]
        return [*self.words, *options, "--output_dir", str(self.folder / label(combination))]

    def _of_strategy(self, strategy: str) -> tuple[list[int | None], Group]:
        """Exit codes and output of the ranks."""
        chosen = [self.arguments(combination) for combination in ALLOWED if combination.strategy == strategy]
        body = partial(run_all, [(words, free_port()) for words in chosen])
        variables = environment(strategy, self.folder)
        group = start_ranks(body, self.folder / f"{strategy}.log", num_processes=2, environment=variables)
        return group.wait(400), group


def run_all(runs: Sequence[tuple[list[str], int]], rank: int) -> int:
    """Train with each list of words, meeting the other rank at a port of its own; the first exit code that is not 0."""
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        importlib.import_module("deepspeed")
    for words, port in runs:
        if code := in_a_fork(partial(train.main, words), port):
            return code
    return 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("compatibility"))


@pytest.mark.parametrize("combination", ALLOWED, ids=label)
def test_an_allowed_combination_trains(combination: Combination, runs: Runs) -> None:
    needed(combination)
    codes, group = runs.of_strategy(combination.strategy)
    output = runs.folder / label(combination)
    assert (output / "run.json").exists(), f"{codes}\n{group.text()[-4000:]}"
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert (record["strategy"], record["world_size"], record["num_steps"]) == (combination.strategy, 2, 2)
    assert {"adapter_model.safetensors", "predictions.json"} <= {path.name for path in output.iterdir()}
    assert codes == [0, 0]


@pytest.mark.parametrize(
    "saving", [combination for combination in ALLOWED if combination.options["gradient_checkpointing"]], ids=label
)
def test_activations_that_are_computed_twice_change_nothing(saving: Combination, runs: Runs) -> None:
    needed(saving)
    runs.of_strategy(saving.strategy)
    plain = replace(saving, options={**saving.options, "gradient_checkpointing": False})
    ours, theirs = (runs.folder / label(combination) for combination in (saving, plain))
    found, expected = (
        [line[name] for line in lines(folder / "metrics.jsonl") if "loss" in line for name in ("loss", "grad_norm")]
        for folder in (ours, theirs)
    )
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=1e-6)
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs)]
    for name, tensor in adapters[1].items():
        np.testing.assert_allclose(adapters[0][name], tensor, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("combination", REFUSED, ids=label)
def test_another_combination_is_refused(
    combination: Combination,
    runs: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # What is refused is refused by every rank before it looks for the others; one is enough to see it.
    for name, value in environment(combination.strategy, tmp_path).items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert train.main(runs.arguments(combination)) == 2
    assert str(combination.problem) in capsys.readouterr().err
    assert not (runs.folder / label(combination)).exists()
