"""Trials as jobs: what is submitted, waited for, found again and cancelled; Slurm is played by this process."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qa_dist import sweep
from qa_dist.common.errors import ConfigError, DataError, UserError
from qa_dist.config.options import RunConfig, TrainingConfig
from qa_dist.sweep import SweepConfig
from qa_dist.sweeping import jobs, trials
from qa_dist.sweeping.jobs import LOG, SlurmJobs, job_name, read_task, write_task
from qa_dist.sweeping.plan import Plan, Trial, read_plan
from qa_dist.sweeping.record import new_record, read_record, write_record
from qa_dist.sweeping.running import in_order, run_sweep
from tests.tiny import tiny_inputs
from tests.unit.sweeping.inline import forget_ranks

ROOT = Path(__file__).parents[3]


def trial(folder: Path, method: str) -> Trial:
    return Trial(method, 1, {}, RunConfig(training=TrainingConfig(output_dir=str(folder / method))))


class Slurm:
    """Takes jobs, and ends the first one of the queue, which has done what its trial's method says, at every look."""

    def __init__(self) -> None:
        self.submitted: list[Sequence[str]] = []
        self.variables: list[Mapping[str, str]] = []
        self.cancelled: list[str] = []
        self.queue: dict[str, tuple[str, Path]] = {}
        self.longest = 0
        self.silences = 0

    def __call__(self, words: Sequence[str], variables: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
        said = getattr(self, words[0])(words, variables)
        code = 1 if said.startswith("error") else 0
        return subprocess.CompletedProcess(words, code, "" if code else said, said if code else "")

    def sbatch(self, words: Sequence[str], variables: Mapping[str, str]) -> str:
        if "--bad" in words:
            return "error: invalid option --bad"
        self.submitted.append(words)
        self.variables.append(variables)
        number = str(100 + len(self.submitted))
        self.queue[words[words.index("--job-name") + 1]] = number, Path(words[-1])
        self.longest = max(self.longest, len(self.queue))
        return f"{number}\n"

    def squeue(self, words: Sequence[str], variables: Mapping[str, str]) -> str:
        if self.silences:
            self.silences -= 1
            return "error: Socket timed out"
        if self.queue:
            name = next(iter(self.queue))
            if end(self.queue[name][1]):
                del self.queue[name]
        return "".join(f"{number}|{name}\n" for name, (number, _) in self.queue.items())

    def scancel(self, words: Sequence[str], variables: Mapping[str, str]) -> str:
        self.cancelled += words[1:]
        for name, (number, task) in list(self.queue.items()):
            if number in words[1:]:
                each, _ = read_task(task)
                write_record(each, {**new_record(each), "starts": 1})
                del self.queue[name]
        return ""


def end(task: Path) -> bool:
    """Do what a job does; whether it leaves the queue."""
    each, step = read_task(task)
    record = read_record(each) or new_record(each)
    if each.method == "is cancelled":
        return True
    each.folder.joinpath(LOG).write_text("begun", encoding="utf-8")
    record["starts"] += 1
    if each.method == "waits":
        return False
    if each.method == "dies":
        return True
    if each.method == "is queued again" and record["starts"] < 3:
        write_record(each, record)
        return False
    if each.method != "is stopped":
        record |= {"status": "done", "step": 9} if step is None else {"status": "paused", "step": step}
    write_record(each, record)
    return True


def run(slurm: Slurm, trials: Sequence[Trial], most: int = 2, **more: Any) -> tuple[bool, list[str]]:
    ended: list[str] = []
    is_over = more.pop("is_over", lambda ended: False)
    jobs = SlurmJobs(most, more.pop("options", ()), call=slurm, poll_seconds=0)
    tasks = in_order((each, None) for each in trials)
    is_done = jobs.run(tasks, is_over=lambda: is_over(ended), ended=lambda each: ended.append(each.method), **more)
    return is_done, ended


def test_a_task_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(
        "config: squad_minilm_small\ntrials: [{name: a b, tuning: full, layer_decay: 0.8}]", encoding="utf-8"
    )
    plan = read_plan(file, ["--output_dir", str(tmp_path / "out"), "--dataset_name", "sample"], SweepConfig)
    slurm = Slurm()
    assert run(slurm, plan.trials) == (True, ["a b"])
    assert read_task(plan.trials[0].folder / "task.json") == (plan.trials[0], None)
    (plan.trials[0].folder / "task.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is no task of this version"):
        read_task(plan.trials[0].folder / "task.json")


def test_a_record_may_name_options_that_were_taken_out_if_they_were_off(tmp_path: Path) -> None:
    each = trial(tmp_path, "a")
    record = new_record(each)
    off = {"loraplus_lr_ratio": None, "head_lr_ratio": None, "ema_decay": None, "init_lora_weights": "default"}
    write_record(each, {**record, "config": {**record["config"], **off}})
    assert read_record(each) == record
    write_record(each, {**record, "config": {**record["config"], **off, "ema_decay": 0.5}})
    with pytest.raises(UserError, match="was run with another ema_decay than the sweep file says now"):
        read_record(each)


def test_every_trial_is_a_job_of_the_script_and_so_many_wait_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHON", raising=False)
    trials = [trial(tmp_path, method) for method in ("a", "is queued again", "dies", "b", "100 % c")]
    slurm = Slurm()
    slurm.silences = 3
    assert run(slurm, trials, options=["--time", "60"]) == (True, ["a", "is queued again", "dies", "b", "100 % c"])
    assert slurm.longest == 2
    words, folder = slurm.submitted[0], trials[0].folder
    assert words[:5] == ["sbatch", "--parsable", "--export=ALL", "--job-name", job_name(trials[0])]
    assert words[5:] == [
        *("--output", str(folder / "log.txt"), "--time", "60"),
        *(str(ROOT / "launch" / "slurm.sh"), str(folder / "task.json")),
    ]
    assert slurm.submitted[4][6].endswith("/100 %% c/log.txt")
    assert slurm.variables[0] == {
        "MODULE": "qa_dist.sweep",
        "LOG_DIR": str(folder / "logs"),
        "PYTHON": sys.executable,
    }
    records = [read_record(each) or {} for each in trials]
    assert [record["status"] for record in records] == ["done", "done", "failed", "done", "done"]
    assert records[2]["error"] == f"its job 103 ended without a result; {trials[2].folder}/log.txt has its last words"


def test_a_killed_sweep_waits_for_the_jobs_that_are_still_there(tmp_path: Path) -> None:
    trials = [trial(tmp_path, method) for method in ("waits", "b")]
    slurm = Slurm()
    jobs = SlurmJobs(2, call=slurm, poll_seconds=0)

    def kill(each: Trial) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.run(in_order([(trials[1], None), (trials[0], None)]), is_over=lambda: False, ended=kill)
    assert [words[4] for words in slurm.submitted] == [job_name(trials[1]), job_name(trials[0])]
    # The one that waits is not submitted again.
    looks = []
    is_done, ended = run(slurm, [trials[0]], is_over=lambda ended: looks.append(0) or len(looks) > 3)
    assert (is_done, len(slurm.submitted), slurm.cancelled) == (False, 2, ["102"])
    assert ended == ["waits"]


def test_a_job_that_is_still_ending_is_not_taken_for_that_of_the_next_rung(tmp_path: Path) -> None:
    class Ending(Slurm):
        """Shows a job of the rung before, which has done its work, for two looks more."""

        looks = 2

        def squeue(self, words: Sequence[str], variables: Mapping[str, str]) -> str:
            self.looks -= 1
            ending = f"77|{job_name(one)}\n" if self.looks >= 0 else ""
            return ending or super().squeue(words, variables)

    one = trial(tmp_path, "a")
    write_task(one, 100)
    write_record(one, {**new_record(one), "status": "paused", "step": 100, "rungs": [{"step": 100}]})
    slurm = Ending()
    assert run(slurm, [one]) == (True, ["a"])
    assert len(slurm.submitted) == 1
    assert (read_record(one) or {})["status"] == "done"


def test_a_sweep_that_is_stopped_cancels_its_jobs_and_one_that_loses_a_job_is_not_done(tmp_path: Path) -> None:
    slurm = Slurm()
    trials = [trial(tmp_path, method) for method in ("a", "waits", "never")]
    assert run(slurm, trials, is_over=lambda ended: "a" in ended) == (False, ["a", "waits"])
    assert slurm.cancelled == ["102"]
    assert not trials[2].folder.exists()
    assert run(Slurm(), [trial(tmp_path, "is stopped"), trial(tmp_path, "b")]) == (False, ["is stopped", "b"])


def test_a_job_that_is_cancelled_in_the_queue_is_submitted_again_by_the_next_call(tmp_path: Path) -> None:
    new, paused = (trial(tmp_path / name, "is cancelled") for name in ("new", "paused"))
    write_record(paused, {**new_record(paused), "status": "paused", "step": 3, "starts": 1})
    paused.folder.joinpath(LOG).write_text("of the rung before", encoding="utf-8")
    assert run(Slurm(), [new, paused]) == (False, ["is cancelled", "is cancelled"])
    assert read_record(new) is None
    assert (read_record(paused) or {})["status"] == "paused"


def test_a_job_that_dies_after_another_was_stopped_is_a_failed_trial(tmp_path: Path) -> None:
    one = trial(tmp_path, "dies")
    write_record(one, {**new_record(one), "starts": 1})
    assert run(Slurm(), [one]) == (True, ["dies"])
    assert (read_record(one) or {})["error"].startswith("its job 101 ended without a result")


def test_a_job_of_other_options_is_not_taken_for_that_of_the_sweep(tmp_path: Path) -> None:
    old = trial(tmp_path, "waits")
    slurm = Slurm()
    slurm.queue[job_name(old)] = "55", write_task(old, None)
    training = dataclasses.replace(old.config.training, learning_rate=0.125)
    new = dataclasses.replace(old, config=dataclasses.replace(old.config, training=training))
    with pytest.raises(UserError, match=r"job 55 in the queue is trial waits-seed1 with other options.*; scancel 55"):
        run(slurm, [new])
    assert slurm.submitted == []


def test_what_slurm_refuses_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match="sbatch took no job for a-seed1: error: invalid option --bad; see --sbatch_opt"
    ):
        run(Slurm(), [trial(tmp_path, "a")], options=["--bad"])
    slurm = Slurm()
    slurm.scancel = lambda words, variables: "error: Access denied"  # type: ignore[method-assign]
    monkeypatch.setattr(jobs, "_SECONDS_TO_STOP", 0.0)
    with pytest.raises(UserError, match="scancel did not end 101: error: Access denied; cancel them by hand"):
        run(slurm, [trial(tmp_path, "waits")], is_over=lambda ended: bool(slurm.submitted))
    # One that has ended in the meantime is none that it did not end.
    slurm = Slurm()
    slurm.scancel = lambda words, variables: "error: Job is completing"  # type: ignore[method-assign]
    assert run(slurm, [trial(tmp_path, "c")], is_over=lambda ended: bool(slurm.submitted)) == (False, ["c"])
    slurm = Slurm()
    slurm.silences = 99
    with pytest.raises(UserError, match="squeue does not answer: error: Socket timed out"):
        run(slurm, [trial(tmp_path, "a")])
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="--launcher slurm needs sbatch, squeue, scancel, which are not here"):
        SlurmJobs(1)


