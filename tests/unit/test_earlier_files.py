"""Stores, checkpoints, adapters and run folders that an earlier version wrote are read as they are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qa_dist import evaluate, merge, train
from qa_dist.features import building
from tests.unit.data_fixtures import FIXTURES
from tests.unit.trained import reset_accelerate

RUN_FILES = ("run.json", "adapter_model.safetensors", "adapter_config.json", "metrics.json", "predictions.json")


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, which is also the current one: its files name each other by relative paths."""
    folder = tmp_path / "earlier"
    shutil.copytree(FIXTURES / "earlier", folder)
    monkeypatch.chdir(folder)
    reset_accelerate()
    return folder


def test_a_store_is_mapped_and_not_built_again(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(path.name for path in Path("store").iterdir())
    monkeypatch.setattr(building, "build_columns", lambda *_, **__: pytest.fail("the store is built again"))
    assert evaluate.main(["--adapter", "run"]) == 0
    assert sorted(path.name for path in Path("store").iterdir() if path.suffix != ".lock") == before


def test_an_adapter_scores_as_it_did(earlier: Path) -> None:
    assert evaluate.main(["--adapter", "run", "--results_dir", "again"]) == 0
    assert Path("again/predictions.json").read_bytes() == Path("run/predictions.json").read_bytes()
    now, then = (json.loads(Path(folder, "metrics.json").read_bytes()) for folder in ("again", "run"))
    # Files of earlier versions do not say by which rules they are: SQuAD's were the only ones.
    assert now.pop("answer_normalization") == then.pop("answer_normalization", "squad") == "squad"
    assert now.keys() == then.keys()
    assert now == pytest.approx(then, rel=1e-6)


def test_a_run_goes_on_from_its_checkpoint_and_ends_as_it_did(earlier: Path) -> None:
    wanted = load_file("run/adapter_model.safetensors")
    then = json.loads(Path("run/run.json").read_bytes())
    for name in RUN_FILES:
        Path("run", name).unlink()
    words = ["--config", "run/config.yaml", "--output_dir", "run", "--resume_from_checkpoint", "auto"]
    assert train.main(words) == 0
    now = json.loads(Path("run/run.json").read_bytes())
    assert now["resumed_at_steps"] == [5]
    assert (now["num_steps"], now["weights_of_step"]) == (then["num_steps"], then["weights_of_step"])
    assert [each["step"] for each in now["evaluations"]] == [each["step"] for each in then["evaluations"]]
    found = load_file("run/adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


def test_an_adapter_is_merged(earlier: Path) -> None:
    assert merge.main(["--adapter", "run", "--merged_dir", "merged"]) == 0
    assert Path("merged/model.safetensors").is_file()
