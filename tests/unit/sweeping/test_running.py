"""What a sweep says of itself, and the rungs that it compares its trials at."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qa_dist.common.errors import UserError
from qa_dist.sweep import SweepConfig
from qa_dist.sweeping.plan import Trial, read_plan
from qa_dist.sweeping.record import new_record, read_record, require_results_file, write_record
from qa_dist.sweeping.running import CALLS, Ledger, command, run_sweep
from qa_dist.sweeping.table import rows
from tests.unit.sweeping.inline import Inline
from tests.unit.trained import edit_json


@pytest.mark.parametrize(
    "start",
    [["/usr/bin/qa-dist", "sweep"], ["/site/qa_dist/sweep.py"], ["/site/qa_dist/cli.py", "sweep"], ["-c", "sweep"]],
)
def test_the_command_that_starts_a_sweep_again(start: list[str]) -> None:
    words = ["/data/sweeps/few.yaml", "--output_dir", "out", "--validation_file=/home/u/dev.json"]
    shown = command([*start, *words, "--train_file=hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"])
    assert shown[:6] == ["qa-dist", "sweep", "few.yaml", "--output_dir", "out", "--validation_file=dev.json"]
    assert "abcdefgh" not in shown[6]


def to_rung_or_end(trial: Trial, step: int | None) -> None:
    """As a trial of 60 steps whose score is its rank."""
    record = read_record(trial) or new_record(trial)
    figures = {"exact_match": 0.0, "f1": float(trial.options["lora_r"])}
    if step is None:
        write_record(trial, {**record, "status": "done", "step": 60, "final": figures})
        return
    rungs = [*record["rungs"], {"step": step, **figures}]
    write_record(trial, {**record, "status": "paused", "step": step, "rungs": rungs})


def test_a_new_rung_that_trials_have_passed_is_refused(tmp_path: Path) -> None:
    """They have no score there, and would be left out as if they had failed."""
    file = tmp_path / "few.yaml"

    def swept(rungs: str) -> list[tuple[str, int | None]]:
        file.write_text(f"seeds: [1]\ngrid: {{lora_r: [1, 2, 3, 4]}}\nrungs: {rungs}", encoding="utf-8")
        flags = ["--output_dir", str(tmp_path / "out"), "--dataset_name", "sample"]
        runner = Inline(body=to_rung_or_end)
        assert run_sweep(read_plan(file, flags, SweepConfig), runner, tmp_path / "sweep.json")
        return runner.done

    assert [step for _, step in swept("[20, 30]")] == [20] * 4 + [30] * 2 + [None]
    with pytest.raises(UserError, match="has passed step 10 when the sweep file had other rungs, and has no score"):
        swept("[10, 20, 30]")
    assert swept("[20, 30]") == []


def test_what_becomes_of_a_trial_behind_a_rung_changes_nothing_there(tmp_path: Path) -> None:
    """Another call would otherwise send another method on in the place of one that diverged later."""
    file = tmp_path / "few.yaml"
    file.write_text("seeds: [1]\ngrid: {lora_r: [1, 2, 3, 4, 5, 6]}\nrungs: [20, 30]", encoding="utf-8")
    plan = read_plan(file, ["--output_dir", str(tmp_path / "out"), "--dataset_name", "sample"], SweepConfig)

    def body(trial: Trial, step: int | None) -> None:
        to_rung_or_end(trial, step)
        if trial.options["lora_r"] == 4 and step == 30:
            write_record(
                trial, {**(read_record(trial) or {}), "status": "diverged", "rungs": [{"step": 20, "f1": 4.0}]}
            )

    said: list[str] = []
    runners = [Inline(body=body), Inline(body=body)]
    for runner in runners:
        assert run_sweep(plan, runner, tmp_path / "sweep.json", notice=said.append)
    assert runners[1].done == []
    decisions = [line for line in said if "go on" in line]
    assert decisions[:2] == decisions[2:]
    assert decisions[0].endswith("lora_r=4, lora_r=5, lora_r=6")
    shown = {row[0]: row[4] for row in rows(json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8")))}
    assert shown["lora_r=4 (after 20 steps; 1 diverged)"] == "4.00"


def test_a_trial_that_has_ended_before_a_rung_is_named(tmp_path: Path) -> None:
    file = tmp_path / "few.yaml"
    file.write_text("seeds: [1]\ngrid: {lora_r: [1, 2]}\nrungs: [20]", encoding="utf-8")
    plan = read_plan(file, ["--output_dir", str(tmp_path / "out"), "--dataset_name", "sample"], SweepConfig)
    said: list[str] = []
    runner = Inline(body=lambda trial, step: to_rung_or_end(trial, None if trial.options["lora_r"] == 2 else step))
    assert run_sweep(plan, runner, tmp_path / "sweep.json", notice=said.append)
    assert "not paused after 20 steps, and compared by the scores of their ends: lora_r=2-seed1" in said
    assert said[-1] == "after 20 steps, 1 of 2 methods go on: lora_r=2"


def test_results_of_trials_that_the_file_has_no_more_stay(tmp_path: Path) -> None:
    file, out = tmp_path / "few.yaml", tmp_path / "out"
    for ranks in ("[1, 2]", "[2, 3]"):
        file.write_text(f"seeds: [1]\ngrid: {{lora_r: {ranks}}}", encoding="utf-8")
        plan = read_plan(file, ["--output_dir", str(out), "--dataset_name", "sample"], SweepConfig)
        require_results_file(out / "sweep.json", plan, is_own=True)
        assert run_sweep(plan, Inline(body=to_rung_or_end), out / "sweep.json")
    held = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    assert [each["method"] for each in held["trials"]] == ["lora_r=2", "lora_r=3", "lora_r=1"]
    assert held["shared_options"]["lora_alpha"] == 16
    # Their folders are what is shown.
    shutil.rmtree(out / "trials" / "lora_r=1-seed1")
    assert run_sweep(plan, Inline(body=to_rung_or_end), out / "sweep.json")
    assert len(json.loads((out / "sweep.json").read_text(encoding="utf-8"))["trials"]) == 2


def test_options_that_were_added_since_do_not_make_an_earlier_trial_another(tmp_path: Path) -> None:
    file = tmp_path / "few.yaml"
    file.write_text(
        "trials: [{name: a}, {name: b, rdrop_alpha: 2, model_dropout: 0.1, answer_length_penalty: 0.1}]",
        encoding="utf-8",
    )
    plan = read_plan(file, ["--output_dir", str(tmp_path / "out"), "--dataset_name", "sample"], SweepConfig)
    for trial in plan.trials:
        record = new_record(trial)
        added = ("rdrop_alpha", "hang_timeout", "answer_length_penalty")
        without = {name: each for name, each in record["config"].items() if name not in added}
        write_record(trial, {**record, "config": without})
    assert read_record(plan.trials[0]) == new_record(plan.trials[0])
    with pytest.raises(UserError, match="was run with another answer_length_penalty, rdrop_alpha than the sweep file"):
        read_record(plan.trials[1])


def test_the_time_of_a_sweep_is_that_of_all_calls_whatever_their_files_of_results(tmp_path: Path) -> None:
    file, out = tmp_path / "few.yaml", tmp_path / "out"
    file.write_text("seeds: [1]\ngrid: {lora_r: [1, 2, 3]}", encoding="utf-8")
    plan = read_plan(file, ["--output_dir", str(out), "--dataset_name", "sample"], SweepConfig)

    def told(name: str) -> dict[str, Any]:
        run_sweep(plan, Inline(1, body=to_rung_or_end), tmp_path / name)
        found = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        return {key: found[key] for key in ("started", "command", "seconds")}

    first = told("first.json")
    edit_json(out / CALLS, seconds=1000.0, started="long ago")
    second = told("second.json")
    assert second["started"] == "long ago"
    assert second["seconds"] >= 1000 > first["seconds"]
    # As earlier versions left it.
    (out / CALLS).unlink()
    (tmp_path / "second.json").rename(out / "sweep.json")
    assert told("third.json")["seconds"] >= 1000
    # A search adds its points one by one, and the first of them may have left nothing.
    training = dataclasses.replace(plan.trials[0].config.training, output_dir=str(tmp_path / "nowhere"))
    config = dataclasses.replace(plan.trials[0].config, training=training)
    unbegun = dataclasses.replace(plan.trials[0], seed=9, config=config)
    ledger = Ledger(plan, tmp_path / "more.json", print)
    ledger.add([unbegun])
    ledger.add(plan.trials)
    ledger.note()
    assert json.loads((tmp_path / "more.json").read_text(encoding="utf-8"))["seconds"] >= 1000
    # What this call itself has brought to an end is no earlier one's.
    edit_json(out / CALLS, seconds=1000.0)
    fresh = Ledger(plan, tmp_path / "more.json", print)
    fresh.add([unbegun])
    fresh.records |= ledger.records
    fresh.add([unbegun])
    fresh.note()
    assert json.loads((tmp_path / "more.json").read_text(encoding="utf-8"))["seconds"] < 1000
    # Of another sweep it says nothing.
    edit_json(out / CALLS, sweep="another")
    (out / "sweep.json").unlink()
    assert told("fourth.json")["seconds"] < 1000
