"""Sides of the comparison of readers give the same answers, and what is printed of them is counted by hand."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qa_dist import bench
from qa_dist.benchmarking import answering, answering_sides
from tests.refusals import refusal
from tests.support.pipeline_fixture import make_model
from tests.tiny import tiny_squad


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "bert")


def test_what_is_printed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    squad = tiny_squad(tmp_path / "dev.json", 12, seed=3)
    calls: list[tuple[str, ...]] = []

    def in_this_process(words: list[str], **options: Any) -> Any:
        """What the process would print; haystack answers the first question otherwise."""
        calls.append(tuple(words[3:5]))
        assert options["env"]["OMP_NUM_THREADS"] == "1"
        side, *rest = words[3:]
        if side.startswith("exported"):
            return SimpleNamespace(returncode=0, stdout=printed["reader"], stderr="")
        if side == "haystack":
            answers = [*json.loads(printed["reader"])["answers"]]
            result = {**json.loads(printed["reader"]), "answers": ["nothing", *answers[1:]]}
            return SimpleNamespace(returncode=0, stdout=json.dumps(result), stderr="")
        with monkeypatch.context() as patch:
            lines: list[str] = []
            patch.setattr(answering_sides.sys, "stdout", SimpleNamespace(write=lines.append))
            answering_sides.main(side, *rest)
        printed[side] = lines[-1]
        return SimpleNamespace(returncode=0, stdout=lines[-1], stderr="")

    printed: dict[str, str] = {}
    monkeypatch.setattr(answering, "subprocess", SimpleNamespace(run=in_this_process))
    # Tests run beside others, and once is enough.
    monkeypatch.setattr(answering.neighbours, "undisturbed_result", lambda measure: measure())
    exported = tmp_path / "exported"
    (exported / "onnx").mkdir(parents=True)
    for name in ("model.onnx", "model_quantized.onnx"):
        (exported / "onnx" / name).touch()
    words = ["answering", "--model", str(model), "--validation_file", str(squad), "--num_questions", "6"]
    words += ["--repeats", "1", "--haystack_python", "/bin/sh", "--exported", str(exported)]
    assert bench.main(words) == 0
    figures = json.loads(capsys.readouterr().out)
    ours = [("reader", str(model)), ("registered", str(model)), ("loop", str(model))]
    others = [(name, str(exported)) for name in ("exported_float32", "exported_int8")]
    assert calls == [*ours, ("haystack", str(model)), *others]
    assert figures["num_questions"] == 6
    sides = figures["threads"]["1"]
    # The best sum of logits of all windows in both; a pipeline multiplies probabilities of each window.
    assert sides["reader"]["other_answers"] == sides["loop"]["other_answers"] == 0
    assert sides["loop"]["f1"] == sides["reader"]["f1"]
    assert sides["haystack"]["other_answers"] == 1
    assert all(side["questions_per_second"] > 0 and side["peak_memory_mib"] > 100 for side in sides.values())
    for name, line in printed.items():
        seconds = json.loads(line)["processor_seconds"]
        assert sides[name]["processor_ms_per_question"] == pytest.approx(1000 * seconds / 6)
        assert seconds > 0
    assert sides["reader"]["versions"]["torch"]


@pytest.mark.parametrize("count", [1, 7, 30, 35, 40, 99])
def test_questions_are_evenly_spread_over_the_file(tmp_path: Path, count: int) -> None:
    path = tiny_squad(tmp_path / "dev.json", 40, seed=1)
    every = [each.id for each in answering._chosen(str(path), 40)]
    places = [every.index(each.id) for each in answering._chosen(str(path), count)]
    assert len(places) == min(count, 40)
    steps = np.diff([*places, 40])
    assert places[0] == 0
    assert steps.min() >= 1
    assert steps.max() - steps.min() <= 1


def test_an_exported_model_is_read_in_its_precision_and_by_so_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool | None, int | None]] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(
        "qa_dist.Reader",
        lambda model, *, quantized, num_threads, **options: seen.append((quantized, num_threads)),
    )
    for side in ("reader", "exported_float32", "exported_int8"):
        answering_sides.SIDES[side]("anything")
    assert seen == [(None, None), (False, 2), (True, 2)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere"], "--model nowhere is not a folder; name one that holds a model"),
        (["--haystack_python", "nowhere"], "--haystack_python nowhere cannot be run"),
        (["--threads", "1,none"], "--threads 1,none are not numbers of 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    squad = tiny_squad(tmp_path / "dev.json", 3, seed=3)
    whole = ["answering", "--model", str(model), "--validation_file", str(squad), *words]
    assert message in refusal(bench.main, whole, capsys)
