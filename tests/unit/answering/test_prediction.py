"""Files of questions become files of answers, whatever interrupts that: in this process, without a model."""

import io
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qa_dist.answering import journal
from qa_dist.answering.prediction import Progress, prediction_bar
from qa_dist.answering.question_files import QuestionFiles
from qa_dist.common.errors import DataError
from qa_dist.evaluation.scoring import score_v1, score_v2
from tests.unit.answering.predicting import FirstWord, lines, rows, run, write_all_formats, write_jsonl
from tests.unit.data_fixtures import MALFORMED


def test_a_line_for_each_question_in_the_order_of_the_input(tmp_path: Path) -> None:
    paths = write_all_formats(tmp_path / "all", rows(4))
    reader = FirstWord()
    rounds, _ = run(paths, tmp_path / "answers.jsonl", reader, top_k=2)
    found = lines(tmp_path / "answers.jsonl")
    assert [(line["id"], line["text"]) for line in found] == [(f"q{n}", f"w{n}") for n in range(4)] * len(paths)
    assert list(found[0]) == [
        *("id", "text", "start_char", "end_char", "score", "probability"),
        *("is_no_answer", "no_answer_odds", "context_index", "nbest"),
    ]
    assert found[0]["nbest"] == [
        {name: value for name, value in found[0].items() if name not in ("id", "nbest")},
        {**dict.fromkeys(("start_char", "end_char", "context_index"), -1), **NO_ANSWER},
    ]
    assert max(map(len, reader.chunks)) == 3
    assert rounds.progress.metrics() == {"num_answered": 4 * len(paths)}


NO_ANSWER = {"text": "", "score": 0.0, "probability": 0.25, "is_no_answer": True, "no_answer_odds": None}


@pytest.mark.parametrize("ending", ["blank lines", "an empty file", "another file without questions"])
@pytest.mark.parametrize("is_finished", [True, False])
def test_what_follows_the_last_question_is_no_other_input(tmp_path: Path, ending: str, is_finished: bool) -> None:
    """It is read before the last chunk is noted, and not read when a run goes on."""
    paths, output = [write_jsonl(tmp_path / "a.jsonl", rows(4))], tmp_path / "answers.jsonl"
    if ending == "blank lines":
        paths[0].write_bytes(paths[0].read_bytes() + b"\n  \n")
    else:
        (tmp_path / "b.jsonl").write_bytes(b"" if ending == "an empty file" else b"\n\n")
        paths.append(tmp_path / "b.jsonl")
    run(paths, output)
    whole = output.read_bytes()
    if not is_finished:
        # Killed after the last chunk.
        noted = output.with_name(output.name + journal.SUFFIX)
        noted.write_bytes(b"".join(noted.read_bytes().splitlines(keepends=True)[:-1]))
    reader = FirstWord()
    run(paths, output, reader)
    assert (reader.chunks, output.read_bytes()) == ([], whole)
    write_jsonl(paths[-1], rows(5)[4:] if len(paths) == 2 else rows(5))
    with pytest.raises(DataError, match="has grown since all of its 4 questions were answered"):
        run(paths, output)


def test_an_input_of_nothing_but_flaws_replaces_nothing(tmp_path: Path) -> None:
    path, output = write_jsonl(tmp_path / "q.jsonl", rows(4)), tmp_path / "answers.jsonl"
    run([path], output)
    kept = output.read_bytes()
    path.write_bytes(b"not json\n" * 7)
    with pytest.raises(DataError, match=r"no question of the input could be answered, and .* is left as it is"):
        run([path], output, identity={"--model": "two"}, overwrite=True, skips_flaws=True)
    assert output.read_bytes() == kept
    # Behind them there may be one, which is enough.
    values: list[Any] = ["no object"] * 7
    write_jsonl(path, [*values, *rows(1)])
    rounds, _ = run([path], output, identity={"--model": "two"}, overwrite=True, skips_flaws=True)
    assert rounds.progress.metrics() == {"num_answered": 1, "num_skipped": 7}
    assert len(lines(output)) == 1


@pytest.mark.parametrize("count", [2, 6])
def test_answers_about_another_input_are_replaced_if_that_is_asked_for(tmp_path: Path, count: int) -> None:
    path, output = write_jsonl(tmp_path / "q.jsonl", rows(4)), tmp_path / "answers.jsonl"
    run([path], output)
    write_jsonl(path, [{**row, "id": f"new {row['id']}"} for row in rows(count)])
    with pytest.raises(DataError, match=r"is not the one whose first 4 questions .* --overwrite_output_file true"):
        run([path], output)
    rounds, notices = run([path], output, overwrite=True)
    assert notices == ["4 answers about another input are replaced"]
    assert [line["id"] for line in lines(output)] == [f"new q{number}" for number in range(count)]
    assert rounds.progress.num_answered == count
    reader = FirstWord()
    run([path], output, reader)
    assert reader.chunks == []


def with_bad_lines(folder: Path) -> Path:
    values: list[Any] = rows(9)
    values[4] = "no object"
    values[5]["context"] = ""
    values[7]["question"] = "unanswerable"
    return write_jsonl(folder / "q.jsonl", values)


def test_what_cannot_be_answered_is_left_out_named_and_counted(tmp_path: Path) -> None:
    path, output = with_bad_lines(tmp_path), tmp_path / "answers.jsonl"
    rounds, notices = run([path], output, skips_flaws=True)
    assert [line["id"] for line in lines(output)] == ["q0", "q1", "q2", "q3", "q6", "q8"]
    assert notices == [
        "q.jsonl, line 5: an entry is not an object; left out",
        "q.jsonl, line 6: context is empty or blank; left out",
        "q.jsonl, line 8: the question is too long; left out",
    ]
    assert rounds.progress.metrics() == {"num_answered": 6, "num_skipped": 3}


