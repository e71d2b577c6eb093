"""The pipeline answers as that of transformers 4.57 did, whose answers are kept, and takes what it took."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

import qa_dist
from qa_dist.answering.reader import Reader
from qa_dist.common.errors import UserError
from tests.support import pipeline_fixture
from tests.support.pipeline_fixture import CONTEXT, LENGTHS, OPTIONS, QUESTIONS, make_model
from tests.tiny import tiny_model
from tests.unit.trained import edit_json

KEPT = json.loads((Path(__file__).parents[2] / "fixtures" / "pipeline_4_57.json").read_text(encoding="utf-8"))
AT_THE_EDGE = {"572a0b101d046914007796eb": [211, 220], "5726e942f1498d1400e8efa1": [559, 571]}
"""Answers that begin with a word of which their window has only the end: 4.57 begins in the middle of it."""

ASKED = {"question": QUESTIONS[0], "context": CONTEXT}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def pipe(model: Path) -> Any:
    qa_dist.register_pipeline()
    return transformers.pipeline("question-answering", model=str(model), device="cpu")


def are_same(found: list[list[Any]], expected: list[list[Any]]) -> bool:
    """Whether places are the same, and scores to 1e-4."""
    return [answer[:2] for answer in found] == [answer[:2] for answer in expected] and all(
        abs(one[2] - other[2]) < 1e-4 for one, other in zip(found, expected, strict=True)
    )


def test_answers_with_any_options_are_those_of_transformers_4(pipe: Any) -> None:
    found = pipeline_fixture.own_answers(pipe)
    assert len(found) == len(KEPT["own"]) == len(OPTIONS) == 8
    for options, answers, expected in zip(OPTIONS, found, KEPT["own"], strict=True):
        for question, one, other in zip(QUESTIONS, answers, expected, strict=True):
            assert are_same(one, other), (options, question)
    assert [0, 0] in [place[:2] for place in KEPT["own"][3][0]], "no answer is among the kept"


@pytest.mark.squad
def test_answers_to_squad_are_those_of_transformers_4(pipe: Any, squad_dir: Path) -> None:
    questions = pipeline_fixture.squad_questions(squad_dir / "dev-v1.1.json.gz")
    assert [entry["id"] for entry in questions] == list(KEPT["squad"])
    chosen = [entry for place, entry in enumerate(questions) if place % 6 == 0 or entry["id"] in AT_THE_EDGE]
    found = pipeline_fixture.squad_answers(pipe, chosen)
    assert len(found) > 50
    for key, answer in found.items():
        place = AT_THE_EDGE.get(key, KEPT["squad"][key][:2])
        assert are_same([answer], [[*place, KEPT["squad"][key][2]]]), key
        assert (answer[:2] == KEPT["squad"][key][:2]) == (key not in AT_THE_EDGE)


def test_a_call_takes_what_it_took(pipe: Any) -> None:
    one = pipe(**ASKED, **LENGTHS)
    assert set(one) == {"score", "start", "end", "answer"}
    assert one["answer"] == CONTEXT[one["start"] : one["end"]]
    other = pipe(question=QUESTIONS[1], context=CONTEXT, **LENGTHS)
    both = [ASKED, {"question": QUESTIONS[1], "context": CONTEXT}]
    for args, options, expected in (
        ((ASKED,), {}, one),
        (([ASKED],), {}, one),
        ((ASKED["question"], CONTEXT), {}, one),
        ((both,), {}, [one, other]),
        (tuple(both), {}, [one, other]),
        ((), {"data": both}, [one, other]),
        ((), {"X": tuple(both)}, [one, other]),
        ((), {"question": list(QUESTIONS[:2]), "context": CONTEXT}, [one, other]),
        ((), {"question": list(QUESTIONS[:2]), "context": [CONTEXT, CONTEXT]}, [one, other]),
        ((), {**ASKED, "batch_size": 8, "padding": "max_length"}, one),
        (([],), {}, []),
    ):
        answers = pipe(*args, **options, **LENGTHS)
        assert [rounded(each) for each in listed(answers)] == [rounded(each) for each in listed(expected)]
        assert isinstance(answers, list) == isinstance(expected, list)
    with pytest.warns(UserWarning, match="topk parameter is deprecated"):
        assert len(pipe(**ASKED, topk=2, **LENGTHS)) == 2


def listed(answers: Any) -> list[Any]:
    return answers if isinstance(answers, list) else [answers]


def rounded(answer: dict[str, Any]) -> dict[str, Any]:
    """Batches of other windows round otherwise."""
    return {**answer, "score": round(answer["score"], 5)}


def test_a_generator_is_answered_as_it_goes(pipe: Any) -> None:
    taken = []

    def endless() -> Any:
        while True:
            taken.append(1)
            yield ASKED

    answers = pipe(endless(), **LENGTHS)
    assert not taken
    assert next(answers)["answer"] == next(answers)["answer"]
    assert len(taken) == 256


def test_what_a_generator_gave_before_it_failed_is_answered(pipe: Any) -> None:
    def failing(problem: Exception | None) -> Any:
        yield from [ASKED] * 3
        if problem is not None:
            raise problem

    for problem in (OSError("the disk is gone"), None):
        answers = []
        with pytest.raises(OSError, match="the disk is gone") if problem else contextlib.nullcontext():
            answers.extend(pipe(failing(problem), **LENGTHS))
        assert len(answers) == 3


def test_options_of_the_pipeline_hold_until_a_call_has_others(model: Path) -> None:
    qa_dist.register_pipeline()
    pipe = transformers.pipeline("question-answering", model=str(model), device="cpu", top_k=3, **LENGTHS)
    assert len(pipe(**ASKED)) == 3
    assert isinstance(pipe(**ASKED, top_k=1), dict)


def test_long_questions_are_refused_or_cut(pipe: Any) -> None:
    long = " ".join(["amber"] * 100)
    with pytest.raises(
        UserError, match="a question has 100 tokens, and windows of 128 with a doc_stride of 32 have room"
    ):
        pipe(question=long, context=CONTEXT, **LENGTHS)
    cut, short = (
        pipe(question=question, context=CONTEXT, max_question_len=9, **LENGTHS)
        for question in (long, " ".join(["amber"] * 9))
    )
    assert cut == short


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"question": "why ?"}, "there is no question, or no context"),
        ({"question": "why ?", "context": ""}, "the context is empty"),
        ({"question": "why ?", "context": None}, "the context is of type NoneType; give a text"),
        ({"question": ["a", "b"], "context": ["c"]}, "there are 2 questions and 1 contexts; give as many"),
        ({"data": [{"question": "why ?"}]}, "an input is no mapping with `question` and `context`"),
        ({"data": 7}, "the input is of type int"),
        ({**ASKED, "top_k": 0}, "top_k is 0; give a whole number of 1 or more"),
        ({**ASKED, "max_answer_len": 0}, "max_answer_len is 0; give a whole number of 1 or more"),
        ({**ASKED, "handle_impossible_answer": "yes"}, "handle_impossible_answer is 'yes'; give True or False"),
        ({**ASKED, "max_answer_length": 3}, "max_answer_length is no option of a question-answering pipeline"),
        ({**ASKED, "max_seq_len": 32, "doc_stride": 40}, "doc_stride 40 leaves no room for a question"),
    ],
)
def test_what_cannot_be_used_is_refused(pipe: Any, call: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        pipe(**call)
    assert str(caught.value).startswith(message)
    assert "--" not in str(caught.value)


def test_an_adapter_is_read_with_its_head(trained: Path) -> None:
    adapter = trained / "adapter"
    qa_dist.register_pipeline()
    pipe = transformers.pipeline("question-answering", model=str(adapter), device="cpu")
    answer = pipe(**ASKED, align_to_words=False, max_seq_len=64, doc_stride=16)
    text = Reader(adapter, device="cpu", max_answer_length=15).answer(ASKED["question"], CONTEXT).text
    assert answer["answer"] == text


@pytest.fixture
def adapter_on_a_package(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The adapter of a run whose --model_name_or_path was package:a_package_with_a_model/model."""
    package = tmp_path / "packages" / "a_package_with_a_model"
    shutil.copytree(trained / "model", package / "model")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    adapter = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", adapter)
    base = "package:a_package_with_a_model/model"
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=base)
    config = (adapter / "config.yaml").read_text(encoding="utf-8")
    (adapter / "config.yaml").write_text(config.replace(str(trained / "model"), base), encoding="utf-8")
    return adapter


