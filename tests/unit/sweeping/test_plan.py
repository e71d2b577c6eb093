"""A sweep file read into trials, and every mistake in it as one sentence."""

import json
import re
from pathlib import Path

import pytest

from qa_dist import sweep
from qa_dist.common.errors import ConfigError
from qa_dist.sweep import SweepConfig
from qa_dist.sweeping.plan import Plan, read_plan
from qa_dist.sweeping.space import LONGEST_NAME
from tests.unit.trained import random_adapter

FLAGS = ["--output_dir", "out", "--dataset_name", "sample"]
RESULTS = Path(__file__).parents[3] / "docs" / "results"
OLD_RESULTS = ("budget_a", "budget_a2")
"""Have methods that are no options any more; their tables name the commit that has them."""


def plan(tmp_path: Path, text: str, flags: list[str] | None = None, only: tuple[str, ...] = ()) -> Plan:
    file = tmp_path / "some.yaml"
    file.write_text(text, encoding="utf-8")
    return read_plan(file, FLAGS if flags is None else flags, SweepConfig, only)


def test_a_grid_and_a_list_are_tried_with_every_seed(tmp_path: Path) -> None:
    found = plan(
        tmp_path,
        """
        config: quickstart
        options: {num_train_epochs: 5}
        seeds: [1, 2]
        grid:
          learning_rate: [5e-4, 1e-3]
          lora_target_modules: [attention, all-linear]
        trials:
          - name: all of it
            tuning: full
        """,
        [*FLAGS, "--global_batch_size", "4", "--jobs", "3"],
    )
    assert [(trial.method, trial.seed) for trial in found.trials] == [
        (method, seed)
        for method in (
            "learning_rate=5e-4 lora_target_modules=attention",
            "learning_rate=5e-4 lora_target_modules=all-linear",
            "learning_rate=1e-3 lora_target_modules=attention",
            "learning_rate=1e-3 lora_target_modules=all-linear",
            "all of it",
        )
        for seed in (1, 2)
    ]
    assert len({trial.folder for trial in found.trials}) == 10
    first, last = found.trials[0].config, found.trials[-1].config
    # The recipe, the shared options, the trial's own, and the flags on top.
    assert first.model.model_dropout == 0.0
    assert first.training.num_train_epochs == 5
    assert first.training.learning_rate == 5e-4
    assert first.training.global_batch_size == last.training.global_batch_size == 4
    assert (first.training.seed, last.training.seed) == (1, 2)
    # `tuning: full` makes the recipe's LoRA options meaningless instead of contradicting them.
    assert (last.model.tuning, last.model.lora_r) == ("full", 8)


def test_rungs_are_where_trials_are_evaluated_and_saved(tmp_path: Path) -> None:
    found = plan(tmp_path, "grid: {lora_r: [1, 2]}\nrungs: [20, 50]")
    assert found.rungs == [20, 50]
    assert {(t.config.training.eval_steps, t.config.training.checkpointing_steps) for t in found.trials} == {
        ("10", "10")
    }


def test_some_methods_alone(tmp_path: Path) -> None:
    text = "seeds: [3, 4]\ntrials:\n  - {name: a, lora_r: 1}\n  - {name: b, lora_r: 2}"
    found = plan(tmp_path, text, only=("b",))
    assert (len(found.trials), found.only) == (4, ("b",))
    with pytest.raises(ConfigError, match="there are a, b"):
        plan(tmp_path, text, only=("c",))
    with pytest.raises(ConfigError, match=r"--only runs some trials, and .* has rungs, which compare all"):
        plan(tmp_path, f"{text}\nrungs: [5]", only=("b",))


def test_a_grid_may_have_values_that_no_name_has(tmp_path: Path) -> None:
    text = "grid: {model_name_or_path: ['package:some_wheel/model', '~/mine'], learning_rate: [0.00123456]}"
    assert [trial.name for trial in plan(tmp_path, text).trials] == [
        "model_name_or_path=package.some_wheel.model_learning_rate=0.00123456-seed42",
        "model_name_or_path=..mine_learning_rate=0.00123456-seed42",
    ]


