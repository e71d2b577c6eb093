"""A reader answers as a run's evaluation does, from any thread, in constant memory, and says what it cannot use."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qa_dist
from qa_dist import evaluate, merge
from qa_dist.answering import reader as reading
from qa_dist.answering import torch_backend
from qa_dist.answering.reader import Reader
from qa_dist.answering.records import Answer, InvalidQuestionError, Question
from qa_dist.common.errors import DataError, UserError
from tests.tiny import tiny_squad
from tests.unit.trained import reset_accelerate, some_calibration

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def reader(trained: Path) -> Reader:
    return Reader(trained / "adapter", device="cpu")


def asked_in(path: Path) -> list[dict[str, Any]]:
    """The questions of a SQuAD file, each with its context."""
    paragraphs = json.loads(path.read_text())["data"][0]["paragraphs"]
    return [{**entry, "context": paragraph["context"]} for paragraph in paragraphs for entry in paragraph["qas"]]


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Questions of one window and of several."""
    return asked_in(tiny_squad(tmp_path_factory.mktemp("items") / "dev.json", 40, seed=5))


@pytest.mark.parametrize("penalty", [0.0, 0.5])
@pytest.mark.parametrize("unanswerable", [False, True])
def test_answers_are_those_of_the_evaluation(trained: Path, tmp_path: Path, unanswerable: bool, penalty: float) -> None:
    dev, results = tiny_squad(tmp_path / "dev.json", 60, seed=7, unanswerable=unanswerable), tmp_path / "results"
    words = ["--adapter", str(trained / "adapter"), "--results_dir", str(results), "--validation_file", str(dev)]
    threshold = 0.0
    if unanswerable:
        # Such that both kinds of answers occur.
        willing = Reader(trained / "adapter", device="cpu", allow_no_answer=True, answer_length_penalty=penalty)
        threshold = float(np.median([answer.no_answer_odds for _, answer in willing.answer_many(asked_in(dev))]))
    reset_accelerate()
    words += ["--store_dir", str(tmp_path / "store"), f"--null_score_diff_threshold={threshold}"]
    words += [f"--answer_length_penalty={penalty}"]
    assert evaluate.main(words) == 0
    reader = Reader(
        trained / "adapter",
        device="cpu",
        allow_no_answer=unanswerable,
        null_score_diff_threshold=threshold,
        answer_length_penalty=penalty,
    )
    assert reader.settings["answer_length_penalty"] == penalty
    assert any("null_score_diff_threshold decides nothing" in note for note in reader.notes) == (not unanswerable)
    found = {item["id"]: answer for item, answer in reader.answer_many(asked_in(dev))}
    text = json.dumps({key: answer.text for key, answer in found.items()}, indent=2, ensure_ascii=False) + "\n"
    assert text.encode() == (results / "predictions.json").read_bytes()
    lists = json.loads((results / "nbest.json").read_text())
    for key, answer in found.items():
        (entry,) = [each for each in lists[key] if (each["start_char"], each["end_char"]) == place(answer)][:1]
        assert (answer.score, answer.probability) == pytest.approx((entry["score"], entry["probability"]), abs=1e-5)
    if unanswerable:
        assert {answer.is_no_answer for answer in found.values()} == {True, False}
        odds = json.loads((results / "null_odds.json").read_text())
        assert {key: answer.no_answer_odds for key, answer in found.items()} == pytest.approx(odds, abs=1e-5)
    else:
        assert {(answer.is_no_answer, answer.no_answer_odds) for answer in found.values()} == {(False, None)}


def place(answer: Answer) -> tuple[int, int]:
    return answer.start_char, answer.end_char


def test_one_by_one_and_many_at_once_agree(reader: Reader, items: list[dict[str, Any]]) -> None:
    many = list(reader.answer_many(iter(items)))
    assert [item["id"] for item, _ in many] == [item["id"] for item in items]
    for item, answer in many:
        assert isinstance(answer, Answer)
        alone = reader.answer(item["question"], item["context"])
        assert place(alone) == place(answer)
        assert alone.text == item["context"][alone.start_char : alone.end_char] != ""
        assert alone.score == pytest.approx(answer.score, abs=1e-4)


