"""The folder of a run: who may have it, which checkpoint in it is taken, and what of an earlier run stays."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qa_dist.common.errors import CheckpointError, ConfigError, LocalTrainingError
from qa_dist.config.options import ModelConfig, RunConfig, TrainingConfig
from qa_dist.config.recipe_files import read_recipe
from qa_dist.training import output_folder
from qa_dist.training.checkpoints import CHECKPOINTS, Checkpoint, write_checkpoint
from qa_dist.training.output_folder import FILES, FINAL_FILES, LAUNCHERS, OutputFolder
from qa_dist.training.run_state import RunState


def save(folder: Path, *steps: int) -> Path:
    """Checkpoints of these steps in a run's folder; returns the newest."""
    state = RunState(world_size=1, max_tokens_per_device=64)
    for step in steps:
        checkpoint = Checkpoint(step, {"weight": torch.ones(2)}, {}, None, {}, state)
        path = write_checkpoint(checkpoint, folder / CHECKPOINTS)
    return path


def options(folder: Path, wanted: str = "no", *, overwrite: bool = False, **model: str) -> RunConfig:
    """The options of a run of this folder."""
    training = TrainingConfig(
        output_dir=str(folder), seed=5, resume_from_checkpoint=wanted, overwrite_output_dir=overwrite
    )
    return RunConfig(training=training, model=ModelConfig(**model))


def open_and_claim(folder: Path, wanted: str = "no", *, overwrite: bool = False, launcher: str | None = None) -> int:
    """Steps that a run of this folder has behind it when it begins."""
    opened = OutputFolder(folder, [launcher] if launcher else [])
    config = options(folder, wanted, overwrite=overwrite)
    checkpoint = opened.open(config, pytest.fail)
    opened.claim(config, version_2=True)
    opened.close()
    return checkpoint.step if checkpoint else 0


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """The folder of a run that ended."""
    folder = tmp_path / "out"
    save(folder, 5)
    (folder / "best").mkdir()
    for name in (*FILES, "notes.txt"):
        (folder / name).write_text("before", encoding="utf-8")
    return folder


def test_a_new_folder_is_made_and_holds_what_repeats_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    assert open_and_claim(folder) == 0
    kept = read_recipe(str(folder / "config.yaml"))
    assert kept["seed"] == 5
    assert kept["version_2_with_negative"] is True, "what `auto` came to"
    assert os.listdir(folder) == ["config.yaml"]


def test_no_other_run_gets_a_folder_that_is_open(tmp_path: Path) -> None:
    first, second = OutputFolder(tmp_path), OutputFolder(tmp_path)
    first.open(options(tmp_path), pytest.fail)
    for wanted, overwrite in (("no", False), ("no", True), ("auto", False)):
        with pytest.raises(ConfigError, match="another run is writing to --output_dir"):
            second.open(options(tmp_path, wanted, overwrite=overwrite), pytest.fail)
    first.close()
    second.open(options(tmp_path), pytest.fail)
    second.close()


def test_checkpoints_are_looked_for_when_no_other_run_can_write_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest, looks = output_folder.newest_checkpoint, []

    def look(*words: Any) -> Any:
        with pytest.raises(ConfigError, match="another run is writing"):
            OutputFolder(tmp_path).open(options(tmp_path), pytest.fail)
        looks.append(words)
        return newest(*words)

    monkeypatch.setattr(output_folder, "newest_checkpoint", look)
    assert open_and_claim(tmp_path, "auto") == 0
    assert len(looks) == 1


def test_folders_that_are_links_are_unlinked_and_what_they_lead_to_stays(results: Path, tmp_path: Path) -> None:
    for name in ("best", CHECKPOINTS):
        elsewhere = (results / name).rename(tmp_path / f"scratch-{name}")
        (results / name).symlink_to(elsewhere)
    assert open_and_claim(results, overwrite=True) == 0
    assert sorted(os.listdir(results)) == ["config.yaml", "notes.txt"]
    assert os.listdir(tmp_path / f"scratch-{CHECKPOINTS}") == ["step-00000005"]


@pytest.mark.parametrize("name", [*FILES, CHECKPOINTS])
def test_results_are_refused_by_any_of_their_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name == CHECKPOINTS else (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=rf"already holds results \({name}\)"):
        open_and_claim(tmp_path)


def test_results_that_may_be_replaced_stay_until_the_folder_is_claimed(results: Path) -> None:
    folder = OutputFolder(results)
    assert folder.open(options(results, overwrite=True), pytest.fail) is None
    assert all((results / name).exists() for name in (*FILES, "best", CHECKPOINTS))
    folder.claim(RunConfig(), version_2=False)
    folder.close()
    assert sorted(os.listdir(results)) == ["config.yaml", "notes.txt"], "what no run writes is none of its business"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_goes_on_takes_the_newest_checkpoint_and_keeps_what_is_there(results: Path, overwrite: bool) -> None:
    save(results, 10, 15)
    assert open_and_claim(results, "auto", overwrite=overwrite) == 15
    assert all((results / name).read_text(encoding="utf-8") == "before" for name in FILES)
    assert len(os.listdir(results / CHECKPOINTS)) == 3
    assert read_recipe(str(results / "config.yaml"))["resume_from_checkpoint"] == "no"