def test_points_of_a_grid_whose_names_are_too_long_are_told_apart(tmp_path: Path) -> None:
    text = """
        grid:
          learning_rate: [1e-3, 2e-3]
          global_batch_size: [8, 16]
          num_train_epochs: [2, 3]
          warmup_ratio: [0.1, 0.2]
          lora_dropout: [0.0, 0.1]
          weight_decay: [0.0, 0.1]
    """
    trials = plan(tmp_path, text).trials
    assert len({trial.folder for trial in trials}) == 64
    assert max(len(trial.method) for trial in trials) <= LONGEST_NAME
    assert trials[-1].method.startswith("learning_rate=2e-3 global_batch_size=16 num_train_epochs=3 warmup_ratio=0.2")
    assert trials[-1].method.endswith(" 64")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "^the sweep file .* is empty"),
        ("- a", "^the sweep file .* holds a list"),
        ("seeds: [1]", "neither a grid nor trials"),
        ("grid: {lora_r: [1]}\nsteps: 3", "steps is none of a sweep's keys"),
        ("grid: [lora_r]", "grid is a list and must be names with lists"),
        ("grid: {lora_r: 3}", "lora_r in the grid is a number and must be a list of values"),
        ("grid: {lora_r: [1]}\nseeds: [1, 1]", "seeds is .* must be a list of different whole numbers"),
        ("grid: {lora_r: [1]}\nseeds: [-1]", "seeds is .* must be a list of different whole numbers from 0"),
        ("grid: {lora_r: [1]}\nseeds: [9223372036854775808]", "different whole numbers from 0 to 9223372036854775807$"),
        ("grid: {lora_r: []}", "lora_r in the grid is empty and must be a list of values"),
        ("grid: {seed: [1, 2]}", "a sweep sets --seed itself, its trials have those of the list `seeds`; drop it"),
        ("trials: [{name: a, seed: 7}]", "a sweep sets --seed itself"),
        ("grid: {lora_r: [1]}\noptions: {seed: 7}", "a sweep sets --seed itself"),
        ("search: {trials: 2, parameters: {seed: {low: 1, high: 4}}}", "a sweep sets --seed itself"),
        ("grid: {lora_r: [1]}\noptions: {overwrite_output_dir: true}", "a sweep sets --overwrite_output_dir itself"),
        (
            "grid: {eval_steps: [1, 2]}\nrungs: [4]",
            "its trials are evaluated and saved at its rungs",
        ),
        ("grid: {metric_for_best_model: [f1, loss]}", "--metric_for_best_model must be the same for all trials"),
        ("search: {trials: 2, sampler: [tpe], parameters: {lora_r: [1, 2]}}", "sampler is .* use one of"),
        (
            "grid: {lora_r: [1]}\nrungs: [10]\noptions: {max_eval_features: 5}",
            "has rungs, where trials are compared by f1, and --max_eval_features has the loss alone evaluated",
        ),
        (
            "grid: {lora_r: [1]}\nrungs: [33, 100]",
            "evaluate at every multiple of 1 steps, .* multiples of one number, such as 33, 99",
        ),
        ("grid: {lora_r: [1]}\nrungs: [97, 101]", "take multiples of one number, such as 97$"),
        (
            "grid: {max_train_steps: [60, 100]}\nrungs: [50, 100]",
            "has a rung after 100 steps, and --max_train_steps 100 ends all trials before",
        ),
        ("grid: {lora_r: [1]}\nrungs: [20, 10]", "rungs is .* increasing numbers of steps"),
        ("trials: [{lora_r: 1}]", "trial 1 has no name"),
        ("trials: [{name: a}, {name: 64, lora_r: 64}]", "name of trial 2 is a number, 64, and must be text; put quota"),
        ("trials: [{name: a/b}]", "the trial name a/b may have letters"),
        ("trials: [{name: a b}, {name: a_b}]", "two trials would share the name"),
        (
            "trials: [{name: a}, {name: c, lora_r: 2}]\noptions: {lora_r: 2}",
            "a and c are the same run, as their options",
        ),
        ("grid: {lora_r: [1, 2]}\ntrials: [{name: a, lora_r: 2}]", "lora_r=2 and a are the same run"),
        ("grid: {lora_r: [1], lora_rank: [2]}", "trial lora_r=1 lora_rank=2: --lora_rank is no option here"),
        ("trials: [{name: a, lora_r: 0}]", "trial a: --lora_r 0 is out of range"),
        ("trials: [{name: a, jobs: 2}]", "trial a: --jobs is no option here"),
        ("trials: [{name: a, tuning: full, lora_r: 4}]", "--lora_r sets up LoRA but --tuning is full"),
        ("grid: {seed: [1, 2]}\noptions: {lora_r: [}", "cannot be used as YAML"),
    ],
)
def test_a_mistake_in_the_file_is_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        plan(tmp_path, text)


@pytest.mark.parametrize(
    "file",
    [file for file in sorted(RESULTS.glob("*.yaml")) if file.stem not in OLD_RESULTS],
    ids=lambda file: file.stem,
)
def test_what_was_measured_can_be_measured_again(file: Path) -> None:
    found = {(trial.method, trial.seed) for trial in read_plan(file, FLAGS, SweepConfig).trials}
    measured = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["trials"]
    assert found >= {(trial["method"], trial["seed"]) for trial in measured}


