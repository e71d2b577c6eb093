"""`qa-dist predict` from its command line, on a tiny model with random weights."""

import json
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qa_dist import evaluate, predict
from qa_dist.answering import question_files
from tests.refusals import refusal
from tests.tiny import tiny_config, tiny_squad, tiny_tokenizer
from tests.unit.answering.predicting import lines, rows, write_jsonl
from tests.unit.trained import reset_accelerate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, a whole model of transformers, and dev.json."""
    from transformers import AutoModelForQuestionAnswering

    made = tmp_path_factory.mktemp("predict")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    AutoModelForQuestionAnswering.from_config(tiny_config("bert", len(tokenizer), 1)).save_pretrained(made / "model")
    tokenizer.save_pretrained(made / "model")
    tiny_squad(made / "dev.json", 20, seed=1, longest=120)
    return made


LENGTHS = ("--max_seq_length", "64", "--doc_stride", "16")


def words(folder: Path, questions: Path | str, output: Path | str, *more: str) -> list[str]:
    reset_accelerate()
    usual = ["--model", str(folder / "model"), "--input_file", str(questions), "--output_file", str(output), *LENGTHS]
    return [*usual, "--disable_tqdm", *more]


def test_answers_and_scores_are_those_of_evaluate(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main(words(folder, folder / "dev.json", tmp_path / "answers.jsonl")) == 0
    printed = json.loads(capsys.readouterr().out)
    reset_accelerate()
    scored = ["--adapter", str(folder / "model"), "--validation_file", str(folder / "dev.json"), *LENGTHS]
    assert evaluate.main([*scored, "--results_dir", str(tmp_path), "--store_dir", str(tmp_path / "store")]) == 0
    expected = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert {line["id"]: line["text"] for line in lines(tmp_path / "answers.jsonl")} == expected
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    named = {name: metrics[name] for name in ("answer_normalization", "exact_match", "f1")}
    assert printed == named | {"num_answered": 20}


def test_from_standard_input_to_standard_output(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with write_jsonl(tmp_path / "q.jsonl", rows(3)).open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert predict.main(words(folder, "-", "-")) == 0
    captured = capfdbinary.readouterr()
    assert [json.loads(line)["id"] for line in captured.out.splitlines()] == ["q0", "q1", "q2"]
    assert b'"num_answered": 3' in captured.err


@pytest.mark.parametrize("kind", ["named", "of a shell"])
def test_a_pipe_under_a_name_is_read_whole(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """A shell's <(...) is /dev/fd/N. Whoever looked into it first would take its first questions away."""
    content = write_jsonl(tmp_path / "q.jsonl", rows(300)).read_bytes()
    name, reading, writing = str(tmp_path / "pipe"), -1, -1
    if kind == "named":
        os.mkfifo(name)
    else:
        reading, writing = os.pipe()
        name = f"/dev/fd/{reading}"

    def write() -> None:
        with open(name if kind == "named" else writing, "wb") as file:
            file.write(content)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    # Whoever opened the pipe a second time would wait for ever.
    ending = threading.Timer(30, lambda: os.close(os.open(name, os.O_WRONLY | os.O_NONBLOCK)))
    ending.start()
    try:
        assert predict.main(words(folder, name, tmp_path / "answers.jsonl")) == 0
    finally:
        ending.cancel()
        if reading >= 0:
            os.close(reading)
    writer.join(10)
    assert json.loads(capsys.readouterr().out) == {"num_answered": 300}
    assert [line["id"] for line in lines(tmp_path / "answers.jsonl")] == [f"q{number}" for number in range(300)]