def test_the_command_refuses_what_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("grid: {lora_r: [1, 2]}", encoding="utf-8")
    words = [str(file), "--output_dir", str(tmp_path / "out"), "--dataset_name", "sample"]
    for more, sentence in (
        (["--sbatch_options", "--time 3"], "add --launcher slurm, or drop them"),
        (["--launcher", "slurm", "--sbatch_options", "'--time"], "No closing quotation; write them as in a shell"),
    ):
        assert sweep.main([*words, *more]) == 2
        assert sentence in capsys.readouterr().err
    assert sweep.main([str(tmp_path / "task.json"), "--seed", "3"]) == 2
    assert "is one trial with all its options; drop --seed" in capsys.readouterr().err
    assert sweep.main([str(tmp_path / "task.json")]) == 2
    assert "start the sweep again, which writes it anew" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert sweep.main(words) == 2
    assert "a sweep starts its trials itself" in capsys.readouterr().err
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_TASK_PID", str(os.getpid()))
    for name, value in (("STEP_NUM_TASKS", "2"), ("STEP_NODELIST", "n1"), ("PROCID", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert sweep.main(words) == 2
    assert "a sweep starts its trials itself" in capsys.readouterr().err, "every task of srun would run it"


@pytest.mark.parametrize(
    "word",
    ["--job-name=mine", "--job-name", "-Jmine", "--output", "-o", "--clusters=a", "-M", "--export=NONE", "-a1-3"],
)
def test_options_by_which_jobs_are_found_again_are_the_sweeps(word: str) -> None:
    with pytest.raises(ConfigError, match=f"--sbatch_options has {word}, but a sweep finds its jobs by their names"):
        SlurmJobs(1, ["--time", "3", word], call=Slurm())


@pytest.mark.parametrize("words", [["--export=ALL,HF_HOME=/scratch"], ["--export", "ALL"]])
def test_jobs_may_have_more_in_their_environment(words: list[str], tmp_path: Path) -> None:
    slurm = Slurm()
    assert run(slurm, [trial(tmp_path, "a")], options=words) == (True, ["a"])
    assert slurm.submitted[0][7 : 7 + len(words)] == words


def test_what_only_another_rank_finds_is_said_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise DataError("train.json does not exist")

    monkeypatch.setattr(trials, "train", fails)
    each = trial(tmp_path, "a")
    assert trials.run_trial(each, None)["error"] == "train.json does not exist"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DataError, match="does not exist"):
        trials.run_trial(each, None)


def planned(folder: Path, flags: Sequence[str]) -> Plan:
    file = folder / "some.yaml"
    options = (
        "{max_seq_length: 64, doc_stride: 16, global_batch_size: 4, num_train_epochs: 1, lora_dropout: 0.1, keep: last}"
    )
    trials = "[{name: learns, learning_rate: 1e-2}, {name: diverges, learning_rate: 1e+30}]"
    file.write_text(f"options: {options}\ntrials: {trials}\nrungs: [2]", encoding="utf-8")
    return read_plan(file, flags, SweepConfig)


def test_a_job_runs_its_trial_to_the_rung_and_the_next_one_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a job calls, `qa-dist sweep FOLDER/task.json`, here in this process."""
    exits = tmp_path / "exit_code"
    monkeypatch.setenv("QA_DIST_EXIT_FILE", str(exits))
    codes = []

    class Computing(Slurm):
        def squeue(self, words: Sequence[str], variables: Mapping[str, str]) -> str:
            for _, task in self.queue.values():
                forget_ranks()
                codes.append(sweep.main([str(task)]))
                assert exits.read_text() == f"{codes[-1]}\n"
            self.queue = {}
            return ""

    inputs = {**tiny_inputs(tmp_path, num_train=24, num_validation=6), "store_dir": str(tmp_path / "store")}
    flags = [word for name, value in inputs.items() for word in (f"--{name}", value)]
    slurm = Computing()
    plan = planned(tmp_path, [*flags, "--output_dir", str(tmp_path / "out")])
    assert run_sweep(plan, SlurmJobs(1, call=slurm, poll_seconds=0), tmp_path / "sweep.json")
    assert codes == [0, 1, 0]
    learns, diverges = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))["trials"]
    assert (learns["status"], learns["starts"], learns["resumed_at_steps"]) == ("done", 2, [2])
    assert diverges["status"] == "diverged"