def test_memory_is_given_back_after_many_passes_alone(
    trained: Path, items: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr(torch_backend, "return_freed_memory", lambda: given_back.append(True))
    reader = Reader(trained / "adapter", device="cpu", tokens_per_batch=64)
    reader.answer(items[0]["question"], items[0]["context"])
    assert not given_back
    assert len(list(reader.answer_many(items))) == len(items)
    assert len(given_back) == 1


def test_threads_that_share_a_reader_get_the_answers_of_one(reader: Reader, items: list[dict[str, Any]]) -> None:
    def answers(_: int) -> list[list[dict[str, Any]]]:
        chunks = (items[start : start + 5] for start in range(0, len(items), 5))
        asked = [[Question.of(item["question"], item["context"]) for item in chunk] for chunk in chunks]
        return [[found.as_dict() for found in each] for chunk in asked for each in reader.answer_chunk(chunk, 3)]

    expected = answers(0)
    assert len(expected) == 40
    with ThreadPoolExecutor(4) as threads:
        assert all(found == expected for found in threads.map(answers, range(4)))


@pytest.mark.parametrize("most", ["questions", "characters"])
def test_items_are_taken_as_answers_are_needed(
    reader: Reader, items: list[dict[str, Any]], most: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(len(item["question"]) + len(item["context"]) for item in items)
    monkeypatch.setattr(reading, "QUESTIONS_TOGETHER", 8 if most == "questions" else 1000)
    monkeypatch.setattr(reading, "CHARACTERS_TOGETHER", 10**9 if most == "questions" else 4 * longest)
    taken = 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal taken
        while True:
            taken += 1
            yield items[taken % len(items)]

    ahead = []
    for number, _ in enumerate(reader.answer_many(endless()), 1):
        ahead.append(taken - number)
        if number == 100:
            break
    shortest = min(len(item["question"]) + len(item["context"]) for item in items)
    assert max(ahead) == 7 if most == "questions" else 0 < max(ahead) < 4 * longest / shortest


def test_what_is_before_a_bad_item_is_answered(reader: Reader, items: list[dict[str, Any]]) -> None:
    found = []
    with pytest.raises(DataError, match=r"^item 4: the context is empty; give a text with words in it$"):
        found.extend(reader.answer_many([*items[:3], {"question": "why ?", "context": ""}, items[4]]))
    assert [item["id"] for item, _ in found] == [item["id"] for item in items[:3]]
    bad: list[Any] = [[], None, {"question": "why ?"}]
    problems = ("it is of type list", "it is of type NoneType", "it has no `context`")
    for item, problem in zip(bad, problems, strict=True):
        with pytest.raises(DataError, match=f"^item 1: {problem}; give a mapping with `question` and `context`$"):
            list(reader.answer_many([item]))


def test_what_is_given_before_the_items_fail_is_answered(reader: Reader, items: list[dict[str, Any]]) -> None:
    def failing() -> Iterator[dict[str, Any]]:
        yield from items[:3]
        raise OSError("the disk has gone")

    found = []
    with pytest.raises(OSError, match=r"^the disk has gone$"):
        found.extend(reader.answer_many(failing()))
    assert [item["id"] for item, _ in found] == [item["id"] for item in items[:3]]


@pytest.mark.parametrize(
    ("question", "context", "message"),
    [
        ("why ?", "", "the context is empty; give a text with words in it"),
        ("why ?", " \n\u2003", "the context is nothing but blanks; give a text with words in it"),
        ("why ?", ["amber", " "], "context 1 is nothing but blanks; give a text with words in it"),
        ("why ?", [], "there is no context: the list is empty; give at least one text"),
        ("why ?", None, "the context is missing; give a text, or a list of texts"),
        ("why ?", b"amber", "the context is bytes, not text; give a text, or a list of texts"),
        ("why ?", {"a": 1}, "the context is of type dict, not text; give a text, or a list of texts"),
        ("why ?", ["amber", 7], "context 1 is a number, not text; give a text"),
        ("why ?", "amber \ud800 basin", "half a surrogate pair at character 6, which is no text; decode it as UTF-8"),
        ("\t", "amber", "the question is nothing but blanks; give a text with words in it"),
        (3.5, "amber", "the question is a number, not text; give a text"),
        (True, "amber", "the question is true, not text; give a text"),
        ("amber " * 50, "amber", "the question has 50 tokens, and a window of 64 with a stride of 16 has room for 44;"),
    ],
)
def test_what_is_no_text_is_refused(reader: Reader, question: Any, context: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        reader.answer(question, context)
    assert message in str(caught.value)


def test_a_chunk_names_the_question_that_is_too_long(reader: Reader) -> None:
    questions = [Question.of("what follows amber ?", "amber basin"), Question.of("amber " * 50, "amber basin")]
    with pytest.raises(InvalidQuestionError, match=r"^question 1: the question has 50 tokens") as caught:
        reader.answer_chunk(questions)
    assert caught.value.index == 1
    assert reader.problem(questions[0]) is None
    assert reader.problem(questions[1]) == caught.value.problem
    assert reader.answer_chunk([]) == []


def test_a_question_that_leaves_hardly_any_room_is_costly(reader: Reader) -> None:
    """Windows of 64 tokens, 3 of them special, that share 16: 45 further on beside no question."""
    for num_tokens, is_costly in ((1, False), (39, False), (40, True), (44, True)):
        question = Question.of("amber " * num_tokens, "amber")
        assert reader.problem(question) is None
        problem = reader.cost_problem(question)
        assert (problem == f"the question has {num_tokens} tokens; at most 39 are allowed here") is is_costly
        assert (problem is None) is not is_costly
    assert reader.cost_problem(Question.of("amber " * 50, "amber")) == (
        "the question has 50 tokens; at most 39 are allowed here"
    )


def test_a_question_is_cut_where_that_was_asked_for(trained: Path) -> None:
    cutting = Reader(trained / "adapter", device="cpu", max_question_length=6)
    context = "amber basin cedar delta ember fjord"
    long, short = (cutting.answer("amber " * count, context) for count in (50, 6))
    assert long == short


def test_a_folder_is_named_as_python_names_files(trained: Path) -> None:
    folder = trained / "adapter"
    for name in (str(folder), os.fsencode(folder)):
        assert Reader(name, device="cpu").model == str(folder)  # type: ignore[arg-type]


def test_markup_and_control_characters_are_text(reader: Reader) -> None:
    context = "<p onclick='x'>amber\0basin</p> [SEP] \x1b[31mcedar\u202e \U0001f600 delta"
    answer = reader.answer("what follows amber ?", context)
    assert answer.text == context[answer.start_char : answer.end_char] != ""


def test_a_context_without_a_token_has_no_answer(reader: Reader) -> None:
    answer = reader.answer("what follows amber ?", "\u200b\u200b")
    assert (answer.text, answer.is_no_answer, place(answer), answer.context_index) == ("", True, (-1, -1), -1)
    assert (answer.probability, answer.no_answer_odds) == (1.0, None)
    found = reader.answer("what follows amber ?", ["\u200b", "amber basin"], top_k=20)
    assert {each.context_index for each in found} == {1}


def test_fields_of_an_answer_are_those_of_the_files(reader: Reader) -> None:
    answer = reader.answer("what follows amber ?", "amber basin cedar")
    names = "text start_char end_char score probability is_no_answer no_answer_odds context_index"
    assert list(answer.as_dict()) == names.split()
    assert json.loads(json.dumps(answer.as_dict())) == answer.as_dict()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"top_k": 0}, "top_k is 0; give a whole number of 1 or more"),
        ({"top_k": 1.5}, "top_k is 1.5; give a whole number of 1 or more"),
        ({"top_k": 21}, "top_k is 21, but n_best_size is 20: no more answers are kept; raise that"),
        ({"overlap_threshold": 2}, "overlap_threshold is 2; give a number from 0 to 1, or None"),
    ],
)
def test_numbers_out_of_range_are_refused(reader: Reader, numbers: dict[str, Any], message: str) -> None:
    for call in (
        lambda: reader.answer("why ?", "amber", **numbers),
        lambda: reader.answer_many([], **numbers),
        lambda: reader.answer_chunk([], **numbers),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value) == message