def test_a_stop_ends_the_wait_for_standard_input(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has come is answered as far as chunks are full, and the same input goes on from there."""
    content = write_jsonl(tmp_path / "q.jsonl", rows(5)).read_bytes()
    output, more = tmp_path / "answers.jsonl", ("--questions_per_chunk", "2")
    reading, writing = os.pipe()
    os.write(writing, content)

    def poll(*waiting: Any) -> Any:
        ready = select.select(*waiting[:3], 0)
        if not ready[0]:
            signal.raise_signal(signal.SIGTERM)
        return ready

    with monkeypatch.context() as patch, os.fdopen(reading) as stdin:
        patch.setattr(sys, "stdin", stdin)
        patch.setattr(question_files, "select", SimpleNamespace(select=poll))
        assert predict.main(words(folder, "-", output, *more)) == 85
        assert "stopped by SIGTERM after 4 answers; run the same command" in capsys.readouterr().err
    os.close(writing)
    assert len(lines(output)) == 4
    with (tmp_path / "q.jsonl").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert predict.main(words(folder, "-", output, *more)) == 0
    assert [line["id"] for line in lines(output)] == [f"q{number}" for number in range(5)]


def test_the_same_command_goes_on_and_another_one_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [*rows(5), {"id": "long", "question": "amber " * 100, "context": "amber basin"}, *rows(2)]
    path, output = write_jsonl(tmp_path / "q.jsonl", bad), tmp_path / "answers.jsonl"
    more = ("--questions_per_chunk", "2")
    told = refusal(predict.main, words(folder, path, output, *more), capsys)
    assert "q.jsonl, line 6: the question has 100 tokens" in told
    assert len(lines(output)) == 4
    told = refusal(predict.main, words(folder, path, output, *more, "--top_k", "2"), capsys)
    assert "answers of another run (--top_k was 1 and is 2)" in told
    assert predict.main(words(folder, path, output, *more, "--on_invalid", "skip")) == 0
    captured = capsys.readouterr()
    assert "going on behind 4 answers" in captured.err
    assert "line 6: the question has 100 tokens" in captured.err
    assert json.loads(captured.out) == {"num_answered": 7, "num_skipped": 1}
    before = output.read_bytes()
    assert predict.main(words(folder, path, output, *more, "--on_invalid", "skip")) == 0
    assert "every question is answered already" in capsys.readouterr().err
    assert output.read_bytes() == before
    # What the model consists of is compared too.
    config = folder / "model" / "config.json"
    kept = config.read_text(encoding="utf-8")
    config.write_text(f"{kept} ", encoding="utf-8")
    told = refusal(predict.main, words(folder, path, output, *more), capsys)
    config.write_text(kept, encoding="utf-8")
    assert "answers of another run (the content of --model differs)" in told
    assert output.read_bytes() == before


def test_a_journal_knows_the_precision_and_one_of_before_is_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = write_jsonl(tmp_path / "q.jsonl", rows(3)), tmp_path / "answers.jsonl"
    assert predict.main(words(folder, path, output)) == 0
    assert json.loads(capsys.readouterr().out) == {"num_answered": 3}
    told = refusal(predict.main, words(folder, path, output, "--mixed_precision", "bf16"), capsys)
    assert '(--mixed_precision was "no" and is "bf16")' in told
    # On a CPU it is what is taken by itself.
    assert predict.main(words(folder, path, output, "--mixed_precision", "no")) == 0
    journal = tmp_path / "answers.jsonl.journal"
    header, *others = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    before = json.loads(header)
    before["identity"]["--mixed_precision"] = None
    journal.write_text("".join([json.dumps(before) + "\n", *others]), encoding="utf-8")
    capsys.readouterr()
    assert predict.main(words(folder, path, output)) == 0
    assert "every question is answered already" in capsys.readouterr().err
    told = refusal(predict.main, words(folder, path, output, "--mixed_precision", "bf16"), capsys)
    assert '(--mixed_precision was null and is "bf16")' in told


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((), "--model is missing"),
        (
            ("--model", "nowhere/model", "--input_file", "none.jsonl", "--output_file", "out"),
            "none.jsonl does not exist",
        ),
        (("--model", "{folder}/dev.json", "--input_file", "{folder}/dev.json", "--output_file", "{out}"), "is a file"),
        (("--model", "m", "--input_file", "q", "--output_file", "{folder}"), "is a folder; name a file in it"),
        (("--model", "m", "--input_file", "q", "--output_file", "-", "--overwrite_output_file"), "drop one"),
        (
            ("--model", "m", "--input_file", "{folder}/dev.json", "--output_file", "{folder}/dev.json"),
            "one of the files of --input_file",
        ),
        (
            ("--model", "m", "--input_file", "{folder}/dev.json", "--output_file", "{folder}/dev.json/a"),
            "cannot be used",
        ),
        (("--model", "m", "--input_file", "q", "--output_file", "o", "--top_k", "9", "--n_best_size", "3"), "raise"),
        (("--model", "m", "--input_file", "q", "--output_file", "o", "--on_invalid", "drop"), "error, skip"),
        (
            ("--model", "m", "--input_file", "q", "--output_file", "o", "--overlap_threshold", "0.5"),
            "--overlap_threshold 0.5 chooses among several answers and --top_k is 1; raise",
        ),
        (
            (
                *("--model", "m", "--input_file", "q", "--output_file", "o"),
                *("--allow_no_answer", "false", "--null_score_diff_threshold", "3"),
            ),
            "--null_score_diff_threshold chooses between answers and none, and --allow_no_answer is false; drop one",
        ),
        (("--model", "m", "--input_file", "q", "--output_file", "o", "--train_file", "t"), "--train_file"),
    ],
)
def test_a_mistake_is_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: Sequence[str], told: str
) -> None:
    reset_accelerate()
    given = [word.replace("{folder}", str(folder)).replace("{out}", str(tmp_path / "out")) for word in more]
    assert told in refusal(predict.main, given, capsys)
    assert not (tmp_path / "out").exists()


def test_rules_without_references_are_told_of(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "nothing was scored and --answer_normalization had no effect"
    path = write_jsonl(tmp_path / "q.jsonl", rows(2))
    assert predict.main(words(folder, path, tmp_path / "a", "--answer_normalization", "squad")) == 0
    assert told in capsys.readouterr().err
    path = write_jsonl(tmp_path / "r.jsonl", rows(2, with_answers=True))
    more = ("--answer_normalization", "squad", "--overlap_threshold", "0.01")
    assert predict.main(words(folder, path, tmp_path / "b", *more)) == 0
    assert told not in capsys.readouterr().err


@pytest.mark.parametrize("way", ["a link", "standard input"])
def test_the_input_is_not_written_to_under_another_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    reset_accelerate()
    path, output = tmp_path / "q.json", tmp_path / "answers.jsonl"
    path.write_bytes((folder / "dev.json").read_bytes())
    os.link(path, output)
    with path.open("rb") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        source = str(path) if way == "a link" else "-"
        given = [
            "--model",
            "m",
            "--input_file",
            source,
            "--output_file",
            str(output),
            "--overwrite_output_file",
            "true",
        ]
        assert f"--output_file {output} is a file of --input_file, too" in refusal(predict.main, given, capsys)
    assert path.read_bytes() == (folder / "dev.json").read_bytes()
