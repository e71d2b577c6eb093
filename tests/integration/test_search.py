"""A search with a study of optuna in a database: what it is told, pruning, and that it goes on after a kill."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qa_dist.common.errors import ConfigError, UserError
from qa_dist.sweeping import study, table
from qa_dist.sweeping.plan import Trial
from qa_dist.sweeping.record import new_record, read_record, write_record
from qa_dist.sweeping.searching import run_search
from qa_dist.sweeping.study import Proposal
from tests.unit.sweeping.inline import Inline
from tests.unit.sweeping.test_search import SEARCH, planned

pytestmark = pytest.mark.integration


def known_score(options: Any, seed: int, step: int) -> float:
    """Best near a rate of 1e-3 and with all layers, and a little better with each step."""
    near = 60 - 15 * abs(math.log10(options["learning_rate"]) + 3)
    return near + (5 if options["lora_target_modules"] == "all-linear" else 0) + step / 10 + seed / 100


def as_if_trained(trial: Trial, step: int | None) -> None:
    """Write the record of a run of 40 steps; with rates above 3e-2 it diverges."""
    record = read_record(trial) or new_record(trial)
    record["starts"] += 1
    score = known_score(trial.options, trial.seed, step or 40)
    figures = {"exact_match": score - 10, "f1": score, "loss": 100 - score}
    if trial.options["learning_rate"] > 3e-2:
        record |= {"status": "diverged", "error": "the loss is infinite"}
    elif step is None:
        record |= {"status": "done", "step": 40, "num_steps": 40, "final": figures}
    else:
        record |= {"status": "paused", "step": step, "rungs": [*record["rungs"], {"step": step, **figures}]}
    write_record(trial, record)


@pytest.fixture(scope="module")
def optuna() -> Any:
    return pytest.importorskip("optuna", reason="the sweep extra is not installed")


def told(optuna: Any, folder: Path) -> list[Any]:
    """What the study holds of each point."""
    storage = f"sqlite:///{folder / 'out' / 'study.db'}"
    return [
        (trial.number, trial.params, trial.state.name, trial.value, trial.intermediate_values)
        for trial in optuna.load_study(study_name="some", storage=storage).trials
    ]


def search(folder: Path, *runners: Any, text: str = SEARCH, said: list[str] | None = None) -> list[bool]:
    """Whether each of some calls of the command, one after the other, found nothing left to do."""
    notice: Callable[[str], object] = (lambda line: None) if said is None else said.append
    return [run_search(planned(folder, text), runner, folder / "sweep.json", notice=notice) for runner in runners]


@pytest.fixture(scope="module")
def whole(optuna: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, int | None]]]:
    """The folder of a search that was never interrupted, and what it ran."""
    folder = tmp_path_factory.mktemp("whole")
    runner = Inline(body=as_if_trained)
    assert search(folder, runner) == [True]
    return folder, runner.done


def test_points_are_pruned_as_the_median_says_and_one_that_diverges_has_failed(optuna: Any, whole: Any) -> None:
    folder, done = whole
    assert len(set(done)) == len(done)
    points = told(optuna, folder)
    assert [number for number, *_ in points] == list(range(12))
    assert {state for _, _, state, _, _ in points} == {"COMPLETE", "PRUNED", "FAIL"}
    ended: list[dict[int, float]] = []
    for number, params, state, value, reported in points:
        if params["learning_rate"] > 3e-2:
            assert (state, value, reported) == ("FAIL", None, {})
            continue
        expected = {step: (known_score(params, 1, step) + known_score(params, 2, step)) / 2 for step in (10, 20, 40)}
        # After two points with an end, one goes on only if it is not below the median of those that have one.
        last = 40
        for step in (20, 10):
            others = sorted(scores[step] for scores in ended)
            middle = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2 if others else 0.0
            last = step if len(ended) >= 2 and expected[step] < middle else last
        assert (state, value) == ("COMPLETE" if last == 40 else "PRUNED", pytest.approx(expected[last])), number
        assert reported == pytest.approx({step: score for step, score in expected.items() if step <= last})
        ended += [expected] if last == 40 else []
    written = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    assert written["search"]["sampler"] == {"name": "tpe", "seed": 5, "n_startup_trials": 4}
    assert (written["num_trials"], len(written["trials"])) == (24, 24 - sum(p[2] == "FAIL" for p in points))
    best = max((value, number) for number, _, state, value, _ in points if state == "COMPLETE")[1]
    assert table.rows(written)[0][0].startswith(f"{best} learning_rate=")


def test_a_point_has_the_scores_that_its_seeds_ended_with_though_one_ended_at_a_rung(
    optuna: Any, tmp_path: Path
) -> None:
    def first_ends_early(trial: Trial, step: int | None) -> None:
        as_if_trained(trial, step)
        record = read_record(trial)
        if trial.seed == 1 and step == 10 and record is not None:
            figures = {name: value for name, value in record["rungs"][-1].items() if name != "step"}
            write_record(trial, {**record, "status": "done", "num_steps": 10, "rungs": [], "final": figures})

    text = SEARCH.replace("trials: 12", "trials: 1").replace("high: 1e-1", "high: 1e-2")
    assert search(tmp_path, Inline(body=first_ends_early), text=text) == [True]
    ((_, params, state, value, _),) = told(optuna, tmp_path)
    expected = (known_score(params, 1, 10) + known_score(params, 2, 40)) / 2
    assert (state, value) == ("COMPLETE", pytest.approx(expected))


def test_a_search_that_is_killed_goes_on_as_if_it_had_not_been(optuna: Any, whole: Any, tmp_path: Path) -> None:
    folder, done = whole
    runners = [*(Inline(most, body=as_if_trained) for most in (0, 7, 16)), Inline(body=as_if_trained)]
    assert search(tmp_path, *runners) == [False] * 3 + [True]
    assert [each for runner in runners for each in runner.done] == done
    assert told(optuna, tmp_path) == told(optuna, folder)
    # With more trials the same study goes on.
    last = Inline(body=as_if_trained)
    assert search(tmp_path, last, last, text=SEARCH.replace("trials: 12", "trials: 13")) == [True, True]
    assert {name.partition("_")[0] for name, _ in last.done} == {"12"}


def test_a_storage_that_fails_in_the_middle_is_a_sentence(optuna: Any, tmp_path: Path) -> None:
    def body(trial: Trial, step: int | None) -> None:
        as_if_trained(trial, step)
        (tmp_path / "out" / "study.db").write_bytes(b"no longer a database" * 9999)

    with pytest.raises(
        UserError, match=r"the study's storage does not answer .*; when it does again, the same command"
    ):
        search(tmp_path, Inline(body=body))


def test_two_sweeps_do_not_share_a_study(optuna: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "host_name", lambda: "here")
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    text = SEARCH.replace("trials: 12", f"trials: 1\n  storage: {storage}")
    first, second = tmp_path / "first", tmp_path / "second"
    assert search(first, Inline(body=as_if_trained), text=text) == [True]
    with pytest.raises(UserError, match=f"the study some in .* is that of the sweep in {first / 'out'}"):
        search(second, Inline(body=as_if_trained), text=text)
    # Another machine cannot see whether the folder is there.
    with monkeypatch.context() as patched:
        patched.setattr(study, "host_name", lambda: "there")
        with pytest.raises(UserError, match="on here; go on with that --output_dir"):
            search(second, Inline(body=as_if_trained), text=text)
    # A folder that was moved takes its study along.
    first.rename(tmp_path / "elsewhere")
    nothing = Inline(body=as_if_trained)
    assert search(tmp_path / "elsewhere", nothing, text=text) == [True]
    assert nothing.done == []


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_trial_that_is_stopped_alone_is_left_to_the_next_call(
    optuna: Any, whole: Any, tmp_path: Path, has_begun: bool
) -> None:
    """As with scancel, of a job that runs or waits: it is not handed out again and again."""
    stopped: list[str] = []

    def body(trial: Trial, step: int | None) -> None:
        if trial.name.startswith("3_") and not stopped:
            stopped.append(trial.name)
            if has_begun:
                write_record(trial, {**new_record(trial), "starts": 1})
        else:
            as_if_trained(trial, step)

    first, second = Inline(body=body), Inline(body=as_if_trained)
    search(tmp_path, first, second)
    assert [name for name, _ in first.done].count(stopped[0]) == 1
    assert second.done[0][0] == stopped[0]
    assert [state for _, _, state, _, _ in told(optuna, tmp_path)].count("RUNNING") == 0


def test_a_search_that_is_killed_before_a_decision_makes_it(
    optuna: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, done = whole
    decide, killed = Proposal.is_to_stop, []

    def is_to_stop(proposal: Proposal) -> bool:
        found = decide(proposal)
        if found and not killed:
            killed.append(proposal.number)
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Proposal, "is_to_stop", is_to_stop)
    first, second = Inline(body=as_if_trained), Inline(body=as_if_trained)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, first)
    assert search(tmp_path, second) == [True]
    assert first.done + second.done == done
    assert told(optuna, tmp_path) == told(optuna, folder)


class Three:
    """Has three tasks at once; the last one started ends first."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int | None]] = []

    def run(self, next_task: Any, *, is_over: Any, ended: Any) -> bool:
        running: list[Any] = []
        while True:
            while len(running) < 3 and (task := next_task()):
                running.append(task)
            if not running:
                return True
            trial, step = running.pop()
            as_if_trained(trial, step)
            self.done.append((trial.name, step))
            ended(trial)


