"""A search: what its file may hold, what a study proposes and is told, and that it goes on after a kill."""

from pathlib import Path

import pytest

from qa_dist.common.errors import ConfigError
from qa_dist.sweep import SweepConfig
from qa_dist.sweeping.plan import Plan, read_plan
from qa_dist.sweeping.searching import run_search
from qa_dist.sweeping.space import Choice, Range
from tests.unit.sweeping.inline import Inline

SEARCH = """
seeds: [1, 2]
rungs: [10, 20]
search:
  trials: 12
  sampler: {name: tpe, seed: 5, n_startup_trials: 4}
  pruner: {name: median, n_startup_trials: 2}
  parameters:
    learning_rate: {low: 1e-5, high: 1e-1, log: true}
    lora_r: {low: 2, high: 16, step: 2}
    lora_target_modules: [[query, value], all-linear]
"""


def planned(folder: Path, text: str = SEARCH, *flags: str) -> Plan:
    folder.mkdir(exist_ok=True)
    file = folder / "some.yaml"
    file.write_text(text, encoding="utf-8")
    data = [] if "--train_file" in flags else ["--dataset_name", "sample"]
    return read_plan(file, ["--output_dir", str(folder / "out"), *data, *flags], SweepConfig)


def test_what_is_searched(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert plan.search is not None
    assert (plan.trials, plan.num_trials) == ([], 24)
    layers = Choice({"query+value": ["query", "value"], "all-linear": "all-linear"})
    assert plan.search.parameters == {
        "learning_rate": Range(1e-5, 1e-1, log=True),
        "lora_r": Range(2, 16, step=2),
        "lora_target_modules": layers,
    }
    assert [point["lora_r"] for _, point in plan.search.corners()] == [2, 2, 2, 2, 16, 2, 2]
    name = plan.search.point_name(3, {"learning_rate": 0.00123456, "lora_r": 4, "lora_target_modules": ["a/b", "c"]})
    assert name == "3 learning_rate=0.001235 lora_r=4 lora_target_modules=a.b+c"


SMALL = "search: {trials: 2, parameters: {lora_r: [1, 2]}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("search: [lora_r]", "search is a list and must be names with values"),
        (f"{SMALL}, sampling: 3}}", "sampling is none of a search's keys"),
        (f"{SMALL}}}\ngrid: {{lora_alpha: [1]}}", "has a search and grid"),
        ("search: {parameters: {lora_r: [1, 2]}}", "trials of the search is null and must be how many points"),
        ("search: {trials: 3}", "the search has no parameters"),
        ("search: {trials: 3, parameters: {lora_r: 4}}", "the parameter lora_r is a number; give it a list"),
        ("search: {trials: 3, parameters: {lora_r: {low: 4}}}", "the parameter lora_r has low; give it a list"),
        ("search: {trials: 3, parameters: {lora_r: {low: 4, high: 4}}}", "goes from 4 to 4; both must be numbers"),
        ("search: {trials: 3, parameters: {lora_r: {low: 1, high: 4, step: 0.5}}}", "make it a whole number too"),
        (
            "search: {trials: 3, parameters: {lora_dropout: {low: 0, high: 0.9, log: true}}}",
            "a low above 0, and no step",
        ),
        (
            "search: {trials: 3, parameters: {lora_r: {low: 1, high: 10, step: 4}}}",
            "does not get from 1 to 10 in steps of 4; choose others",
        ),
        ("search: {trials: 3, parameters: {lora_r: [1, 1]}}", "a list of different values"),
        ("search: {trials: 3, parameters: {lora_r: {low: 0, high: 4}}}", "trial lora_r 0: --lora_r 0 is out of range"),
        ("search: {trials: 3, parameters: {lora_r: {low: 4, high: 64.0}}}", "is not an integer"),
        ("search: {trials: 3, parameters: {lora_r: {low: 4.0, high: 6, step: 0.5}}}", "--lora_r 4.5 is not an integer"),
        ("search: {trials: 3, parameters: {lora_rank: [1, 4]}}", "--lora_rank is no option here"),
        (f"{SMALL}, sampler: grid}}", "sampler is grid; use one of tpe, random, gp"),
        (f"{SMALL}, pruner: best}}\nrungs: [3]", "pruner is best; use one of none, median, halving, hyperband"),
        (
            f"{SMALL}, pruner: {{reduction_factor: 3}}}}\nrungs: [3]",
            "the name of the pruner is null; use one of none, median",
        ),
        (f"{SMALL}, pruner: median}}", "the pruner median decides at rungs, and there are none"),
        (f"{SMALL}, storage: 3}}", "storage of the search is a number and must be text"),
    ],
)
def test_a_mistake_in_a_search_is_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        planned(tmp_path, text)


def test_steps_that_meet_the_end_but_for_rounding_are_taken(tmp_path: Path) -> None:
    text = "search: {trials: 3, parameters: {lora_dropout: {low: 0.0, high: 0.9, step: 0.3}}}"
    search = planned(tmp_path, text).search
    assert search is not None
    assert search.parameters == {"lora_dropout": Range(0.0, 0.9, step=0.3)}


def test_what_does_not_go_with_a_search(tmp_path: Path) -> None:
    for flags, sentence in (
        (["--lora_r", "4"], "--lora_r would overwrite what the trials"),
        (["--train_file", "a.json"], "goes by scores; give --validation_file"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            planned(tmp_path, SEARCH, *flags)
    file = tmp_path / "some.yaml"
    with pytest.raises(ConfigError, match=r"--only names trials, and .* has a search"):
        read_plan(file, ["--output_dir", "out", "--dataset_name", "sample"], SweepConfig, ("a",))


def test_without_optuna_one_sentence_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"a sweep file with a search needs optuna; .* pip install 'qa-dist\[sweep\]'"
    ):
        run_search(planned(tmp_path), Inline(), tmp_path / "sweep.json")
