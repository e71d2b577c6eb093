"""A reader: questions and texts in, answers out.

What a run's evaluation does with a data set, a reader does with questions as they come: the same windows, the same
passes over real tokens, the same decoding.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

from qa_dist.answering.opening import PYTHON_NAMES, OnnxOptions, open_model
from qa_dist.answering.ranking import ranked
from qa_dist.answering.records import OVERLAP_THRESHOLD, Answer, InvalidQuestionError, Question
from qa_dist.common.errors import ConfigError, DataError
from qa_dist.common.notebook import named_as_in_python
from qa_dist.data.records import Example
from qa_dist.evaluation.answers import decode
from qa_dist.features.table import FeatureTable
from qa_dist.features.windows import FeatureBuilder, FeatureColumns, FeatureSpec

QUESTIONS_TOGETHER = 256
CHARACTERS_TOGETHER = 262_144
"""Most questions, and most characters of them with their contexts, that `answer_many` takes before it answers."""

SLOWEST_STEP = 8
"""By how many times less than beside no question a window may advance before a question is costly."""

_END = object()
"""What `next` gives when there are no more items."""


class Reader:
    """A trained model that answers questions about texts.

    Any number of threads may share one. It keeps nothing of what it was asked.

    Attributes:
        model: the name it was opened by.
        backend: what computes the model.
        config: the configuration of its run with what was given instead.
        temperature: what scores are divided by before the softmax of probabilities.
        allow_no_answer: whether "no answer" is a choice.
        notes: what the user should know about the model, one sentence each.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: Any = None,
        max_seq_length: int | None = None,
        doc_stride: int | None = None,
        max_question_length: int | None = None,
        max_answer_length: int | None = None,
        answer_length_penalty: float | None = None,
        n_best_size: int | None = None,
        allow_no_answer: bool | None = None,
        null_score_diff_threshold: float | None = None,
        temperature: float | None = None,
        tokens_per_batch: int | None = None,
        mixed_precision: str | None = None,
        quantized: bool | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Load a model.

        What is not given is as in the run that trained the model; of a model that was trained elsewhere, it is the
        default of the option, and lengths are shortened to what the model can read.

        Args:
            model: Folder of an adapter, a whole or an exported model, package:NAME/FOLDER, or hub id.
            device: As torch names it, such as "cpu" or "cuda:1"; None: the first GPU, or the CPU where there is none.
            max_seq_length: Tokens of a window, special tokens included.
            doc_stride: Tokens that consecutive windows of a context share.
            max_question_length: Longer questions are cut to so many tokens; None: those that do not fit are refused.
            max_answer_length: Tokens of the longest answer.
            answer_length_penalty: What each token of an answer behind its first takes off its score.
            n_best_size: Candidates kept of each window and of each context.
            allow_no_answer: Whether "no answer" is a choice; None: if it was one in the run's evaluation.
            null_score_diff_threshold: How much better than the best answer "no answer" must be; None: as tuned for the
                model, else as in the run.
            temperature: What scores are divided by before the softmax of probabilities; None: as tuned, else 1.
            tokens_per_batch: Tokens of one pass; None: as in the run, else 576 on a CPU, 16384 on a GPU; 512 of an
                exported model.
            mixed_precision: "no", "bf16" or "fp16"; None: on a GPU that of the run, on a CPU "no".
            quantized: Of an exported model, whether its file with weights of 8 bits computes; None: if there is one.
            num_threads: Of an exported model, threads that compute, a batch each where there are so many, else one
                together; None: as many as OMP_NUM_THREADS says, else one for each core.

        Raises:
            UserError: There is no such model, or an option does not fit it.
        """
        self.model = os.fsdecode(model)
        options = {
            "max_seq_length": max_seq_length,
            "doc_stride": doc_stride,
            "max_question_length": max_question_length,
            "max_answer_length": max_answer_length,
            "answer_length_penalty": answer_length_penalty,
            "n_best_size": n_best_size,
            "null_score_diff_threshold": null_score_diff_threshold,
            "eval_tokens_per_device": tokens_per_batch,
        }
        with named_as_in_python(PYTHON_NAMES, kind=ConfigError):
            opened = open_model(
                self.model,
                device=None if device is None else str(device),
                mixed_precision=mixed_precision,
                options=options,
                onnx=OnnxOptions(quantized, num_threads),
            )
            data = opened.config.data
            lengths = FeatureSpec(data.max_seq_length, data.doc_stride, data.max_question_length)
            self._builder = FeatureBuilder(opened.backend.tokenizer, lengths)
        self.backend = opened.backend
        self.config = opened.config
        self.temperature = _checked_temperature(temperature) if temperature is not None else opened.temperature
        if not isinstance(allow_no_answer, bool | None):
            raise ConfigError([f"allow_no_answer is {allow_no_answer!r}; give True, False or None"])
        self.allow_no_answer = opened.allows_no_answer if allow_no_answer is None else allow_no_answer
        self.notes = tuple(self.backend.notes)
        if null_score_diff_threshold is not None and not self.allow_no_answer:
            self.notes += ("null_score_diff_threshold decides nothing, as allow_no_answer is false: all is answered",)
        self._cuts_questions = data.max_question_length is not None

    def __repr__(self) -> str:
        return f"Reader({self.model!r}, device={self.backend.device!r})"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the model that answers depend on, by name, as JSON types."""
        data, evaluation = self.config.data, self.config.evaluation
        return {
            "max_seq_length": data.max_seq_length,
            "doc_stride": data.doc_stride,
            "max_question_length": data.max_question_length,
            "max_answer_length": evaluation.max_answer_length,
            "answer_length_penalty": evaluation.answer_length_penalty,
            "n_best_size": evaluation.n_best_size,
            "decoding": evaluation.decoding,
            "allow_no_answer": self.allow_no_answer,
            "null_score_diff_threshold": evaluation.null_threshold,
            "temperature": self.temperature,
            "tokens_per_batch": evaluation.eval_tokens_per_device,
            "mixed_precision": self.backend.mixed_precision,
        }

    @overload
    def answer(
        self,
        question: str,
        context: str | Sequence[str],
        top_k: Literal[1] = 1,
        *,
        overlap_threshold: float | None = OVERLAP_THRESHOLD,
    ) -> Answer: ...

    @overload
    def answer(
        self,
        question: str,
        context: str | Sequence[str],
        top_k: int,
        *,
        overlap_threshold: float | None = OVERLAP_THRESHOLD,
    ) -> Answer | list[Answer]: ...

    def answer(
        self,
        question: str,
        context: str | Sequence[str],
        top_k: int = 1,
        *,
        overlap_threshold: float | None = OVERLAP_THRESHOLD,
    ) -> Answer | list[Answer]:
        """The answer to a question, or with `top_k` above 1 a list of the best ones.

        Args:
            question: The question.
            context: A text, or several; answers then come from whichever has the best.
            top_k: Most answers; there may be fewer.
            overlap_threshold: As in `answer_chunk`.

        Raises:
            UserError: Question, context or numbers cannot be used.
        """
        try:
            (found,) = self.answer_chunk([Question.of(question, context)], top_k, overlap_threshold=overlap_threshold)
        except InvalidQuestionError as error:
            raise DataError(error.problem) from error
        return found[0] if top_k == 1 else found

    def answer_many(
        self, items: Iterable[Mapping[str, Any]], top_k: int = 1, *, overlap_threshold: float | None = OVERLAP_THRESHOLD
    ) -> Iterator[tuple[Mapping[str, Any], Answer | list[Answer]]]:
        """Each item with its answer, or with `top_k` above 1 a list of answers, in the order of the items.

        Items are taken as answers are needed: so many ahead that batches are full, and no more, whatever their number.

        Args:
            items: Mappings with a `question` and a `context`, as `answer` takes them; other keys do no harm.
            top_k: Most answers of each.
            overlap_threshold: As in `answer_chunk`.

        Raises:
            UserError: An item cannot be used; all before it have been answered, and so they have where
                `items` itself raises.
        """
        _check_numbers(top_k, overlap_threshold, self.config.evaluation.n_best_size)
        return self._answered(iter(items), top_k, overlap_threshold)

    def _answered(
        self, items: Iterator[Mapping[str, Any]], top_k: int, overlap_threshold: float | None
    ) -> Iterator[tuple[Mapping[str, Any], Answer | list[Answer]]]:
        number = 0
        is_over = False
        while not is_over:
            chunk: list[tuple[Mapping[str, Any], Question]] = []
            problem: Exception | None = None
            num_characters = 0
            while len(chunk) < QUESTIONS_TOGETHER and num_characters < CHARACTERS_TOGETHER:
                try:
                    item: Any = next(items, _END)
                # Whatever it is, it comes behind the answers to all that was given before.
                except Exception as error:
                    problem = error
                    break
                if item is _END:
                    is_over = True
                    break
                number += 1
                try:
                    question = _question_of(item)
                    if too_long := self.problem(question):
                        raise DataError(too_long)
                except DataError as error:
                    problem = DataError(f"item {number}: {error}")
                    break
                chunk.append((item, question))
                num_characters += len(question.question) + sum(map(len, question.contexts))
            found = self.answer_chunk([question for _, question in chunk], top_k, overlap_threshold=overlap_threshold)
            for (item, _), answers in zip(chunk, found, strict=True):
                yield item, answers[0] if top_k == 1 else answers
            if problem is not None:
                raise problem

    def problem(self, question: Question) -> str | None:
        """What keeps this model from answering a question, as a sentence; None if nothing does."""
        if self._cuts_questions:
            return None
        length, longest = self._builder.question_length(question.question), self._builder.max_question_length
        if length <= longest:
            return None
        return (
            f"the question has {length:,} tokens, and a window of {self.config.data.max_seq_length} with a stride of "
            f"{self.config.data.doc_stride} has room for {longest}; shorten it, or set max_question_length to cut it"
        )

    def cost_problem(self, question: Question) -> str | None:
        """What makes a question cost many times what others do about the same text, or leave it no room; else None.

        The longer it is, the less of the text a window has beside it, and windows overlap by the stride: towards the
        longest question each of them is only a token further on than the last one.
        """
        length = self._builder.question_length(question.question)
        if self._cuts_questions:
            length = min(length, self._builder.max_question_length)
        usual = self._builder.window_step(0)
        if self._builder.window_step(length) >= usual / SLOWEST_STEP:
            return None
        longest = usual - math.ceil(usual / SLOWEST_STEP)
        return f"the question has {length:,} tokens; at most {longest} are allowed here"

    def answer_chunk(
        self, questions: Sequence[Question], top_k: int = 1, *, overlap_threshold: float | None = OVERLAP_THRESHOLD
    ) -> list[list[Answer]]:
        """The answers to each question, best first: a function of these questions alone.

        The batches that are computed depend on the lengths of these questions' windows and on nothing else.

        Args:
            questions: The questions.
            top_k: Most answers of each; there may be fewer, but at least one, if need be that there is no answer.
            overlap_threshold: Of two answers in one context that share more than this share of the shorter one's
                characters, the better one is kept; None: both.

        Raises:
            InvalidQuestionError: One cannot be answered; it names the first.
            UserError: A number is out of its range, or the model's logits are not numbers.
        """
        evaluation = self.config.evaluation
        _check_numbers(top_k, overlap_threshold, evaluation.n_best_size)
        examples = [
            Example(id=f"{place}:{number}", question=question.question, context=context, has_references=False)
            for place, question in enumerate(questions)
            for number, context in enumerate(question.contexts)
        ]
        if not examples:
            return []
        features, stats = self._builder.build(examples)
        if stats.num_truncated_questions and not self._cuts_questions:
            for place, question in enumerate(questions):
                if problem := self.problem(question):
                    raise InvalidQuestionError(place, problem)
        columns = FeatureColumns.of(features)
        answers = decode(
            self.backend.candidates(columns, evaluation),
            FeatureTable.of(columns).feature_map(),
            [example.context for example in examples],
            [example.id for example in examples],
            n_best_size=evaluation.n_best_size,
            version_2=self.allow_no_answer,
            null_score_diff_threshold=evaluation.null_threshold,
            temperature=self.temperature,
        )
        found = []
        first = 0
        for question in questions:
            found.append(
                ranked(
                    answers,
                    first,
                    len(question.contexts),
                    top_k=top_k,
                    overlap_threshold=overlap_threshold,
                    threshold=evaluation.null_threshold,
                    temperature=self.temperature,
                )
            )
            first += len(question.contexts)
        return found


