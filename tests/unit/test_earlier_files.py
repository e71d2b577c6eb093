"""Stores, checkpoints, adapters and run folders that an earlier version wrote are read as they are."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qa_dist import card, evaluate, export, merge, predict, train
from qa_dist.config.options import RunConfig
from qa_dist.features import building
from qa_dist.reporting.report_runs import UNKNOWN, chosen_options
from qa_dist.reporting.run_folders import read_runs
from qa_dist.training.checkpoints import read_checkpoint, write_checkpoint
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


def require_scores_of_then(model: str, results: str, *words: str) -> None:
    """Make sure that a model, evaluated now, gives the answers and the scores that the run ended with."""
    assert evaluate.main(["--adapter", model, "--results_dir", results, *words]) == 0
    assert Path(results, "predictions.json").read_bytes() == Path("run/predictions.json").read_bytes()
    now, then = (json.loads(Path(folder, "metrics.json").read_bytes()) for folder in (results, "run"))
    # Files of earlier versions do not say by which rules they are: SQuAD's were the only ones.
    assert now.pop("answer_normalization") == then.pop("answer_normalization", "squad") == "squad"
    assert now.keys() == then.keys()
    assert now == pytest.approx(then, rel=1e-6)


def require_that_it_is_merged() -> None:
    """Make sure that the run's adapter becomes a whole model, without an adapter beside it, that scores as it did."""
    assert merge.main(["--adapter", "run", "--merged_dir", "merged"]) == 0
    assert not list(Path("merged").glob("adapter*"))
    # The base is in the merged model: without the folder of the base it scores all the same.
    shutil.move("bert", "bert.away")
    try:
        require_scores_of_then("merged", "of_merged", "--validation_file", "dev.json", "--store_dir", "store")
    finally:
        shutil.move("bert.away", "bert")


def test_an_adapter_scores_as_it_did(earlier: Path) -> None:
    require_scores_of_then("run", "again")


def test_an_adapter_is_merged_into_a_model_that_scores_as_it_did(earlier: Path) -> None:
    require_that_it_is_merged()


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


OFF = {"loraplus_lr_ratio": None, "head_lr_ratio": None, "ema_decay": None, "init_lora_weights": "default"}
ON = {"loraplus_lr_ratio": 4, "head_lr_ratio": 2.0, "ema_decay": 0.99, "init_lora_weights": "pissa"}


def let_run_have(options: dict[str, Any]) -> None:
    """Write removed options into the run's config.yaml and into its checkpoint, as versions that had them did."""
    path = Path("run/config.yaml")
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_bytes()), **options}, sort_keys=False), encoding="utf-8")
    (folder,) = Path("run/checkpoints").iterdir()
    checkpoint = read_checkpoint(folder)
    shutil.rmtree(folder)
    identity = {**checkpoint.identity, **options}
    write_checkpoint(dataclasses.replace(checkpoint, identity=identity), Path("run/checkpoints"))


def double_the_rank() -> None:
    """Make the adapter what versions with PiSSA saved: of twice the rank, and the same but for factors B0 A0.

    It is B A - B0 A0 as one product; with B0 = 0, what it was.
    """
    path = Path("run/adapter_model.safetensors")
    weights = load_file(path)
    for name, tensor in weights.items():
        if ".lora_A." in name:
            weights[name] = torch.cat([tensor, -torch.ones_like(tensor)])
        elif ".lora_B." in name:
            weights[name] = torch.cat([tensor, torch.zeros_like(tensor)], dim=1)
    save_file(weights, path, {"format": "pt"})
    path = Path("run/adapter_config.json")
    said = json.loads(path.read_bytes())
    path.write_text(json.dumps({**said, "r": 2 * said["r"], "lora_alpha": 2 * said["lora_alpha"]}), encoding="utf-8")


@pytest.mark.parametrize("options", [OFF, ON], ids=["off", "on"])
def test_models_of_runs_with_options_of_then_are_used_as_any_others(
    earlier: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    let_run_have(options)
    if options is ON:
        double_the_rank()
    require_scores_of_then("run", "again")
    Path("questions.jsonl").write_text(
        json.dumps({"id": "1", "question": "Who?", "context": "Ada Lovelace wrote it."}) + "\n", encoding="utf-8"
    )
    assert predict.main(["--model", "run", "--input_file", "questions.jsonl", "--output_file", "answers.jsonl"]) == 0
    assert json.loads(Path("answers.jsonl").read_bytes())["id"] == "1"
    require_that_it_is_merged()
    assert card.main(["run"]) == 0
    # The options of a run as a recipe, to what only reads its model.
    assert evaluate.main(["--adapter", "run", "--config", "run/config.yaml"]) == 0
    assert "taken out" not in capsys.readouterr().err


@pytest.mark.parametrize("options", [OFF, ON], ids=["off", "on"])
def test_a_model_of_then_is_exported(earlier: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the onnx extra is not installed")
    exported: list[RunConfig] = []
    # The graph itself, which takes long, is made of the model as it is merged.
    monkeypatch.setattr("qa_dist.answering.export.export", lambda config, *_, **__: exported.append(config) or {})
    assert export.main(["run", "--output_dir", "exported"]) == 0
    shutil.rmtree("exported")
    let_run_have(options)
    assert export.main(["run", "--output_dir", "exported"]) == 0
    assert exported[0] == exported[1]


def test_a_report_shows_of_options_of_then_what_a_run_had(earlier: Path) -> None:
    before = chosen_options(read_runs("run"))
    let_run_have(OFF)
    assert chosen_options(read_runs("run")) == before
    shutil.copytree("run", "other")
    let_run_have({"ema_decay": 0.99})
    rows = {row.name: row.cells for row in chosen_options(read_runs(["run", "other"]))}
    assert rows == {"ema_decay": ("0.99", UNKNOWN)}


def test_a_run_with_options_of_then_switched_off_goes_on(earlier: Path) -> None:
    let_run_have(OFF)
    test_a_run_goes_on_from_its_checkpoint_and_ends_as_it_did(earlier)


@pytest.mark.parametrize(("name", "value"), ON.items())
def test_a_run_that_had_an_option_of_then_does_not_go_on(
    earlier: Path, name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Path("run/config.yaml").read_text(encoding="utf-8")
    let_run_have({name: value})
    words = ["--config", "run/config.yaml", "--output_dir", "run", "--resume_from_checkpoint"]
    assert train.main([*words, "auto"]) == 2
    sentence = (
        f"--{name} was taken out, as it brought no gain in the measurements (docs/results.md); leave it out and train "
        "anew"
    )
    assert f"--config run/config.yaml: {sentence}" in capsys.readouterr().err
    # Without it, the checkpoint still is one of a run that had it.
    Path("run/config.yaml").write_text(plain, encoding="utf-8")
    for more in (["auto"], ["run/checkpoints/step-00000005"], ["auto", "--dry_run"]):
        assert train.main([*words, *more]) == 2
        said = capsys.readouterr().err
        assert f"the checkpoint of step 5: {sentence}" in said
        assert "another run" not in said
