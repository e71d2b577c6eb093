"""`qa-dist report`: what the page says of runs that ended, go on, were killed or are compared, and what is refused."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the bench extra is not installed")

from qa_dist import analyze
from qa_dist.config.options import RunConfig
from qa_dist.report import main
from qa_dist.reporting import drawings
from qa_dist.reporting.report_page import _slicings
from qa_dist.reporting.run_folders import read_runs
from tests.refusals import refusal
from tests.support.html import Page
from tests.unit.answering.xss import CORPUS
from tests.unit.data_fixtures import FIXTURES
from tests.unit.trained import some_calibration

Capture = pytest.CaptureFixture[str]

FEW = ("--resamples", "100")


def write(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def step(number: int, **figures: Any) -> str:
    usual = {"epoch": 1.0, "loss": 1.5, "learning_rate": 1e-3, "grad_norm": 0.5, "num_features": 8, "num_tokens": 100}
    return json.dumps({"step": number, **usual, **figures}) + "\n"


def run_folder(folder: Path, **options: Any) -> Path:
    """A run as far as a report needs it; JSON is YAML too."""
    folder.mkdir(parents=True)
    write(folder / "config.yaml", {**RunConfig().flat(), "output_dir": str(folder), **options})
    return folder


def squad(path: Path, questions: dict[str, tuple[str, str, str]]) -> str:
    """A file of questions by id: context, question and answer."""
    paragraphs = [
        {
            "context": context,
            "qas": [{"id": key, "question": asked, "answers": [{"text": text, "answer_start": context.index(text)}]}],
        }
        for key, (context, asked, text) in questions.items()
    ]
    return write(path, {"version": "1.1", "data": [{"title": "A title", "paragraphs": paragraphs}]})


def reported(tmp_path: Path, *words: str | Path) -> Page:
    output = tmp_path / "report.html"
    assert main([*map(str, words), "--output", str(output), *FEW]) == 0
    return Page(output.read_text(encoding="utf-8"))


@pytest.fixture
def _nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take most of a page's time; here they have their place and name alone."""
    monkeypatch.setattr(drawings, "_svg", lambda figure, axes, label: f'<svg aria-label="{label}"></svg>')


WITHOUT_DRAWING = pytest.mark.usefixtures("_nothing_drawn")


def test_the_page_of_a_run(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    run = trained / "adapter"
    page = reported(tmp_path, run)
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'report.html'}\n"
    assert list(page.parts) == ["", "run", "curves", "cost", "slices", "mistakes", "calibration", "answers"]
    # The figures are those of the analysis and of the run's own files.
    assert analyze.main([str(run), "--references", str(trained / "train.json"), "--json", *FEW]) == 0
    found = json.loads(capsys.readouterr().out)
    f1 = found["f1"]
    assert f"{f1['value']:.2f}" in page.parts[""]
    assert f"{f1['low']:.2f} to {f1['high']:.2f}" in page.parts[""]
    for each in found["slices"]:
        assert f"{each['f1']['value']:.2f}" in page.parts["slices"]
        assert each["value"] in page.parts["slices"]
    assert {"Windows windows of", "Answer length words of"} <= set(re.findall(r"[A-Z][\w ]+ of", page.parts["slices"]))
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert f"Expected error {found['calibration']['before']['ece']:.2f} points" in page.parts["calibration"]
    for words in ("global_batch_size", "max_seq_length", record["versions"]["torch"], record["hardware"]["processor"]):
        assert words in page.parts["run"]
    for phase in record["seconds"]:
        assert phase in page.parts["cost"]
    assert f"{record['peak_memory_bytes_per_rank'][0] / 2**30:.2f} GiB" in page.parts["cost"]
    # Loss, scores, learning rate, gradient norm, tokens of a step and of a second, and one reliability diagram; all
    # charts have a name.
    assert page.elements["svg"] == 7
    assert sum(name == "aria-label" and "over" in str(value) for name, value in page.attributes) == 7
    assert page.elements["script"] == 0
    wrong = sum(each["n"] for each in found["mistakes"] if each["kind"] != "right_text_elsewhere")
    assert page.elements["article"] == wrong + found["num_questions"]


