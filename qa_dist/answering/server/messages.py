"""What clients send and get: the JSON of requests, answers and errors, and the sentence for each mistake.

The pydantic models are what OpenAPI shows; they check types, and `read_request` what types cannot say.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from qa_dist.answering.records import Question
from qa_dist.answering.server.limits import Limits
from qa_dist.common.parsers import ParseError, read_json, type_name

_LONGEST_SHOWN = 40


class RefusedError(Exception):
    """A request that gets no answer, but a sentence.

    Attributes:
        status: HTTP's code for it.
        headers: What else HTTP says of it.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.headers = dict(headers or {})
        super().__init__(message)


class AnswerRequest(BaseModel):
    """One question about a text, or about several that are searched together; or many questions at once.

    `question` and `context`: one question about one text. `question` and `contexts`: the best answers of all texts.
    `questions` and `context`: each about that text. `questions` and `contexts`: each about its own text.
    """

    model_config = ConfigDict(extra="forbid")

    question: StrictStr | None = Field(None, description="One question")
    context: StrictStr | None = Field(None, description="The text that it, or each of `questions`, is about")
    questions: list[StrictStr] | None = Field(None, description="Several questions")
    contexts: list[StrictStr] | None = Field(
        None, description="With `question`: texts that are searched together. With `questions`: the text of each"
    )
    top_k: Annotated[StrictInt, Field(ge=1)] = Field(1, description="Answers per question; above 1 they are in `nbest`")


class AnswerRecord(BaseModel):
    """An answer, or that there is none."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(description="The answer as it stands in the text; empty if there is none")
    start_char: int = Field(description="Its first character in the text, in code points; -1 if there is none")
    end_char: int = Field(description="The character behind its last; -1 if there is none")
    score: float = Field(description="Sum of the model's logits for start and end, less its length penalty")
    probability: float = Field(description="Share among all candidates of the question, from 0 to 1")
    is_no_answer: bool = Field(description="Whether the model says that the text does not answer the question")
    no_answer_odds: float | None = Field(
        description="Score of no answer minus that of the best answer; null where every question has one"
    )
    context_index: int = Field(description="Which of the question's texts it is in, from 0; -1 if there is none")


class QuestionAnswer(AnswerRecord):
    """The answer to a question, and with `top_k` above 1 the best ones, this one included."""

    nbest: list[AnswerRecord] | None = Field(None, description="The best answers, best first; with `top_k` above 1")


class AnswerResponse(BaseModel):
    """An answer per question, in their order."""

    answers: list[QuestionAnswer]


class ErrorResponse(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="One sentence: what was found, what is allowed")


_EXPECTED = {
    "question": "a string",
    "context": "a string",
    "questions": "a list of strings",
    "contexts": "a list of strings",
    "top_k": "a whole number above 0",
}


def read_request(body: bytes, limits: Limits) -> tuple[list[Question], int]:
    """The questions in the body of a request, and how many answers of each are wanted.

    Raises:
        RefusedError: With 400 if it is not JSON, 413 if it is too much, 422 if it is not a request.
    """
    try:
        value = read_json(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RefusedError(400, f"the body is not UTF-8 at byte {error.start:,}; send JSON in UTF-8") from error
    except ParseError as error:
        raise RefusedError(400, f"the body is not JSON that can be used: {error}") from error
    if not isinstance(value, dict):
        raise RefusedError(422, f'the body is {type_name(value)}, not an object such as {{"question", "context"}}')
    # Before a library looks at all of it: it would say what is wrong with each of a million keys or items.
    for key in value:
        if key not in _EXPECTED:
            raise RefusedError(422, f"{_quoted(key)} is no key of a request; the keys are {', '.join(_EXPECTED)}")
    for name in ("questions", "contexts"):
        if isinstance(value.get(name), list):
            _check_number(name, len(value[name]), limits)
    try:
        request = AnswerRequest.model_validate(value)
    except ValidationError as error:
        raise RefusedError(422, _type_problem(error)) from None
    questions = _questions(request, limits)
    if request.top_k > limits.max_top_k:
        raise RefusedError(422, f'"top_k" is {request.top_k}; at most {limits.max_top_k} are allowed')
    return questions, request.top_k


def _type_problem(error: ValidationError) -> str:
    """The first thing that is wrong with the types of a request, as a sentence."""
    problem = error.errors(include_url=False)[0]
    name, *inside = problem["loc"]
    place = f'"{name}"' if not inside else f'item {inside[0]} of "{name}"'
    found = type_name(problem["input"])
    if name == "top_k" and found == "a number":
        found = str(problem["input"])[:_LONGEST_SHOWN]
    return f'{place} is {found}; "{name}" must be {_EXPECTED[str(name)]}'


def _check_number(name: str, number: int, limits: Limits) -> None:
    """Refuse a list of too many questions or contexts."""
    if number > limits.max_questions:
        raise RefusedError(413, f'"{name}" has {number} items; at most {limits.max_questions} are allowed')


def _quoted(text: str) -> str:
    # Half a surrogate pair is no text that could be sent back.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return f'"{text[:_LONGEST_SHOWN]}{"..." if len(text) > _LONGEST_SHOWN else ""}"'


def _questions(request: AnswerRequest, limits: Limits) -> list[Question]:
    """What is asked, each question with its texts.

    Raises:
        RefusedError: Keys do not go together, or a text is too long or none.
    """
    if (request.question is None) == (request.questions is None):
        raise RefusedError(422, 'give either "question", a string, or "questions", a list of strings')
    if (request.context is None) == (request.contexts is None):
        raise RefusedError(422, 'give either "context", a string, or "contexts", a list of strings')
    questions = [request.question] if request.question is not None else request.questions or []
    contexts = [request.context] if request.context is not None else request.contexts or []
    for name, texts in (("question", questions), ("context", contexts)):
        if not texts:
            raise RefusedError(422, f'"{name}s" is empty; give at least one')
        _check_number(f"{name}s", len(texts), limits)
        plural = len(texts) > 1 or getattr(request, name) is None
        for index, text in enumerate(texts):
            _check_text(text, f'item {index} of "{name}s"' if plural else f'"{name}"', limits)
    if request.question is not None:
        return [Question(request.question, tuple(contexts))]
    if request.context is not None:
        return [Question(question, (request.context,)) for question in questions]
    if len(questions) != len(contexts):
        raise RefusedError(
            422,
            f'"questions" has {len(questions)} items and "contexts" {len(contexts)}; give each question its text, or '
            'one "context" for all',
        )
    return [Question(question, (context,)) for question, context in zip(questions, contexts, strict=True)]


def _check_text(text: str, place: str, limits: Limits) -> None:
    if not text.strip():
        raise RefusedError(422, f"{place} is {'empty' if not text else 'nothing but blanks'}; give a text")
    if len(text) > limits.max_context_characters:
        raise RefusedError(
            413, f"{place} has {len(text):,} characters; at most {limits.max_context_characters:,} are allowed"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(422, f"{place} holds half of a surrogate pair at character {error.start:,}") from None