def test_a_merged_model_answers_as_its_adapter(trained: Path, tmp_path: Path, items: list[dict[str, Any]]) -> None:
    merged = tmp_path / "merged"
    assert merge.main(["--adapter", str(trained / "adapter"), "--merged_dir", str(merged)]) == 0
    # All that readers take from the options of a run goes along, and the base model may be gone.
    readers = [Reader(trained / "adapter", device="cpu"), Reader(merged, device="cpu")]
    answers = [[place(answer) for _, answer in reader.answer_many(items)] for reader in readers]
    assert answers[0] == answers[1]
    assert readers[1].settings == readers[0].settings


def test_a_merged_model_may_answer_nothing_where_its_run_could(
    trained: Path, tmp_path: Path, items: list[dict[str, Any]]
) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(trained / "adapter", adapter)
    # What the evaluation of a run with unanswerable questions leaves.
    (adapter / "null_odds.json").write_text("{}", encoding="utf-8")
    some_calibration(threshold=-1e3).write(adapter)
    assert merge.main(["--adapter", str(adapter), "--merged_dir", str(merged)]) == 0
    for folder in (adapter, merged):
        reader = Reader(folder, device="cpu")
        assert reader.allow_no_answer
        assert reader.answer(items[0]["question"], items[0]["context"]).is_no_answer


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys; before = set(sys.modules); import qa_dist; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names == {"qa_dist"}


def test_names_of_the_package_are_there_when_they_are_looked_at() -> None:
    assert qa_dist.Reader is Reader
    assert qa_dist.Answer is Answer
    assert set(qa_dist.__all__) <= set(dir(qa_dist))
    with pytest.raises(AttributeError, match=r"module 'qa_dist' has no attribute 'Writer'"):
        _ = qa_dist.Writer


@pytest.mark.parametrize("page", ["README.md", "docs/answering.md"])
def test_what_a_page_shows_runs(page: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "mine").symlink_to(trained / "adapter")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)
    assert isinstance(names["answer"], Answer)
