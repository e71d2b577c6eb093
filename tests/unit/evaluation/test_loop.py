"""What an evaluation keeps: the results of an earlier one until its own are scored, and nothing by halves."""

import errno
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qa_dist import evaluate, merge
from qa_dist.common import files
from qa_dist.evaluation import loop, passes
from qa_dist.evaluation.normalization import normalization
from qa_dist.evaluation.score_files import load_references
from qa_dist.evaluation.scoring import score_v1
from tests.refusals import contents, refusal
from tests.unit.trained import options_of, reset_accelerate
from tests.waiting import reads

Capture = pytest.CaptureFixture[str]


def arguments(trained: Path, results: Path) -> list[str]:
    """An evaluation of several batches that gathers logits."""
    words = ["--adapter", str(trained / "adapter"), "--results_dir", str(results)]
    return [*words, "--gather", "logits", "--eval_tokens_per_device", "64"]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with the logits of an earlier evaluation, and what another left that was killed."""
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "logits.npy").write_bytes(b"earlier")
    (folder / ".logits.npy.qa_dist-unfinished").write_bytes(b"cut short")
    reset_accelerate()
    return folder


def strike(monkeypatch: pytest.MonkeyPatch, name: str, count: int, fault: Any) -> None:
    """Let the call number `count` of a function of the evaluation do `fault` first."""
    module = passes if hasattr(passes, name) else loop
    real, calls = getattr(module, name), iter(range(1, 1000))

    def struck(*words: Any, **options: Any) -> Any:
        if next(calls) == count:
            fault()
        return real(*words, **options)

    monkeypatch.setattr(module, name, struck)


def fail() -> None:
    raise RuntimeError("no more")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fault", [fail, interrupt])
@pytest.mark.parametrize(("name", "count"), [("span_loss", 1), ("span_loss", 3), ("_best_spans", 1), ("score", 1)])
def test_a_failed_evaluation_leaves_the_earlier_logits(
    trained: Path, results: Path, name: str, count: int, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    strike(monkeypatch, name, count, fault)
    if fault is interrupt:
        assert evaluate.main(arguments(trained, results)) == 130
    else:
        with pytest.raises(RuntimeError, match="no more"):
            evaluate.main(arguments(trained, results))
    assert contents(results) == {"logits.npy": b"earlier"}


def test_a_disk_without_room_for_the_logits_is_one_sentence_before_anything_is_computed(
    trained: Path, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    strike(monkeypatch, "span_loss", 1, fail)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SystemExit) as end:
        evaluate.main(arguments(trained, results))
    assert end.value.code == 1
    told = capsys.readouterr().err
    assert "the logits, 0 MiB, cannot be written to" in told
    assert "No space left on device; free some space, or use --gather candidates" in told
    assert contents(results) == {"logits.npy": b"earlier"}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch uses, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bytes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where one thread evaluates")
    real, used = passes.span_loss, set()

    def noting(*words: Any) -> torch.Tensor:
        used.add(threading.current_thread().name.partition("_")[0])
        return real(*words)

    monkeypatch.setattr(passes, "span_loss", noting)
    found = {}
    for number, expected in ((1, "MainThread"), (3, "evaluation")):
        used.clear()
        threads(number)
        reset_accelerate()
        assert evaluate.main(arguments(trained, tmp_path / str(number))) == 0
        assert used == {expected}
        assert torch.get_num_threads() == number
        found[number] = contents(tmp_path / str(number))
    assert {"logits.npy", "nbest.json"} <= found[1].keys()
    assert found[1] == found[3]


def test_a_failure_in_a_thread_is_raised_and_gives_the_threads_back(
    trained: Path, results: Path, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    threads(2)
    strike(monkeypatch, "span_loss", 3, fail)
    with pytest.raises(RuntimeError, match="no more"):
        evaluate.main(arguments(trained, results))
    assert torch.get_num_threads() == 2
    assert contents(results) == {"logits.npy": b"earlier"}


def test_sigterm_leaves_the_earlier_logits(trained: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    strike(monkeypatch, "span_loss", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        evaluate.main(arguments(trained, results))
    assert ended.value.code == 143
    assert contents(results) == {"logits.npy": b"earlier"}
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_finished_evaluation_replaces_them(trained: Path, results: Path, capsys: Capture) -> None:
    assert evaluate.main(arguments(trained, results)) == 0
    logits = np.load(results / "logits.npy")
    assert logits.shape[1] == 2
    assert np.isfinite(logits).all()
    assert sorted(contents(results)) == ["logits.npy", "metrics.json", "nbest.json", "predictions.json"]
    assert json.loads(capsys.readouterr().out) == json.loads((results / "metrics.json").read_text(encoding="utf-8"))


def test_the_rules_of_the_scores_are_named_in_the_files(trained: Path, results: Path, capsys: Capture) -> None:
    assert evaluate.main(arguments(trained, results)) == 0
    capsys.readouterr()
    usual = json.loads((results / "metrics.json").read_text(encoding="utf-8"))
    assert next(iter(usual.items())) == ("answer_normalization", "squad")
    reset_accelerate()
    assert evaluate.main([*arguments(trained, results), "--answer_normalization", "none"]) == 0
    written = json.loads((results / "metrics.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == written
    assert list(written)[:3] == ["answer_normalization", "exact_match", "f1"]
    predictions = json.loads((results / "predictions.json").read_text(encoding="utf-8"))
    references = load_references(options_of(trained)["validation_file"]).answers
    scores = score_v1(references, predictions, rules=normalization("none"))
    assert written == {"answer_normalization": "none", **scores, "num_examples": len(references)}
    reset_accelerate()
    refused = refusal(evaluate.main, [*arguments(trained, results), "--answer_normalization", "mlqa"], capsys)
    assert refused.startswith("--answer_normalization mlqa is not one of squad, xquad, mlqa:ar, ")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(
    trained: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    strike(monkeypatch, "span_loss", 1, fail)
    # On /proc nobody can write, not even root; below a file there is no folder.
    for folder in ("/proc", str(results / "logits.npy"), str(results / "logits.npy" / "below")):
        reset_accelerate()
        message = refusal(evaluate.main, arguments(trained, Path(folder)), capsys)
        assert message.startswith(f"--results_dir {folder} cannot be used: ")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    files.write_json(path, {"f1": 1.0})
    with pytest.raises(UnicodeEncodeError):
        files.write_json(path, {"text": "x" * 100_000 + "\udc80"})
    assert contents(tmp_path) == {"metrics.json": b'{\n  "f1": 1.0\n}\n'}


def test_a_plain_model_is_evaluated_with_its_own_tokenizer(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["--adapter", str(trained / "adapter"), "--merged_dir", str(tmp_path / "merged")]
    assert merge.main(words) == 0
    names = ("validation_file", "store_dir", "max_seq_length", "doc_stride")
    plain = [word for name in names for word in (f"--{name}", options_of(trained)[name])]
    for folder, more in ((trained / "adapter", []), (tmp_path / "merged", plain)):
        reset_accelerate()
        words = ["--adapter", str(folder), "--results_dir", str(tmp_path / folder.name), *more]
        assert evaluate.main(words) == 0
    for name in ("metrics.json", "predictions.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_features_that_are_decoded_together_are_read_once(
    trained: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside that a whole evaluation reads its losses, and whether it is to stop."""
    waits: list[list[str]] = []
    copies: list[int] = []
    best, cpu = passes._best_spans, torch.Tensor.cpu

    def watched(*words: Any) -> Any:
        before = len(copies)
        with reads() as found:
            table = best(*words)
        waits.append([*found, *["cpu"] * (len(copies) - before)])
        return table

    monkeypatch.setattr(passes, "_best_spans", watched)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(1) or cpu(tensor))
    words = ["--adapter", str(trained / "adapter"), "--results_dir", str(results), "--eval_tokens_per_device", "64"]
    assert evaluate.main(words) == 0
    assert waits == [["cpu"]] * len(waits) != []
    assert len(copies) == len(waits) + 1
