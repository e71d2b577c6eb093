"""A sweep of tiny runs: halving by exact resume, a trial that diverges, and a sweep that was stopped and goes on."""

import contextlib
import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from qa_dist import sweep as sweep_command
from qa_dist.common.errors import UserError
from qa_dist.sweep import SweepConfig
from qa_dist.sweeping import table
from qa_dist.sweeping.plan import Plan, Trial, read_plan
from qa_dist.sweeping.record import read_record, score_at, write_record
from qa_dist.sweeping.running import run_sweep
from qa_dist.sweeping.searching import run_search
from qa_dist.sweeping.trials import run_trial
from tests.tiny import tiny_inputs
from tests.unit.sweeping.inline import Inline, forget_ranks

pytestmark = pytest.mark.integration

SWEEP = """
options:
  max_seq_length: 64
  doc_stride: 16
  global_batch_size: 4
  num_train_epochs: 1
  lora_dropout: 0.1
  keep: last
seeds: [1, 2]
trials:
  - {name: still, learning_rate: 1e-9}
  - {name: learns, learning_rate: 1e-2}
  - {name: diverges, learning_rate: 1e+30}
rungs: [2, 4]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    return {**tiny_inputs(folder, num_train=24, num_validation=6), "store_dir": str(folder / "store")}


def planned(inputs: dict[str, str], folder: Path, text: str = SWEEP, *flags: str) -> Plan:
    file = folder / "few.yaml"
    file.write_text(text, encoding="utf-8")
    words = [word for name, value in inputs.items() for word in (f"--{name}", value)]
    return read_plan(file, [*words, "--output_dir", str(folder / "out"), *flags], SweepConfig)


def test_a_sweep_halves_goes_on_where_it_was_stopped_and_repeats_nothing(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    plan = planned(inputs, tmp_path, SWEEP, "--metric_for_best_model", "loss")
    results = tmp_path / "sweep.json"
    said: list[str] = []
    runners = [Inline(3), Inline()]
    assert not run_sweep(plan, runners[0], results, notice=said.append)
    assert len(json.loads(results.read_text(encoding="utf-8"))["trials"]) == 3
    assert run_sweep(plan, runners[1], results, notice=said.append)
    assert [*runners[0].done, *runners[1].done] == [
        *((f"{name}-seed{seed}", 2) for name in ("still", "learns", "diverges") for seed in (1, 2)),
        *((f"{name}-seed{seed}", 4) for name in ("still", "learns") for seed in (1, 2)),
        *((f"learns-seed{seed}", None) for seed in (1, 2)),
    ]
    assert [line for line in said if "go on" in line] == [
        "after 2 steps, 2 of 3 methods go on: still, learns",
        "after 4 steps, 1 of 2 methods go on: learns",
    ]
    third = Inline()
    before = json.loads(results.read_text(encoding="utf-8"))
    assert run_sweep(plan, third, results)
    assert third.done == []
    # When it began and what it took are those of all calls.
    after = json.loads(results.read_text(encoding="utf-8"))
    assert {name: after[name] for name in ("started", "command", "trials")} == {
        name: before[name] for name in ("started", "command", "trials")
    }
    assert after["seconds"] >= before["seconds"] > 0

    # The winner, halted at two rungs, ends with the bytes of a run in one go.
    alone = planned(inputs, tmp_path, SWEEP.replace("rungs: [2, 4]", ""), "--eval_steps", "2", "--output_dir", "x")
    trial = next(trial for trial in plan.trials if trial.name == "learns-seed2")
    halted = (trial.folder / "adapter_model.safetensors").read_bytes()
    record: Any = read_record(trial)
    assert record["starts"] == 3
    assert record["resumed_at_steps"] == [2, 4]
    assert [rung["step"] for rung in record["rungs"]] == [2, 4]
    # All its steps are counted, not only those behind the last rung.
    lines = (trial.folder / "timings.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == record["num_steps"] == 6
    assert record["train_seconds"] == pytest.approx(sum(json.loads(line)["step_seconds"] for line in lines), abs=1e-3)
    still: Any = read_record(plan.trials[0])
    assert still["trainable_parameters"] == record["trainable_parameters"]
    assert min(still["peak_memory_bytes"], still["train_seconds"], still["saved_bytes"]) > 0
    forget_ranks()
    once = next(trial for trial in alone.trials if trial.name == "learns-seed2")
    assert run_trial(once_in(once, tmp_path / "once"), None)["resumed_at_steps"] == []
    assert (tmp_path / "once" / "adapter_model.safetensors").read_bytes() == halted

    sweep = json.loads(results.read_text(encoding="utf-8"))
    assert sweep["shared_options"]["lora_dropout"] == 0.1
    assert "learning_rate" not in sweep["shared_options"]
    # No folder of this machine.
    assert sweep["shared_options"]["train_file"] == "train.json"
    assert str(tmp_path) not in results.read_text(encoding="utf-8")
    assert [(trial["method"], trial["status"]) for trial in sweep["trials"]] == [
        *[("still", "paused")] * 2,
        *[("learns", "done")] * 2,
        *[("diverges", "diverged")] * 2,
    ]
    assert sweep["trials"][2]["saved_bytes"] == len(halted)
    assert [row[0] for row in table.rows(sweep)] == ["learns", "still (after 4 steps)", "diverges (2 diverged)"]


def test_a_trial_that_is_stopped_at_a_rung_has_the_score_of_the_rung(inputs: dict[str, str], tmp_path: Path) -> None:
    trial = planned(inputs, tmp_path).trials[2]
    log = trial.folder / "metrics.jsonl"

    def steps() -> list[int]:
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        return [line["step"] for line in map(json.loads, lines) if "loss" in line]

    forget_ranks()
    # Asked to stop in the last step before the rung: its evaluation is left for the next start.
    record = run_trial(trial, 2, asked_to_stop=lambda: signal.SIGTERM if steps() else None)
    assert (record["status"], record["step"], steps()) == ("stopped", 2, [1, 2])
    forget_ranks()
    record = run_trial(trial, 2)
    assert (record["status"], record["step"], steps()) == ("paused", 2, [1, 2])
    assert score_at(record, 2, "f1") is not None
    # Killed when the checkpoint of the rung was on the disk, and the record was not.
    write_record(trial, {**record, "status": "stopped", "step": 0, "rungs": []})
    forget_ranks()
    again = run_trial(trial, 2)
    assert (again["status"], steps()) == ("paused", [1, 2])
    names = record["rungs"][0].keys() - {"answer_normalization"}
    assert [{name: rung[name] for name in names} for rung in again["rungs"]] == [
        {name: record["rungs"][0][name] for name in names}
    ]


def once_in(trial: Trial, folder: Path) -> Trial:
    training = dataclasses.replace(trial.config.training, output_dir=str(folder))
    return dataclasses.replace(trial, config=dataclasses.replace(trial.config, training=training))


def test_a_trial_that_cannot_run_is_counted_and_another_sweep_may_not_have_its_folder(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    text = "options: {max_seq_length: 64, doc_stride: 16}\ntrials:\n  - {name: a, lora_target_modules: [nothing]}"
    plan = planned(inputs, tmp_path, text)
    assert run_sweep(plan, Inline(), tmp_path / "sweep.json")
    (trial,) = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))["trials"]
    assert trial["status"] == "failed"
    assert trial["error"].startswith("--lora_target_modules nothing: no such linear layer")
    # What failed before its first step may be mended in the sweep file.
    mended = text.replace("[nothing]", "[attention]")
    assert run_sweep(planned(inputs, tmp_path, mended), Inline(), tmp_path / "sweep.json")
    (trial,) = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))["trials"]
    assert (trial["status"], trial["error"]) == ("done", None)
    other = planned(inputs, tmp_path, mended, "--lora_r", "3")
    done = read_record(planned(inputs, tmp_path, mended).trials[0])
    assert done is not None
    # Also where its process died behind a step, of which there may be a checkpoint.
    write_record(other.trials[0], {**done, "status": "failed", "step": 0, "rungs": []})
    with pytest.raises(UserError, match="was run with another lora_r than the sweep file says now"):
        run_sweep(other, Inline(), tmp_path / "sweep.json")


def test_trials_that_are_not_asked_for_are_kept(inputs: dict[str, str], tmp_path: Path) -> None:
    text = "options: {max_seq_length: 64, doc_stride: 16, max_train_steps: 1}\ngrid: {lora_r: [2, 4]}"
    plan = planned(inputs, tmp_path, text)
    for only, done in (("lora_r=2", 1), ("lora_r=4", 2)):
        runner = Inline()
        assert run_sweep(dataclasses.replace(plan, only=(only,)), runner, tmp_path / "sweep.json")
        assert runner.done == [(f"{only}-seed42", None)]
        sweep = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
        assert (len(sweep["trials"]), sweep["num_trials"]) == (done, 2)


def test_a_sweep_without_a_result_says_so(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep_command, "_runner", lambda options: contextlib.nullcontext(Inline()))
    file = tmp_path / "few.yaml"
    words = [word for name, value in inputs.items() for word in (f"--{name}", value)]
    words = [str(file), *words, "--max_seq_length", "64", "--doc_stride", "16", "--max_train_steps", "1"]
    for targets, code in (("nothing", 1), ("attention", 0)):
        file.write_text(f"trials: [{{name: a, lora_target_modules: [{targets}]}}]", encoding="utf-8")
        assert sweep_command.main([*words, "--output_dir", str(tmp_path / "out")]) == code
        assert ("error: no trial came to its end" in capsys.readouterr().err) == bool(code)


def test_the_table_has_mean_and_deviation_and_says_what_is_missing() -> None:
    def trial(method: str, seed: int, f1: float, **more: Any) -> dict[str, Any]:
        done = {"status": "done", "final": {"exact_match": f1 - 10, "f1": f1}, "rungs": [], "saved_bytes": 2**20}
        facts = {"trainable_parameters": 1200, "peak_memory_bytes": 3 * 2**20, "phase_seconds": {"train": 90}}
        return {"method": method, "seed": seed, **done, **facts, **more}

    stopped = {"status": "stopped", "final": None, "rungs": []}
    sweep = {"trials": [trial("a", 1, 70.0), trial("b", 1, 71.0), trial("b", 2, 73.0), trial("a", 2, 0.0, **stopped)]}
    assert table.rows(sweep) == [
        ["b", "1,200", "2", "62.00 ± 1.41", "72.00 ± 1.41", "1.50", "3", "1.00"],
        ["a (1 stopped)", "1,200", "1", "60.00", "70.00", "1.50", "3", "1.00"],
    ]
    assert table.markdown(sweep).splitlines()[2].startswith("| b | 1,200 | 2 | 62.00 ± 1.41 |")
    assert table.text(sweep).splitlines()[1].startswith("b               ")


@pytest.mark.parametrize(
    "options",
    [
        "{lora_bias: all, layer_decay: 0.9}",
        "{use_dora: true, keep: best}",
        "{tuning: full, layer_decay: 0.8}",
    ],
)
def test_every_method_goes_on_from_a_rung_with_the_same_bytes(
    inputs: dict[str, str], tmp_path: Path, options: str
) -> None:
    text = "options: {max_seq_length: 64, doc_stride: 16, global_batch_size: 4, num_train_epochs: 1}\ntrials:\n  - "
    text += options.replace("{", "{name: a, ")
    files = []
    for rungs, flags in (("rungs: [2, 4]", []), ("", ["--eval_steps", "2"])):
        folder = tmp_path / str(len(files))
        folder.mkdir()
        plan = planned(inputs, folder, f"{text}\n{rungs}", *flags)
        assert run_sweep(plan, Inline(), folder / "sweep.json")
        (saved,) = (plan.trials[0].folder).glob("*model.safetensors")
        files.append(saved.read_bytes())
        record: Any = read_record(plan.trials[0])
        assert record["resumed_at_steps"] == ([2, 4] if rungs else [])
        assert record["num_steps"] == 6
    assert files[0] == files[1]


def test_trials_of_a_search_end_as_if_they_had_not_stopped(inputs: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the sweep extra is not installed")
    text = """