def test_the_base_of_an_adapter_may_be_in_a_package(adapter_on_a_package: Path) -> None:
    qa_dist.register_pipeline()
    pipe = transformers.pipeline("question-answering", model=str(adapter_on_a_package), device="cpu")
    answer = pipe(**ASKED, align_to_words=False, max_seq_len=64, doc_stride=16)
    text = Reader(adapter_on_a_package, device="cpu", max_answer_length=15).answer(ASKED["question"], CONTEXT).text
    assert answer["answer"] == text
    edit_json(adapter_on_a_package / "adapter_config.json", base_model_name_or_path="package:no_such_package_here/x")
    with pytest.raises(UserError, match="needs the Python package no_such_package_here, which is not installed"):
        transformers.pipeline("question-answering", model=str(adapter_on_a_package), device="cpu")


def test_a_context_without_tokens_has_the_empty_answer(pipe: Any) -> None:
    empty = {"score": 0.0, "start": 0, "end": 0, "answer": ""}
    assert pipe(question="When?", context="\u200b", **LENGTHS) == empty
    asked = [{"question": "When?", "context": "\u200b"}, ASKED]
    first, second = pipe(asked, top_k=3, **LENGTHS)
    assert first == empty
    assert len(second) == 3


def test_without_a_model_it_says_that_one_is_to_be_named() -> None:
    qa_dist.register_pipeline()
    with pytest.raises(UserError, match='a pipeline for "question-answering" has no model of its own; name one'):
        transformers.pipeline("question-answering")


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    qa_dist.register_pipeline()
    folder = str(tiny_model("bert", tmp_path / "headless"))
    with pytest.raises(UserError, match="the model is a BertModel, which has no head for question answering"):
        transformers.pipeline("question-answering", model=folder, device="cpu")


def test_a_saved_pipeline_is_a_model_without_code(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith(".py")]
    assert "custom_pipelines" not in json.loads((tmp_path / "saved" / "config.json").read_text())