def test_equal_lines_of_files_with_one_name_are_all_answered_beside_a_flaw(tmp_path: Path) -> None:
    paths = [tmp_path / name / "q.jsonl" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        write_jsonl(path, [*rows(1), {**rows(1)[0], "question": "unanswerable"}])
    output = tmp_path / "answers.jsonl"
    rounds, _ = run(paths, output, skips_flaws=True, questions_per_chunk=4)
    assert [line["id"] for line in lines(output)] == ["q0", "q0"]
    assert rounds.progress.metrics() == {"num_answered": 2, "num_skipped": 2}


def test_what_cannot_be_answered_ends_the_run_and_is_mended(tmp_path: Path) -> None:
    """What stands before it is written in whole chunks, and each mended line lets the run go on."""
    path, output, whole = with_bad_lines(tmp_path), tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, told in ((4, "line 5: an entry"), (5, "line 6: context is empty"), (7, "line 8: the question is too")):
        with pytest.raises(DataError, match=f"{told}.*3 answers are written|{told}.*6 answers are written"):
            run([path], output)
        values[number] = rows(9)[number]
        write_jsonl(path, values)
    run([path], output)
    run([path], whole)
    assert output.read_bytes() == whole.read_bytes()
    assert len(lines(whole)) == 9


def test_what_stands_before_damage_is_answered_and_a_whole_copy_lets_the_run_go_on(tmp_path: Path) -> None:
    path, output = write_jsonl(tmp_path / "q.jsonl.gz", rows(2000)), tmp_path / "answers.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="ends in the middle of its gzip stream"):
        run([path], output, questions_per_chunk=100, num_ranks=20)
    assert len(lines(output)) in range(700, 1300, 100)
    path.write_bytes(content)
    run([path], output, questions_per_chunk=100)
    assert [line["id"] for line in lines(output)] == [f"q{number}" for number in range(2000)]


def test_scores_are_those_of_the_official_scripts(tmp_path: Path) -> None:
    values = rows(11, with_answers=True)
    del values[9]["answers"]
    rounds, _ = run([write_jsonl(tmp_path / "q.jsonl", values)], tmp_path / "v1.jsonl")
    predictions = {line["id"]: line["text"] for line in lines(tmp_path / "v1.jsonl")}
    references = {value["id"]: value["answers"]["text"] for value in values if "answers" in value}
    known = {key: predictions[key] for key in references}
    counts = {"num_answered": 11, "num_unlabelled": 1}
    assert rounds.progress.metrics() == {**score_v1(references, known), **counts}
    values[3]["answers"] = {"text": [], "answer_start": []}
    rounds, _ = run([write_jsonl(tmp_path / "q.jsonl", values)], tmp_path / "v2.jsonl")
    official = score_v2({**references, "q3": []}, known)
    assert rounds.progress.metrics() == {"exact_match": official["exact"], **official, **counts}


def test_the_bar_says_how_far_how_fast_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    files: Any = SimpleNamespace(num_bytes=200, num_bytes_read=50)
    with prediction_bar(3, shown=True) as (advance, notice):
        notice("a line above it")
        advance(Progress(num_answered=1234), files)
    shown = capsys.readouterr().err
    assert "a line above it\n" in shown
    assert re.search(r"answering: 1,234 questions, [\d,.]+ questions/s  25% \|.*\| \[\d\d:\d\d<[\d:?]+\]", shown)


def test_an_input_without_questions_is_refused(tmp_path: Path) -> None:
    for name in ("q.jsonl", "q.csv"):
        (tmp_path / name).write_text("question,context\n" if name == "q.csv" else "\n\n", encoding="utf-8")
        with pytest.raises(DataError, match=f"^{name} holds no questions"):
            run([tmp_path / name], tmp_path / f"{name}.answers")
    (tmp_path / "own").touch()
    (tmp_path / "link").symlink_to("own-too")
    for name in ("own", "link"):
        with pytest.raises(DataError, match="holds no questions"):
            run([tmp_path / "q.csv"], tmp_path / name)
    left = {path.name for path in tmp_path.iterdir()} - {"own-too"}
    assert left == {"own", "link", "q.csv", "q.jsonl"}, "what was there stays, and no file is made"
    assert QuestionFiles([], io.BufferedReader(io.BytesIO())).shown == "standard input"


def test_files_that_training_refuses_end_with_a_sentence_or_leave_out_what_is_bad(tmp_path: Path) -> None:
    outcomes = Counter[str]()
    for path in sorted(MALFORMED.iterdir()):
        output = tmp_path / path.name
        told = None
        try:
            rounds, notices = run([path], output, skips_flaws=True)
        except DataError as error:
            told = str(error)
        if told is not None:
            assert path.name in told
            assert "\n" not in told
            outcomes["refused"] += 1
            continue
        progress = rounds.progress
        assert len(notices) == progress.num_skipped
        assert progress.num_answered + progress.num_skipped == progress.num_records
        assert len(lines(output)) == progress.num_answered
        outcomes["left out" if notices else "answered"] += 1
    # Files whose answers or ids alone are wrong can be answered.
    assert all(outcomes[what] > 10 for what in ("refused", "left out", "answered")), outcomes