def test_nothing_is_loaded_and_the_same_runs_give_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    page = reported(tmp_path, trained / "adapter")
    first = (tmp_path / "report.html").read_bytes()
    reported(tmp_path, trained / "adapter")
    assert (tmp_path / "report.html").read_bytes() == first
    for name, value in page.attributes:
        if name in ("href", "src", "xlink:href"):
            assert str(value).startswith(("#", "data:")), value
        assert not name.startswith("on")
    assert b"@import" not in first
    assert set(re.findall(rb"url\((.)", first)) == {b"#"}
    ids = re.findall(rb' id="([^"]*)"', first)
    # Clip paths are named by their content, and may be there twice with the same.
    assert {key for key, times in Counter(ids).items() if times > 1 and not key.startswith((b"p", b"m"))} == set()
    # A colour of its own would be lost on the dark page.
    assert not re.findall(rb"(?:stroke|fill): #", first)


@WITHOUT_DRAWING
def test_a_run_of_a_version_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FIXTURES / "earlier", tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    page = reported(tmp_path, "run")
    metrics = json.loads(Path("run/metrics.json").read_text(encoding="utf-8"))
    assert f"{metrics['f1']:.2f}" in page.parts[""]
    assert "Has answer" in page.parts["slices"]
    assert "The best null threshold on these questions" in page.parts["calibration"]
    assert "there is no answer" in page.parts["answers"]