@pytest.mark.parametrize("name", OLD_RESULTS)
def test_what_can_no_longer_be_measured_says_why(name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_plan(RESULTS / f"{name}.yaml", FLAGS, SweepConfig)
    assert all("was taken out, as it brought no gain" in problem for problem in raised.value.problems)


def test_flags_may_not_undo_what_the_trials_differ_in(tmp_path: Path) -> None:
    text = "config:\ngrid: {lora_r: [1, 2]}"
    for flags, sentence in (
        (["--lora_r=4"], "--lora_r would overwrite what the trials"),
        (["--seed", "4"], "--seed would overwrite"),
        (["--config", "quickstart"], "--config is for single runs"),
        (["--resume_from_checkpoint", "no"], "a sweep sets --resume_from_checkpoint itself"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            plan(tmp_path, text, [*FLAGS, *flags])


def test_the_command_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--jobs", "2"]) == 2
    assert "the sweep file is missing; name it before the options" in capsys.readouterr().err
    assert sweep.main(["--output_dir", "out", "few.yaml"]) == 2
    assert "the sweep file is missing; name it before the options" in capsys.readouterr().err
    assert sweep.main(["few.yaml"]) == 2
    assert "--output_dir is missing" in capsys.readouterr().err
    assert sweep.main(["nothing.yaml", "--output_dir", "out"]) == 2
    assert "there is no sweep file nothing.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "rungs", "sentence"),
    [
        (["--train_file", "nope.json", "--eval_steps", "no"], "", "nope.json does not exist"),
        (["--train_file", "DATA"], "", "there is no validation data to evaluate on during training"),
        (["--validation_file", "DATA"], "", "there is no training data; give --train_file"),
        (["--train_file", "DATA"], "rungs: [5]", "has rungs, where trials are compared by scores; give --validation"),
    ],
)
def test_data_that_no_trial_can_use_is_refused_before_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], rungs: str, sentence: str
) -> None:
    (tmp_path / "few.yaml").write_text(f"grid: {{lora_r: [1, 2]}}\n{rungs}", encoding="utf-8")
    (tmp_path / "data.json").write_text('{"data": []}', encoding="utf-8")
    words = [word.replace("DATA", str(tmp_path / "data.json")) for word in flags]
    assert sweep.main([str(tmp_path / "few.yaml"), *words, "--output_dir", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_a_trial_cannot_go_on_from_is_refused_before_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_adapter(tmp_path, "bert")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    (tmp_path / "few.yaml").write_text(f"options: {{init_adapter: {adapter}}}\ngrid: {{lora_r: [8, 3]}}\n", "utf-8")
    words = [str(tmp_path / "few.yaml"), "--dataset_name", "sample", "--model_name_or_path", str(base)]
    assert sweep.main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert f"--init_adapter {adapter} has r 8 and this run 3; give --lora_r 8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_results_cannot_go_to_is_refused_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "few.yaml"
    file.write_text("grid: {lora_r: [1, 2]}", encoding="utf-8")
    data = tmp_path / "data.json"
    data.write_text('{"data": []}', encoding="utf-8")
    other = tmp_path / "other.json"
    other.write_text('{"sweep": "many", "trials": []}', encoding="utf-8")
    more_trials = tmp_path / "more.json"
    held = [{"method": f"lora_r={rank}", "seed": 42} for rank in (1, 2, 3)]
    searched = tmp_path / "searched.json"
    searched.write_text('{"sweep": "few", "trials": [], "search": {}}', encoding="utf-8")
    more_trials.write_text(json.dumps({"sweep": "few", "trials": held}), encoding="utf-8")
    words = [str(file), "--train_file", str(data), "--eval_steps", "no", "--model_name_or_path", "m"]
    out = ["--output_dir", str(tmp_path / "out")]
    for more, sentence in (
        ([*out, "--results_file", str(tmp_path)], "exists and holds no results of a sweep"),
        ([*out, "--results_file", str(data)], "data.json exists and holds no results of a sweep"),
        ([*out, "--results_file", str(data / "x.json")], "its folder .*data.json cannot be used: Not a directory"),
        ([*out, "--results_file", str(other)], "other.json holds the results of another sweep, many, and not of few"),
        (
            [*out, "--results_file", str(more_trials)],
            "more.json holds results of 1 trials that few does not have, such as lora_r=3 with seed 42",
        ),
        ([*out, "--results_file", str(searched)], "searched.json holds results of a search, and few has single trials"),
        (["--output_dir", str(data)], "its folder .*data.json cannot be used: Not a directory"),
    ):
        assert sweep.main([*words, *more]) == 2
        assert re.search(sentence, capsys.readouterr().err), sentence
    (tmp_path / "out").mkdir()
    with sweep._alone_in(tmp_path / "out"):
        assert sweep.main([*words, *out]) == 2
    assert "another sweep is running in --output_dir" in capsys.readouterr().err
    assert data.read_text(encoding="utf-8") == '{"data": []}'
    assert file.read_text(encoding="utf-8") == "grid: {lora_r: [1, 2]}"