def test_what_repeats_a_run_replaces_nothing_unasked(results: Path) -> None:
    assert open_and_claim(results, overwrite=True) == 0
    assert read_recipe(str(results / "config.yaml"))["overwrite_output_dir"] is False


@pytest.mark.parametrize("name", ["init_adapter", "model_name_or_path"])
@pytest.mark.parametrize("place", ["", "best"])
def test_what_the_run_starts_from_is_not_cleared(results: Path, name: str, place: str) -> None:
    given = options(results, overwrite=True, **{name: str(results / place)})
    for opening in (OutputFolder(results).open, OutputFolder(results).look):
        with pytest.raises(ConfigError, match=f"--{name} .* is in --output_dir, which the run clears first"):
            opening(given, pytest.fail)
    # One that goes on clears nothing.
    own = OutputFolder(results)
    assert own.open(options(results, "auto", **{name: str(results)}), pytest.fail) is not None
    own.close()


def test_results_of_other_weights_go_when_new_ones_are_written(results: Path) -> None:
    OutputFolder(results).clear_results(keeps_logits=True)
    kept = {name for name in FILES if (results / name).exists()}
    gone = {"metrics.json", "predictions.json", "nbest.json", "null_odds.json", "calibration.json"}
    assert kept == {*FILES} - gone
    OutputFolder(results).clear_results(keeps_logits=False)
    assert not (results / "logits.npy").exists()


def test_a_run_that_would_go_on_and_cannot_clears_what_ended_early_and_nothing_else(tmp_path: Path) -> None:
    for number, name in enumerate(FILES):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).touch()
        if name in FINAL_FILES:
            with pytest.raises(ConfigError, match="already holds results"):
                open_and_claim(folder, "auto")
        else:
            assert open_and_claim(folder, "auto") == 0
        assert (folder / name).exists() == (name in FINAL_FILES)


def test_a_checkpoint_of_another_folder_opens_no_folder_with_results(results: Path, tmp_path: Path) -> None:
    elsewhere = str(save(tmp_path / "elsewhere", 20))
    with pytest.raises(ConfigError, match="already holds results"):
        open_and_claim(results, elsewhere)
    assert open_and_claim(tmp_path / "new", elsewhere) == 20
    # By its own path it is one of the folder's own.
    own = OutputFolder(results)
    checkpoint = own.open(options(results, str(results / CHECKPOINTS / "step-00000005")), pytest.fail)
    assert checkpoint is not None
    assert own.keeps_own
    assert not own.looks_for_own
    own.close()


def test_a_checkpoint_that_cannot_be_used_leaves_everything_as_it_was(results: Path) -> None:
    (results / CHECKPOINTS / "step-00000005" / "state.json").unlink()
    passed_over: list[str] = []
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        OutputFolder(results).open(options(results, "auto"), passed_over.append)
    assert "state.json is missing" in passed_over[0]
    assert all((results / name).exists() for name in FILES)


def test_ranks_that_their_launcher_starts_again_go_on_and_no_others(tmp_path: Path) -> None:
    assert open_and_claim(tmp_path, launcher="one") == 0
    assert (tmp_path / LAUNCHERS).read_text(encoding="utf-8") == "one"
    save(tmp_path, 5)
    for launcher in ("another", None):
        with pytest.raises(ConfigError, match="already holds results"):
            open_and_claim(tmp_path, launcher=launcher)
    assert open_and_claim(tmp_path, launcher="one") == 5
    # Whoever replaces the results is the folder's launcher from then on.
    assert open_and_claim(tmp_path, overwrite=True, launcher="another") == 0
    save(tmp_path, 10)
    assert open_and_claim(tmp_path, launcher="another") == 10
    assert open_and_claim(tmp_path, overwrite=True) == 0
    assert not (tmp_path / LAUNCHERS).exists()


def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--output_dir .*/file/out cannot be used: Not a directory; choose another"):
        open_and_claim(tmp_path / "file" / "out")
    folder = OutputFolder(tmp_path / "out")
    folder.open(options(tmp_path / "out"), pytest.fail)
    (tmp_path / "out" / "config.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"--output_dir .*/out cannot be used: Is a directory; choose another"):
        folder.claim(RunConfig(), version_2=False)
    folder.close()


def test_what_the_disk_refuses_is_one_sentence_with_the_step(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    with pytest.raises(LocalTrainingError) as caught, folder.writing(20):
        raise OSError(28, "No space left on device")
    assert str(caught.value) == (
        f"what belongs to step 20 cannot be written to {tmp_path}: No space left on device; free some space or make "
        "the folder writable, and go on with --resume_from_checkpoint auto"
    )
    with pytest.raises(ZeroDivisionError), folder.writing(20):
        raise ZeroDivisionError