options: {max_seq_length: 64, doc_stride: 16, global_batch_size: 4, num_train_epochs: 1, lora_dropout: 0.1, keep: last}
search: {trials: 1, pruner: PRUNER, parameters: {learning_rate: {low: 1e-3, high: 1e-2}}}
"""
    ends = {}
    for name, pruner, rungs in (
        # Whatever comes first is pruned.
        ("pruned", "{name: halving, bootstrap_count: 1}", "rungs: [2, 4]"),
        ("halted", "none", "rungs: [2, 4]"),
        ("whole", "none", ""),
    ):
        asked = text.replace("PRUNER", pruner)
        (tmp_path / name).mkdir()
        plan = planned(inputs, tmp_path / name, asked + rungs)
        assert run_search(plan, Inline(), tmp_path / name / "sweep.json")
        (folder,) = (tmp_path / name / "out" / "trials").iterdir()
        ends[name] = (folder, json.loads((folder / "trial.json").read_text(encoding="utf-8")))
    folder, record = ends["pruned"]
    assert (record["status"], record["step"], record["final"]) == ("paused", 2, None)
    assert any((folder / "checkpoints").iterdir())
    assert not (folder / "adapter_model.safetensors").exists()
    assert ends["halted"][1]["resumed_at_steps"] == [2, 4]
    adapters = [(ends[name][0] / "adapter_model.safetensors").read_bytes() for name in ("halted", "whole")]
    assert adapters[0] == adapters[1]
