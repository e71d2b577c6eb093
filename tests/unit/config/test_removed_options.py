"""Options that earlier versions had: files that switched them off are read, and whoever sets one is told why not."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import qa_dist
from qa_dist import train
from qa_dist.common.errors import ConfigError
from qa_dist.config.options import RunConfig
from qa_dist.config.parsing import parse
from qa_dist.config.recipe_files import read_run_options
from qa_dist.config.removed_options import removals, was_removed, without_removed
from qa_dist.sweep import SweepConfig
from qa_dist.sweeping.plan import read_plan

RESULTS = Path(__file__).parents[3] / "docs" / "results"
OFF = {"loraplus_lr_ratio": None, "head_lr_ratio": None, "ema_decay": None, "init_lora_weights": "default"}
ON = {"loraplus_lr_ratio": 4, "head_lr_ratio": 2.0, "ema_decay": 0.99, "init_lora_weights": "pissa"}
READING = ("data", "model", "evaluation")


def sentence(name: str) -> str:
    return (
        f"--{name} was taken out, as it brought no gain in the measurements (docs/results.md); leave it out and train "
        "anew"
    )


def written(folder: Path, options: dict[str, Any]) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump({"lora_r": 4, **options}), encoding="utf-8")
    return str(folder / "config.yaml")


def trained(*words: str, base: dict[str, Any] | None = None) -> RunConfig:
    return parse(["--output_dir", "out", *words], prog="test", description="", base=base)[0]


def test_none_of_them_is_an_option() -> None:
    assert not RunConfig().flat().keys() & OFF.keys()
    assert all(map(was_removed, OFF))


@pytest.mark.parametrize("none", [None, "none", "None", "auto", "null"])
def test_a_file_that_switched_them_off_is_read_as_if_it_did_not_name_them(none: str | None, tmp_path: Path) -> None:
    path = written(tmp_path, {name: none if value is None else value for name, value in OFF.items()})
    wanted = trained("--lora_r", "4")
    assert trained("--config", path) == wanted
    assert trained(base={"lora_r": 4, **OFF}) == wanted
    assert qa_dist.configure(path) == qa_dist.configure(lora_r=4)
    assert read_run_options(tmp_path / "config.yaml") == {"lora_r": 4}


@pytest.mark.parametrize(("name", "value"), ON.items())
def test_training_with_one_of_them_is_refused(
    name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, {name: value})
    for words, base, where in (
        (["--config", path], {}, f"--config {path}: "),
        ([], {name: value}, "the earlier run's configuration: "),
        ([f"--{name}", str(value)], {}, ""),
        ([f"--{name}={value}"], {}, ""),
        # A flag of today is told so too where it would switch it off.
        ([f"--{name}", "none"], {}, ""),
    ):
        with pytest.raises(ConfigError) as caught:
            trained(*words, base=base)
        assert list(caught.value.problems) == [where + sentence(name)]
    with pytest.raises(ConfigError, match=f"^{name} was taken out"):
        qa_dist.configure(**{name: value})
    assert train.main(["--output_dir", str(tmp_path / "out"), f"--{name}", str(value)]) == 2
    said = capsys.readouterr().err
    assert sentence(name) in said
    assert "did you mean" not in said


def test_what_only_reads_a_run_passes_over_them(tmp_path: Path) -> None:
    path = written(tmp_path, ON)
    wanted = parse(["--lora_r", "4"], prog="test", description="", groups=READING)[0]
    assert parse(["--config", path], prog="test", description="", groups=READING)[0] == wanted
    assert parse([], prog="test", description="", groups=READING, base={"lora_r": 4, **ON})[0] == wanted
    with pytest.raises(ConfigError, match="--init_lora_weights was taken out"):
        parse(["--init_lora_weights", "pissa"], prog="test", description="", groups=READING)


def test_what_a_run_had_is_told_and_stays_in_its_record(tmp_path: Path) -> None:
    assert removals({"seed": 1, **OFF}) == []
    assert removals({"seed": 1, **OFF, "ema_decay": 0.99}) == [sentence("ema_decay")]
    assert without_removed({"seed": 1, **OFF, "ema_decay": 0.99}) == {"seed": 1, "ema_decay": 0.99}
    written(tmp_path, ON)
    assert read_run_options(tmp_path / "config.yaml") == {"lora_r": 4, **ON}
    assert read_run_options(tmp_path / "nothing" / "config.yaml") == {}


@pytest.mark.parametrize("name", ["budget_a", "budget_a2"])
def test_sweep_files_of_the_measurements_are_records_and_say_why_they_do_not_run(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_plan(RESULTS / f"{name}.yaml", ["--output_dir", "out", "--dataset_name", "sample"], SweepConfig)
    trials = yaml.safe_load((RESULTS / f"{name}.yaml").read_text(encoding="utf-8"))["trials"]
    assert list(caught.value.problems) == [
        f"{RESULTS / name}.yaml, trial {trial['name']}: {sentence(option)}"
        for trial in trials
        for option in trial
        if option in ON
    ]