def _question_of(item: Any) -> Question:
    """The question that an item asks.

    Raises:
        DataError: It is no mapping, or lacks a key.
    """
    if not isinstance(item, Mapping):
        raise DataError(f"it is of type {type(item).__name__}; give a mapping with `question` and `context`")
    for key in ("question", "context"):
        if key not in item:
            raise DataError(f"it has no `{key}`; give a mapping with `question` and `context`")
    return Question.of(item["question"], item["context"])


def _checked_temperature(temperature: Any) -> float:
    """The temperature.

    Raises:
        ConfigError: It is no number above 0.
    """
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not (is_number and 0 < temperature < math.inf):
        raise ConfigError([f"temperature is {temperature!r}; give a number above 0"])
    return float(temperature)


def _check_numbers(top_k: Any, overlap_threshold: Any, n_best_size: int) -> None:
    """Refuse what is out of range.

    Raises:
        ConfigError: It is.
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ConfigError([f"top_k is {top_k!r}; give a whole number of 1 or more"])
    if top_k > n_best_size:
        raise ConfigError([f"top_k is {top_k}, but n_best_size is {n_best_size}: no more answers are kept; raise that"])
    if overlap_threshold is None:
        return
    is_number = isinstance(overlap_threshold, int | float) and not isinstance(overlap_threshold, bool)
    if not is_number or not 0 <= overlap_threshold <= 1:
        raise ConfigError([f"overlap_threshold is {overlap_threshold!r}; give a number from 0 to 1, or None"])