@WITHOUT_DRAWING
def test_a_run_that_goes_on_or_was_killed(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "cut"
    shutil.copytree(trained / "adapter", run)
    for name in ("run.json", "predictions.json", "metrics.json", "nbest.json"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "los')
    page = reported(tmp_path, run)
    said = capsys.readouterr().err
    assert "going on, or cut off after step 2" in page.parts[""]
    for note in ("There is no run.json", "metrics.jsonl: 1 line cannot be read", "There is no predictions.json"):
        assert note in page.parts[""]
        assert f"qa_dist.report: note: cut: {note}" in said
    assert page.elements["svg"] >= 4
    assert list(page.parts) == ["", "run", "curves"]
    # Even the least of a run is shown.
    (run / "metrics.jsonl").write_bytes(b"")
    (run / "config.yaml").unlink()
    page = reported(tmp_path, run)
    assert page.elements["svg"] == 0
    for note in ("metrics.jsonl has no line about a step", "There is no config.yaml"):
        assert note in page.parts[""]


@WITHOUT_DRAWING
def test_lines_that_are_no_figures(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    lines = [
        *("[]\n", '{"step": "1"}\n', '{"step": true}\n', "\xff\n", "[" * 100_000 + "\n", "\n"),
        *(step(1, grad_norm=None), step(2, loss="x", grad_norm=float("inf")), step(3, num_tokens=10**400)),
        '{"step": 3, "eval_loss": null, "eval_f1": "x"}\n',
    ]
    (run / "metrics.jsonl").write_text("".join(lines), encoding="latin-1")
    page = reported(tmp_path, run)
    assert "metrics.jsonl: 5 lines cannot be read" in page.parts[""]
    # Loss, learning rate, gradient norm and tokens: each has at least one figure.
    assert page.elements["svg"] == 4


@WITHOUT_DRAWING
def test_throughput_and_token_balance_are_over_the_steps_that_were_timed(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    (run / "metrics.jsonl").write_text("".join(step(number, num_tokens=900) for number in range(1, 7)))
    timed = [
        {"step": number, "step_seconds": 0.5 * number, "most_tokens": 480, "world_size": 2 if number > 2 else 1}
        for number in (1, 2, 3, 4)
    ]
    lines = [json.dumps(each) + "\n" for each in (*timed, [], {"step": "5"}, {"step": 9, "step_seconds": 1})]
    (run / "timings.jsonl").write_text("".join([*lines, '{"step": 5, "step_seconds": 0}\n', '{"step": 6, "st']))
    (found,) = read_runs([run])
    assert found.steps["step_seconds"][:4].tolist() == [0.5, 1.0, 1.5, 2.0]
    assert np.isnan(found.steps["step_seconds"][4:]).all()
    page = reported(tmp_path, run)
    for title in ("Real tokens a second, all ranks", "Tokens of the rank with the most, over the mean"):
        assert title in page.parts["curves"]
    assert page.elements["svg"] == 4 + 2
    shutil.rmtree(run)
    run_folder(run)
    (run / "metrics.jsonl").write_text(step(1))
    assert reported(tmp_path, run).elements["svg"] == 4, "a run of a version before has no times"


@WITHOUT_DRAWING
def test_times_of_a_resumed_run_are_those_of_its_last_process(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    (run / "metrics.jsonl").write_text(step(1) + step(2), encoding="utf-8")
    for resumed, said in (([], "12 s in all"), ([1], "in its last process")):
        write(run / "run.json", {"num_steps": 2, "seconds": {"train": 9, "data": 3}, "resumed_at_steps": resumed})
        text = " ".join(reported(tmp_path, run).text.split())
        assert said in text
        assert ("of resumed runs, in their last process" in text) == bool(resumed)


def test_slices_have_the_number_of_questions_of_each_run() -> None:
    found = {
        number: {"slices": [{"by": "windows", "value": value, "n": n} for value, n in sizes.items()]}
        for number, sizes in enumerate(({"1": 6, "3": 1}, {"1": 2, "2": 4, "3": 1}))
    }
    (slicing,) = _slicings(found)
    assert [row["value"] for row in slicing["rows"]] == ["1", "2", "3"]
    assert [{number: each["n"] for number, each in row["scores"].items()} for row in slicing["rows"]] == [
        {0: 6, 1: 2},
        {1: 4},
        {0: 1, 1: 1},
    ]


@WITHOUT_DRAWING
def test_what_is_tuned_for_a_model_is_said(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "run")
    tuned = dataclasses.replace(some_calibration(2.5), tuned_on={"data": "<b>dev.json", "part": "all"})
    tuned.write(tmp_path / "run")
    page = reported(tmp_path, tmp_path / "run")
    assert "temperature 2.500, fitted on questions of <b>dev.json" in page.parts["calibration"]


def test_a_single_step_has_no_parts_of_steps_around_it(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    (run / "metrics.jsonl").write_text(step(7), encoding="utf-8")
    reported(tmp_path, run)
    charts = re.findall("<svg.*?</svg>", (tmp_path / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    for chart in charts:
        steps = re.findall(r"text-anchor: middle[^>]*>([^<]*)<", chart)
        assert steps == ["6", "7", "8"]
    assert len(charts) == 4


def test_many_steps_are_few_points(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    lines = [step(number, loss=1 + number % 7 / 10 + 50 * (number == 777)) for number in range(1, 20_001)]
    (run / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    page = reported(tmp_path, run)
    paths = [str(value) for name, value in page.attributes if name == "d"]
    assert max(path.count("L") for path in paths) <= 400
    assert (tmp_path / "report.html").stat().st_size < 150_000
    assert "20,000" in page.parts[""]


@WITHOUT_DRAWING
def test_questions_by_the_thousand_make_no_larger_page(tmp_path: Path) -> None:
    sizes = []
    for number in (100, 3000):
        contexts = {
            f"q{at}": (f"Tower {at} of the town is {at} feet high.", "How high?", f"{at}") for at in range(number)
        }
        data = squad(tmp_path / "dev.json", contexts)
        run = run_folder(tmp_path / f"run{number}", validation_file=data)
        write(run / "predictions.json", dict.fromkeys(contexts, "Tower"))
        page = reported(tmp_path, run)
        assert page.elements["article"] == 70
        sizes.append((tmp_path / "report.html").stat().st_size)
    assert sizes[1] < 1.05 * sizes[0]


@WITHOUT_DRAWING
def test_the_worst_answers_come_first(tmp_path: Path) -> None:
    context = "Ada Kerrow built the mill in 1911. It burned."
    questions = {key: (context, f"Question {key}?", "Ada Kerrow") for key in ("right", "half", "shy", "sure")}
    data = squad(tmp_path / "dev.json", questions)
    run = run_folder(tmp_path / "run", validation_file=data)
    texts = {"right": "Ada Kerrow", "half": "Ada", "shy": "the mill", "sure": "1911"}
    write(run / "predictions.json", texts)
    lists = {
        key: [
            {"text": text, "score": 0.0, "probability": sure, "start_char": context.index(text), "end_char": 0},
        ]
        for (key, text), sure in zip(texts.items(), (0.9, 0.9, 0.3, 0.8), strict=True)
    }
    for key, (entry,) in lists.items():
        entry["end_char"] = entry["start_char"] + len(texts[key])
    write(run / "nbest.json", lists)
    page = reported(tmp_path, run)
    worst, _, chance = page.parts["answers"].partition("By chance")
    assert re.findall(r"Question (\w+)\?", worst) == ["sure", "shy", "half"]
    assert re.findall(r"Question (\w+)\?", chance) == list(questions)
    assert "F1 0, 80 % sure; in another sentence" not in worst
    assert "F1 0, 80 % sure; another part of the right sentence" in worst
    # Behind the three of the legend.
    assert page.marks[3:8] == [
        *[("reference", "Ada Kerrow"), ("predicted", "1911"), ("reference", "Ada Kerrow"), ("predicted", "the mill")],
        ("reference predicted", "Ada"),
    ]
    assert ("reference predicted", "Ada Kerrow") in page.marks[8:]


@WITHOUT_DRAWING
def test_text_is_shown_as_text(tmp_path: Path) -> None:
    plain = run_folder(tmp_path / "plain")
    questions = {}
    for number, text in enumerate(CORPUS):
        questions[f"{number} {text}"] = (f"{text} It says {text} & more.", f"{text}?", f"{text} & more")
    data = squad(tmp_path / "dev.json", questions)
    name = "<b>&{{7*7}}$x_1$"
    run = run_folder(tmp_path / name, validation_file=data, seed="<script>1</script>")
    write(run / "predictions.json", dict.fromkeys(questions, CORPUS[0]))
    (run / "metrics.jsonl").write_text(step(1), encoding="utf-8")
    write(run / "run.json", {"command": CORPUS, "versions": dict.fromkeys(CORPUS, "<i>"), "seconds": {CORPUS[0]: 1.0}})
    write(plain / "run.json", {"hardware": [], "seconds": {"train": "x"}, "evaluations": 3, "resumed_at_steps": 7})
    page = reported(tmp_path, plain, run, "--references", data)
    for text in CORPUS:
        assert " ".join(text.split()) in " ".join(page.parts["run"].split())
    for text in questions:
        assert " ".join(text.split()) in " ".join(page.parts["answers"].replace("\ufffd", " ").split()), text
    assert name in page.parts[""]
    assert not {"script", "img", "iframe", "form", "textarea", "base", "math", "animate", "body/onload"} & set(
        page.elements
    )
    assert page.elements["style"] == page.elements["body"] == page.elements["h1"] == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]


@WITHOUT_DRAWING
def test_characters_that_no_page_may_hold(tmp_path: Path) -> None:
    data = squad(tmp_path / "dev.json", {"q": ("a\x00b\x1bc\x85e is it.", "What?", "it")})
    run = run_folder(tmp_path / "run", validation_file=data)
    # What comes from elsewhere may hold halves of characters.
    write(run / "predictions.json", {"q": "half \ud800"})
    page = reported(tmp_path, run)
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.findall("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", written)
    assert "a\ufffdb\ufffdc\ufffde is" in page.parts["answers"]
    assert "half \ufffd" in page.parts["answers"]


@WITHOUT_DRAWING
def test_runs_are_compared(tmp_path: Path) -> None:
    questions = {
        key: (f"{key} lies north of the ford.", "What lies north?", key) for key in ("Ash", "Elm", "Oak", "Yew")
    }
    data = squad(tmp_path / "dev.json", questions)
    right = {key: key for key in questions}
    one = run_folder(tmp_path / "one", validation_file=data, seed=1)
    two = run_folder(tmp_path / "two", validation_file=data, seed=2)
    cut = run_folder(tmp_path / "cut", validation_file=data, seed=3, lora_r=4)
    # What YAML has beside names.
    for run in (one, two):
        with (run / "config.yaml").open("a", encoding="utf-8") as file:
            file.seek(file.tell() - 1)
            file.truncate()
            file.write(", 1: one, true: [two]}")
    write(one / "predictions.json", right)
    write(two / "predictions.json", {**right, "Elm": "the ford"})
    (cut / "metrics.jsonl").write_text(step(1), encoding="utf-8")
    page = reported(tmp_path, one, two, cut)
    assert "3 runs" in page.parts[""]
    assert "Differences" in page.parts[""]
    assert "2 seeds (1, 2), mean and standard deviation: F1 87.50 ± 17.68" in " ".join(page.parts[""].split())
    differing = page.parts["run"].partition("All ")[0]
    assert "lora_r" in differing
    assert "max_seq_length" not in differing
    assert "max_seq_length" in page.parts["run"]
    worst = page.parts["answers"].partition("By chance")[0]
    assert re.search(r"one\s*Elm\s*F1 100; right\s*two\s*the ford\s*F1 0", worst)
    assert page.elements["article"] == 1 + 4


@WITHOUT_DRAWING
def test_answers_of_other_data(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    other = squad(tmp_path / "other.json", {"other": ("A b c.", "What?", "b")})
    page = reported(tmp_path, trained / "adapter", "--references", other)
    assert "answers none of the questions of" in page.parts[""]
    assert "slices" not in page.parts
    assert "answers none of" in capsys.readouterr().err
    # Of some of the questions.
    run = tmp_path / "run"
    shutil.copytree(trained / "adapter", run)
    texts = json.loads((run / "predictions.json").read_text(encoding="utf-8"))
    write(run / "predictions.json", {key: texts[key] for key in list(texts)[:5]})
    page = reported(tmp_path, run)
    assert f"5 of the {len(texts)} questions" in page.parts[""]
    assert page.parts["answers"]


@WITHOUT_DRAWING
def test_data_that_is_gone(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", validation_file=str(tmp_path / "gone.json"))
    write(run / "predictions.json", {"q": "x"})
    write(run / "metrics.json", {"f1": 12.345, "exact_match": 1, "answer_normalization": "squad"})
    page = reported(tmp_path, run)
    assert "not at hand (run: " in page.parts[""]
    assert "--references FILE names them" in page.parts[""]
    # What the run noted is shown all the same.
    assert "12.35" in page.parts[""] or "12.34" in page.parts[""]
    assert "as the run noted it" in page.parts[""]


def test_what_cannot_be_reported_is_one_sentence(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, torn, empty = run_folder(tmp_path / "run"), run_folder(tmp_path / "torn"), tmp_path / "empty"
    empty.mkdir()
    (torn / "predictions.json").write_text("{", encoding="utf-8")
    listed = run_folder(tmp_path / "listed")
    write(listed / "run.json", [])
    later = run_folder(tmp_path / "later")
    write(later / "predictions.json", {"a": "x"})
    write(later / "metrics.json", {"answer_normalization": "klingon", "f1": 1.0})
    sweep = tmp_path / "sweep"
    run_folder(sweep / "trials" / "rank_8-seed1")
    output = tmp_path / "report.html"
    output.write_text("<!doctype html>precious", encoding="utf-8")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for words, part in (
        ([], "the following arguments are required: RUN"),
        ([tmp_path / "none"], "none does not exist; name the --output_dir of a run"),
        ([run / "config.yaml"], "config.yaml is no folder; name the --output_dir of a run"),
        ([empty], "empty holds nothing of a run (config.yaml, metrics.jsonl, run.json"),
        ([sweep], f"sweep is the folder of a sweep; name its runs, such as {sweep}/trials/rank_8-seed1"),
        ([run, f"{run}/"], "the same run twice; name each once"),
        ([torn], "predictions.json"),
        ([listed], "run.json must hold a JSON object, not a list; mend or remove it"),
        ([later], "later: its metrics.json has the scores by klingon, and the rules known here are squad, xquad"),
        ([run, "--references", tmp_path / "gone.json"], "gone.json does not exist; check the path"),
        ([run, "--seed", "x"], "'x' is not a whole number"),
        ([run, "--output", empty], "is a folder; name a file"),
        ([run, "--output", run / "config.yaml"], "config.yaml exists and is no page, which alone is replaced"),
        ([run, "--output", pipe], "pipe exists and is no page"),
        ([run, "--output", run / "config.yaml" / "page.html"], "cannot be used"),
    ):
        own = [] if "--output" in words else ["--output", str(output)]
        assert part in refusal(main, [*map(str, words), *own], capsys), words
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("qa_dist.reporting.drawings.find_spec", lambda name: None)
    assert "pip install 'qa-dist[bench]'" in refusal(main, [str(run), "--output", str(output)], capsys)
    assert output.read_text(encoding="utf-8") == "<!doctype html>precious"
    left = {"run", "torn", "empty", "listed", "later", "sweep", "report.html", "pipe"}
    assert {path.name for path in tmp_path.iterdir()} == left