def test_several_at_once_try_as_many_points_and_nothing_twice(optuna: Any, tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="the sweep extra is not installed")
    runner = Three()
    text = SEARCH.replace("{name: tpe, seed: 5, n_startup_trials: 4}", "{name: gp, n_startup_trials: 4}")
    assert search(tmp_path, runner, text=text.replace("trials: 12", "trials: 8")) == [True]
    assert len(set(runner.done)) == len(runner.done)
    points = told(optuna, tmp_path)
    assert len(points) == 8
    assert {state for _, _, state, _, _ in points} <= {"COMPLETE", "PRUNED", "FAIL"}


def test_a_loss_is_to_be_small(optuna: Any, tmp_path: Path) -> None:
    text = SEARCH.replace("trials: 12", "trials: 3")
    plan = planned(tmp_path, text, "--metric_for_best_model", "loss")
    assert run_search(plan, Inline(body=as_if_trained), tmp_path / "sweep.json")
    study = optuna.load_study(study_name="some", storage=f"sqlite:///{tmp_path / 'out' / 'study.db'}")
    assert study.direction.name == "MINIMIZE"
    trial = next(trial for trial in study.trials if trial.state.name == "COMPLETE")
    seeds = [known_score(trial.params, seed, 40) for seed in (1, 2)]
    assert trial.value == pytest.approx(100 - sum(seeds) / 2)


def test_what_the_study_cannot_do_is_a_sentence(optuna: Any, tmp_path: Path) -> None:
    for old, new, sentence in (
        (
            "n_startup_trials: 4",
            "startups: 4",
            "the sampler tpe cannot be used with what the sweep file gives it: .*startups",
        ),
        ("seed: 5", "seed: -1", "the sampler's seed is -1 and must be a whole number"),
        (
            "{name: median, n_startup_trials: 2}",
            "{name: median, n_startup_trials: -2}",
            "the pruner median cannot be used",
        ),
    ):
        with pytest.raises(ConfigError, match=sentence):
            search(tmp_path, Inline(), text=SEARCH.replace(old, new))
    storage = "search:\n  storage: nodatabase://user:secret@host/a"
    with pytest.raises(UserError, match=r"the study in nodatabase://\*\*\*@host/a cannot be used"):
        search(tmp_path, Inline(), text=SEARCH.replace("search:", storage))
    search(tmp_path, Inline(0))
    with pytest.raises(UserError, match="is of a search with another rungs, parameters; choose another --output_dir"):
        search(tmp_path, Inline(), text=SEARCH.replace("high: 1e-1", "high: 1e-2").replace("[10, 20]", "[10]"))
