"""A file of answers and its journal: killed at any byte, full disks, and files that are somebody else's."""

import contextlib
import errno
import itertools
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from qa_dist.answering import journal
from qa_dist.answering.journal import Journal, open_sink
from qa_dist.common.errors import DataError
from tests.unit.answering.predicting import IDENTITY, FirstWord, lines, rows, run, write_jsonl


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.jsonl.gz"])
def test_killed_at_any_byte_it_ends_with_the_same_bytes(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill can leave: answers up to a byte of a chunk, or all of it and a journal up to a byte of its line."""
    # The disk is not what fails here, and waiting for it hundreds of times takes minutes.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path = write_jsonl(tmp_path / "q.jsonl", rows(7))
    whole = tmp_path / "whole" / name
    run([path], whole)
    answers, noted = whole.read_bytes(), whole.with_name(name + journal.SUFFIX).read_bytes()
    ends = [len(line) for line in noted.splitlines(keepends=True)]
    header, *steps = itertools.accumulate(ends)
    sizes = [json.loads(line)["num_bytes"] for line in noted.splitlines()[1:]]
    states: list[tuple[int, int]] = []
    for number, (noted_before, noted_after) in enumerate(itertools.pairwise([header, *steps])):
        start, end = ([0, *sizes][number], sizes[number])
        states += [(size, noted_before) for size in _cuts(start, end)]
        states += [(end, size) for size in _cuts(noted_before, noted_after)]
    killed = tmp_path / "killed" / name
    killed.parent.mkdir()
    for num_answered, num_noted in dict.fromkeys(states):
        killed.write_bytes(answers[:num_answered])
        killed.with_name(name + journal.SUFFIX).write_bytes(noted[:num_noted])
        reader = FirstWord()
        run([path], killed, reader)
        assert killed.read_bytes() == answers
        assert killed.with_name(name + journal.SUFFIX).read_bytes() == noted
        # What is noted is not answered again.
        num_done = sum(step <= num_noted for step in steps[1:])
        assert len(reader.chunks) == max(0, 3 - num_done)
    assert len(states) > 100


def _cuts(start: int, end: int) -> list[int]:
    """Places between two, those beside the ends among them."""
    return sorted({*range(start, min(start + 3, end)), *range(start, end, 29), *range(max(start, end - 2), end + 1)})


def test_killed_before_there_is_a_journal(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", rows(4))
    (tmp_path / "answers.jsonl").touch()
    (tmp_path / f".answers.jsonl{journal.SUFFIX}.qa_dist-unfinished").write_text("half a hea", encoding="utf-8")
    run([path], tmp_path / "answers.jsonl")
    assert len(lines(tmp_path / "answers.jsonl")) == 4
    assert sorted(each.name for each in tmp_path.iterdir()) == ["answers.jsonl", "answers.jsonl.journal", "q.jsonl"]


def interrupted(folder: Path, count: int = 10) -> tuple[Path, Path]:
    """An input, and answers of its first two chunks."""
    path, output = write_jsonl(folder / "q.jsonl", rows(count)), folder / "answers.jsonl"

    class Killed(FirstWord):
        def answer_chunk(self, *arguments: Any, **options: Any) -> Any:
            if len(self.chunks) == 2:
                raise KeyboardInterrupt
            return super().answer_chunk(*arguments, **options)

    with pytest.raises(KeyboardInterrupt):
        run([path], output, Killed())
    return path, output


def test_what_does_not_belong_to_the_answers_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    path, output = interrupted(tmp_path)
    kept, content = output.read_bytes(), path.read_bytes()
    with pytest.raises(DataError, match=r"answers of another run \(--top_k was 1 and is 2\)"):
        run([path], output, identity={**IDENTITY, "--top_k": 2})
    path.write_bytes(content.replace(b"w1 ", b"w9 "))
    with pytest.raises(DataError, match="not the one whose first 6 questions are answered"):
        run([path], output)
    path.write_bytes(content[:300])
    with pytest.raises(DataError, match="not the one whose first 6 questions"):
        run([path], output)
    path.write_bytes(content)
    with (
        contextlib.closing(Journal(output, IDENTITY, overwrite=False)),
        pytest.raises(DataError, match="being written by another process"),
    ):
        run([path], output)
    assert output.read_bytes() == kept
    output.write_bytes(kept[:-1])
    with pytest.raises(DataError, match="was changed since"):
        run([path], output)
    output.write_bytes(kept[:-3] + b"xx\n")
    with pytest.raises(DataError, match="was changed since"):
        run([path], output)
    output.write_bytes(kept)
    # Behind what is answered, the input may change: that is how a bad line is mended.
    path.write_bytes(content.replace(b"w8 ", b"changed "))
    rounds, _ = run([path], output)
    assert output.read_bytes().startswith(kept)
    assert lines(output)[8]["text"] == "changed"
    assert rounds.progress.num_answered == 10


def test_a_finished_file_is_left_as_it_is(tmp_path: Path) -> None:
    path, output = write_jsonl(tmp_path / "q.jsonl", rows(4, with_answers=True)), tmp_path / "answers.jsonl"
    first, _ = run([path], output)
    before = output.read_bytes()
    reader = FirstWord()
    again, _ = run([path], output, reader)
    assert again.progress.metrics() == first.progress.metrics()
    assert (reader.chunks, output.read_bytes()) == ([], before)
    write_jsonl(path, rows(5, with_answers=True))
    with pytest.raises(DataError, match="has grown since all of its 4 questions were answered"):
        run([path], output)
    output.write_bytes(before + b"\n")
    with pytest.raises(DataError, match="was changed since"):
        run([path], output)


def test_another_file_is_replaced_only_when_that_is_asked_for(tmp_path: Path) -> None:
    path, output = write_jsonl(tmp_path / "q.jsonl", rows(4)), tmp_path / "answers.jsonl"
    output.write_text("precious", encoding="utf-8")
    with pytest.raises(DataError, match="exists and is no file of this command; name another file, or pass"):
        run([path], output)
    assert output.read_text(encoding="utf-8") == "precious"
    run([path], output, overwrite=True)
    reader = FirstWord()
    run([path], output, reader, overwrite=True)
    assert reader.chunks == [], "its own answers are resumed"
    run([path], output, reader, identity={"--model": "two"}, overwrite=True)
    assert len(reader.chunks) == 2
    assert len(lines(output)) == 4
    write_jsonl(path, rows(1))
    run([path], output, identity={"--model": "three"}, overwrite=True)
    assert len(lines(output)) == 1, "nothing is left of a longer file"


@pytest.mark.parametrize("content", [b"", b"not json\n", json.dumps(rows(1)[0]).encode() + b"\nnot json\n"])
def test_nothing_is_replaced_before_there_is_something_to_replace_it_with(tmp_path: Path, content: bytes) -> None:
    path, output = write_jsonl(tmp_path / "q.jsonl", rows(4)), tmp_path / "answers.jsonl"
    run([path], output)
    kept = output.read_bytes()
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(DataError, match=r"0 answers are written|holds no questions"):
            run([path], output, identity={"--model": "two"}, overwrite=True)
        assert output.read_bytes() == kept
    write_jsonl(path, rows(4))
    reader = FirstWord()
    run([path], output, reader)
    assert reader.chunks == [], "they can still be resumed"


def test_a_run_that_ended_before_its_first_chunk_leaves_nothing_that_has_to_fit(tmp_path: Path) -> None:
    path, output = write_jsonl(tmp_path / "q.jsonl", rows(1)), tmp_path / "answers.jsonl"
    path.write_bytes(b"not json\n")
    with pytest.raises(DataError, match="0 answers are written"):
        run([path], output)
    write_jsonl(path, rows(2))
    run([path], output, identity={"--model": "two"})
    assert len(lines(output)) == 2
    with pytest.raises(DataError, match="answers of another run"):
        run([path], output)


def test_a_file_that_somebody_writes_where_a_run_was_killed_before_its_answers_is_left_alone(tmp_path: Path) -> None:
    path, output = write_jsonl(tmp_path / "q.jsonl", rows(2)), tmp_path / "answers.jsonl"
    run([path], output)
    noted = output.with_name(output.name + journal.SUFFIX)
    header = noted.read_bytes().splitlines(keepends=True)[0]
    noted.write_bytes(header)
    output.write_bytes(b'{"id": "my own work"}\n')
    with pytest.raises(DataError, match="exists and is no file of this command"):
        run([path], output)
    assert (output.read_bytes(), noted.read_bytes()) == (b'{"id": "my own work"}\n', header)


def test_a_chunk_without_answers_belongs_to_its_options(tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    with contextlib.closing(Journal(output, {"--top_k": 1}, overwrite=False)) as sink:
        sink.add(b"", {"num_units": 128})
    with pytest.raises(DataError, match=r"answers of another run \(--top_k was 1 and is 2\)"):
        Journal(output, {"--top_k": 2}, overwrite=False)
    with contextlib.closing(Journal(output, {"--top_k": 1}, overwrite=False)) as sink:
        assert sink.state == {"num_units": 128}


def test_where_the_answers_are_gone_a_replacement_that_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    path, output = interrupted(tmp_path)
    noted = output.with_name(output.name + journal.SUFFIX)
    kept, before, content = output.read_bytes(), noted.read_bytes(), path.read_bytes()
    output.unlink()
    path.write_bytes(b"not json\n")
    with pytest.raises(DataError, match=r"q\.jsonl.*line 1.*; 0 answers are written"):
        run([path], output, overwrite=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["answers.jsonl.journal", "q.jsonl"]
    assert noted.read_bytes() == before
    # Whoever brings the answers back goes on with them.
    output.write_bytes(kept)
    path.write_bytes(content)
    run([path], output)
    assert output.read_bytes().startswith(kept)
    assert len(lines(output)) == 10


def test_a_socket_is_no_pipe_that_somebody_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("name")
        with pytest.raises(DataError, match="cannot be written"):
            open_sink(Path("name"), IDENTITY, overwrite=False)


def test_a_refused_run_leaves_no_empty_file(tmp_path: Path) -> None:
    path, output = interrupted(tmp_path)
    output.unlink()
    with pytest.raises(DataError, match="was changed since its answers were written"):
        run([path], output)
    assert not output.exists()


def test_a_pipe_that_nobody_reads_is_waited_for_until_the_run_is_asked_to_stop(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    asked = iter([False, False, True])
    assert open_sink(tmp_path / "pipe", IDENTITY, overwrite=False, is_asked_to_stop=lambda: next(asked)) is None
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    sink = open_sink(tmp_path / "pipe", IDENTITY, overwrite=False)
    assert sink is not None
    with contextlib.closing(sink):
        sink.add(b"answers", {})
    assert os.read(reading, 99) == b"answers"
    os.close(reading)


def test_what_somebody_puts_in_the_place_of_no_answers_is_left_alone(tmp_path: Path) -> None:
    path, output = write_jsonl(tmp_path / "q.jsonl", rows(1)), tmp_path / "answers.jsonl"
    path.write_bytes(b"not json\n")
    with pytest.raises(DataError, match="0 answers are written"):
        run([path], output)
    output.write_bytes(b"my own work\n")
    write_jsonl(path, rows(2))
    with pytest.raises(DataError, match="exists and is no file of this command"):
        run([path], output)
    assert output.read_bytes() == b"my own work\n"


def test_a_full_disk_loses_nothing_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every write: of answers or of the journal, half of which the disk may have taken."""
    path = write_jsonl(tmp_path / "q.jsonl", rows(7))
    run([path], tmp_path / "whole.jsonl")
    real = os.pwrite
    for fatal in range(1, 9):
        calls = itertools.count(1)

        def write(descriptor: int, content: bytes, place: int, fatal: int = fatal, calls: Any = calls) -> int:
            call = next(calls)
            if call > fatal:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(descriptor, content[: len(content) // 2] if call == fatal else content, place)

        output = tmp_path / f"full-{fatal}.jsonl"
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", write)
            with pytest.raises(DataError, match=r"takes no more answers.*No space left.*run the same command to go on"):
                run([path], output)
        # Where no chunk came to its end, no file is left.
        assert (len(lines(output)) if fatal > 3 else output.exists()) == min(7, 3 * max(0, (fatal - 2) // 2))
        run([path], output)
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_names_of_other_things_than_files_are_streams(tmp_path: Path) -> None:
    with contextlib.closing(open_sink(Path(os.devnull), IDENTITY, overwrite=False)) as sink:
        sink.add(b"answers", {})
        sink.finish({})
    assert not Path(os.devnull + journal.SUFFIX).exists()
    full = Path("/dev/full")
    if full.exists():
        with (
            contextlib.closing(open_sink(full, IDENTITY, overwrite=False)) as sink,
            pytest.raises(DataError, match="takes no more answers"),
        ):
            sink.add(b"answers", {})
    with pytest.raises(DataError, match="is a folder"):
        open_sink(tmp_path, IDENTITY, overwrite=False)
    (tmp_path / "link").symlink_to(tmp_path / "answers.jsonl")
    with contextlib.closing(open_sink(tmp_path / "link", IDENTITY, overwrite=False)) as sink:
        assert isinstance(sink, Journal), "the name of a file that is not there yet"
