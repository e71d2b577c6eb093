"""The question-answering pipeline that transformers had until version 5, for `transformers.pipeline`.

Inputs, options, outputs and the meaning of a score are those of transformers 4.57: a score is the probability of the
first token times that of the last one, each a softmax over the context and the CLS token of a window; of a text that
several spans or windows give, the scores are added up; spans are widened to whole words. The windows, the passes and
the search for spans are those of this project: many questions at a time, exact over all spans. docs/answering.md lists
what differs.
"""

import collections.abc
import os
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import transformers
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline

from qa_dist.answering.opening import configuration_of
from qa_dist.answering.package_bases import let_bases_be_packages
from qa_dist.answering.records import Question
from qa_dist.answering.torch_backend import device_lock
from qa_dist.common.arrays import Int32
from qa_dist.common.errors import CheckpointError, ConfigError, DataError
from qa_dist.common.notebook import named_as_in_python
from qa_dist.config.options import EvaluationConfig
from qa_dist.data.records import Example
from qa_dist.evaluation.candidates import CandidateTable
from qa_dist.evaluation.passes import BatchLogits, candidates, logits_of
from qa_dist.features.batching import evaluation_batches
from qa_dist.features.table import FeatureTable
from qa_dist.features.token_budget import EVALUATION_TOKENS
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureBuilder, FeatureColumns, FeatureSpec
from qa_dist.model.building import longest_feature
from qa_dist.model.families import family_of
from qa_dist.model.hub import local_copy
from qa_dist.model.merging import fold, load_plain
from qa_dist.model.precision import autocast
from qa_dist.model.pretrained import ADAPTER_CONFIG
from qa_dist.model.span_model import SpanModel

TASK = "question-answering"
_TOGETHER = 256
"""Questions that are computed together."""

_INPUTS = ("question", "context", "X", "data")
_WITHOUT_EFFECT = ("padding", "batch_size", "num_workers")
"""What 4.57 has to say how it computes; answers do not depend on it, and batches are made by tokens here."""


def register_pipeline() -> None:
    """Let `transformers.pipeline("question-answering", ...)` make pipelines again, in this process."""
    # Transformers 5.2x refuses the tasks in this table before it looks into its registry.
    getattr(transformers.pipelines, "REMOVED_TASKS", {}).pop(TASK, None)
    registered = PIPELINE_REGISTRY.supported_tasks.get(TASK, {}).get("impl")
    if registered is not QuestionAnsweringPipeline:
        PIPELINE_REGISTRY.register_pipeline(
            TASK, QuestionAnsweringPipeline, pt_model=_Models, default=_NoDefault(model=None), type="text"
        )
        # By this, pipelines that are saved would put this file into their model's folder, to be run from there.
        del QuestionAnsweringPipeline._registered_impl
    let_bases_be_packages()


class _NoDefault(dict[str, Any]):
    """What transformers looks into when no model is named."""

    def __getitem__(self, key: str) -> Any:
        raise ConfigError([f'a pipeline for "{TASK}" has no model of its own; name one, as model="outputs/mine"'])


class _Models(transformers.AutoModelForQuestionAnswering):  # type: ignore[misc]
    """The class whose `from_pretrained` transformers.pipeline calls for this task; it folds adapters in."""

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, **options: Any) -> Any:
        """The model in a folder or on the hub; of an adapter's folder the whole model, folded into one.

        Transformers alone (5.23) would load the adapter and leave the head random.

        Raises:
            UserError: Its head would be random.
        """
        found = local_copy(name, options.get("cache_dir"))
        if os.path.isfile(os.path.join(found, ADAPTER_CONFIG)):
            return fold(load_plain(configuration_of(found, {}), found, tokenizer_pads_left=False, padding="sorted"))
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **options)
        if info["missing_keys"]:
            raise CheckpointError(
                f"{name} lacks {', '.join(sorted(info['missing_keys'])[:3])}, which would be random; give a model that "
                "was trained for question answering"
            )
        return model


@dataclass(frozen=True, slots=True, eq=False)
class _Windows:
    """Questions, and the windows of their contexts."""

    questions: Sequence[Question]
    table: FeatureTable


@dataclass(frozen=True, slots=True, eq=False)
class _Computed:
    """Windows with their logits, batch by batch, on the host."""

    windows: _Windows
    batches: Sequence[BatchLogits]


class QuestionAnsweringPipeline(Pipeline):  # type: ignore[misc]
    """Answers questions about texts; see `__call__`."""

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    default_input_names = "question,context"
    handle_impossible_answer = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kind = type(self.model).__name__
        if "ForQuestionAnswering" not in kind:
            raise ConfigError([f"the model is a {kind}, which has no head for question answering; give one that has"])
        self._spec = TokenizerSpec.of(self.tokenizer)
        self._longest = longest_feature(self.model.config)
        pads_left = self.tokenizer.padding_side == "left"
        # Of the lengths, only those of a batch count in padding to its longest.
        self._span_model = SpanModel(self.model, padding="sorted", max_seq_length=0, tokenizer_pads_left=pads_left)
        family = family_of(self.model.config)
        self._is_padding_read = family.depends_on_padding or family.has_blocks(self.model.config)
        self._builders: dict[FeatureSpec, FeatureBuilder] = {}
        self._words = _Words(self._spec)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The answers to questions about contexts.

        Args:
            *args: A mapping with `question` and `context`, or several in a list or generator; or both as two texts.
            **kwargs: `question` and `context`, each a text or a list of as many (one context may serve all questions),
                and options: `top_k` (1), `doc_stride` (128, or half of `max_seq_len`), `max_answer_len` (15 tokens),
                `max_seq_len` (384, or what the model can read), `max_question_len` (tokens to which questions are cut;
                none), `handle_impossible_answer` (false), `align_to_words` (true).

        Returns:
            For one question a mapping with `score`, `start`, `end` and `answer`, or a list of up to `top_k` of them if
            there are several; for several questions a list of these, for a generator an iterator.

        Raises:
            UserError: The input or an option cannot be used; it is a ValueError.
        """
        inputs = _inputs(args, kwargs)
        given = self._sanitize_parameters(**{name: value for name, value in kwargs.items() if name not in _INPUTS})
        before = (self._preprocess_params, self._forward_params, self._postprocess_params)
        options = [{**usual, **more} for usual, more in zip(before, given, strict=True)]
        if isinstance(inputs, types.GeneratorType):
            return self._answered(map(_question, inputs), *options)
        questions = [_question(item) for item in inputs]
        found = list(self._answered(iter(questions), *options))
        return found[0] if len(found) == 1 else found

    def _answered(self, questions: Iterator[Question], *options: Mapping[str, Any]) -> Iterator[Any]:
        while True:
            chunk: list[Question] = []
            problem: Exception | None = None
            try:
                chunk.extend(islice(questions, _TOGETHER))
            # Whatever it is, it comes behind the answers to all that was given before.
            except Exception as error:
                problem = error
            if chunk:
                yield from self.run_single(chunk, *options)
            if problem is not None:
                raise problem
            if not chunk:
                return

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if "topk" in options:
            warnings.warn("topk parameter is deprecated, use top_k instead", UserWarning, stacklevel=3)
            options.setdefault("top_k", options.pop("topk"))
        given = {name: value for name, value in options.items() if value is not None and name not in _WITHOUT_EFFECT}
        numbers = ("doc_stride", "max_question_len", "max_seq_len", "top_k", "max_answer_len")
        truths = ("handle_impossible_answer", "align_to_words")
        for name, value in given.items():
            if name not in (*numbers, *truths):
                known = ", ".join((*numbers, *truths, *_WITHOUT_EFFECT))
                raise ConfigError([f"{name} is no option of a question-answering pipeline; it has {known}"])
            smallest = 0 if name == "doc_stride" else 1
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if name in numbers and not (is_number and value >= smallest):
                raise ConfigError([f"{name} is {value!r}; give a whole number of {smallest} or more"])
            if name in truths and not isinstance(value, bool):
                raise ConfigError([f"{name} is {value!r}; give True or False"])
        before = {name: given[name] for name in numbers[:3] if name in given}
        behind = {name: given[name] for name in (*numbers[3:], *truths) if name in given}
        return before, {}, behind

    def preprocess(
        self,
        questions: Sequence[Question],
        *,
        doc_stride: int | None = None,
        max_question_len: int | None = None,
        max_seq_len: int | None = None,
    ) -> dict[str, _Windows]:
        """The windows of the questions' contexts.

        Raises:
            UserError: The lengths contradict each other, or a question leaves no room for its context.
        """
        if max_seq_len is None:
            max_seq_len = min(self.tokenizer.model_max_length, 384, self._longest or 384)
        if doc_stride is None:
            doc_stride = min(max_seq_len // 2, 128)
        lengths = FeatureSpec(max_seq_len, doc_stride, max_question_len)
        if lengths not in self._builders:
            self._builders[lengths] = _builder(self._spec, lengths)
        builder = self._builders[lengths]
        examples = [
            Example(id=str(place), question=question.question, context=question.contexts[0], has_references=False)
            for place, question in enumerate(questions)
        ]
        features, stats = builder.build(examples)
        if stats.num_truncated_questions and max_question_len is None:
            length = max(builder.question_length(example.question) for example in examples)
            raise DataError(
                f"a question has {length:,} tokens, and windows of {max_seq_len} with a doc_stride of {doc_stride} "
                f"have room for {builder.max_question_length}; shorten it, or give max_question_len to cut it"
            )
        return {"windows": _Windows(questions, FeatureTable.of(FeatureColumns.of(features)))}

    def _forward(self, model_inputs: dict[str, _Windows]) -> _Computed:
        windows = model_inputs["windows"]
        lengths = windows.table.lengths
        # One by one where logits depend on how far a window is padded.
        budget = 1 if self._is_padding_read else EVALUATION_TOKENS.get(self.device.type, EVALUATION_TOKENS["cuda"])
        with device_lock(self.device):
            computed = logits_of(
                self._span_model,
                windows.table,
                evaluation_batches(lengths, budget),
                self.device,
                autocast=lambda: autocast(self.device.type, "no"),
            )
            return _Computed(windows, list(computed))

    def postprocess(
        self,
        computed: _Computed,
        *,
        top_k: int = 1,
        handle_impossible_answer: bool = False,
        max_answer_len: int = 15,
        align_to_words: bool = True,
    ) -> list[Any]:
        """What 4.57 returns for each question: a mapping, or a list of several."""
        table = computed.windows.table
        # As many spans of a window as 4.57 looks at: widened to words, some become the same.
        config = EvaluationConfig(
            n_best_size=top_k * 2 + 10 if align_to_words else top_k, max_answer_length=max_answer_len
        )
        found = CandidateTable.concatenate(list(candidates(computed.batches, config))).ordered(table.num_features)
        logs_N2 = _log_totals(computed.batches, table, self.tokenizer.cls_token_id is not None)
        of_question: list[list[dict[str, Any]]] = [[] for _ in computed.windows.questions]
        nulls = [1.0 for _ in computed.windows.questions]
        places = table.feature_map()
        for window, number in enumerate(table.example_index.tolist()):
            context = computed.windows.questions[number].contexts[0]
            spans = found.candidates(window)
            row = np.full(len(spans), window)
            starts = places.start_chars(row, np.array([span.start_token for span in spans], np.int32))
            ends = places.end_chars(row, np.array([span.end_token for span in spans], np.int32))
            if align_to_words:
                starts, ends = self._words.widened(context, starts, ends)
            total = float(logs_N2[window].sum())
            for span, start, end in zip(spans, starts.tolist(), ends.tolist(), strict=True):
                _add(of_question[number], context, start, end, float(np.exp(span.score - total)))
            null = float(found.null_start_logit_N[window]) + float(found.null_end_logit_N[window])
            nulls[number] = min(nulls[number], float(np.exp(null - total)))
        if handle_impossible_answer:
            for answers, null in zip(of_question, nulls, strict=True):
                answers.append({"score": null, "start": 0, "end": 0, "answer": ""})
        return [_best(answers, top_k) for answers in of_question]


class _Words:
    """Where the words of texts are, as a tokenizer cuts them before it cuts tokens."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._backend = tokenizers.Tokenizer.from_str(spec.backend)
        self._backend.encode_special_tokens = True

    def widened(self, text: str, starts: Int32, ends: Int32) -> tuple[Int32, Int32]:
        """Spans of characters that begin and end where the words do in which they begin and end.

        A place in no word, as tokenizers without words have it, stays as it is.
        """
        first_W, last_W = self._spans(text)
        if not len(first_W):
            return starts, ends
        word = np.maximum(np.searchsorted(first_W, starts, side="right") - 1, 0)
        is_inside = (starts >= first_W[word]) & (starts < last_W[word])
        starts = np.where(is_inside, first_W[word], starts)
        word = np.maximum(np.searchsorted(first_W, ends - 1, side="right") - 1, 0)
        is_inside = (ends > first_W[word]) & (ends <= last_W[word])
        return starts, np.where(is_inside, last_W[word], ends)

    def _spans(self, text: str) -> tuple[Int32, Int32]:
        """First character, and one past the last, of each word of a text, both int32 [W]."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        word_T = np.array([-1 if word is None else word for word in encoding.word_ids], np.int64)
        offsets_T2 = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        is_kept_T = (word_T >= 0) & (offsets_T2[:, 0] < offsets_T2[:, 1])
        word_T, offsets_T2 = word_T[is_kept_T], offsets_T2[is_kept_T]
        is_first_T = np.diff(word_T, prepend=-1) != 0
        is_last_T = np.diff(word_T, append=-1) != 0
        return offsets_T2[is_first_T, 0], offsets_T2[is_last_T, 1]


def _inputs(args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """What a call asks, as a list of mappings or as the generator that was given.

    Raises:
        DataError: Nothing is, or not as many contexts as questions.
    """
    if args:
        both = len(args) == 2 and all(isinstance(item, str) for item in args)
        found = {"question": args[0], "context": args[1]} if both else args[0] if len(args) == 1 else list(args)
    elif "X" in options or "data" in options:
        found = options["X"] if "X" in options else options["data"]
    elif "question" in options and "context" in options:
        question, context = options["question"], options["context"]
        if not isinstance(question, list):
            found = {"question": question, "context": context}
        else:
            contexts = context if isinstance(context, list) else [context] * len(question)
            if len(question) != len(contexts):
                raise DataError(f"there are {len(question)} questions and {len(contexts)} contexts; give as many")
            found = [{"question": one, "context": text} for one, text in zip(question, contexts, strict=True)]
    else:
        raise DataError("there is no question, or no context; give both, as question=... and context=...")
    if isinstance(found, types.GeneratorType):
        return found
    if isinstance(found, collections.abc.Mapping):
        return [found]
    # A data set of torch has a length and members, and may not know how to iterate.
    if hasattr(found, "__getitem__") and hasattr(found, "__len__") and not isinstance(found, str | bytes):
        is_list = isinstance(found, list | tuple)
        members: Iterable[Any] = (found[place] for place in range(len(found)))
        return list(members) if is_list else members
    raise DataError(f"the input is of type {type(found).__name__}; give a mapping with `question` and `context`")


def _question(item: Any) -> Question:
    """The question that a mapping asks.

    Raises:
        DataError: It is no mapping, lacks a key, or what it holds is no text.
    """
    if not isinstance(item, collections.abc.Mapping) or not {"question", "context"} <= set(item):
        raise DataError("an input is no mapping with `question` and `context`; give both, each a text")
    if not isinstance(item["context"], str):
        raise DataError(f"the context is of type {type(item['context']).__name__}; give a text")
    return Question.of(item["question"], item["context"])


def _builder(spec: TokenizerSpec, lengths: FeatureSpec) -> FeatureBuilder:
    """The builder of windows of these lengths.

    Raises:
        ConfigError: They contradict each other; the message names them as this pipeline does.
    """
    with named_as_in_python({"max_seq_length": "max_seq_len", "max_question_length": "max_question_len"}):
        return FeatureBuilder(spec, lengths)


def _log_totals(batches: Sequence[BatchLogits], table: FeatureTable, has_null: bool) -> npt.NDArray[np.float64]:
    """Logarithms of what start and end probabilities are shares of, [N, 2]: sums over context and CLS token."""
    totals_N2 = np.zeros((table.num_features, 2))
    for each in batches:
        logits_2T = np.stack([each.start_T.cpu().numpy(), each.end_T.cpu().numpy()]).astype(np.float64)
        first = 0
        for index, length in zip(each.batch.indices.tolist(), each.batch.lengths, strict=True):
            start = first + int(table.context_start[index])
            weighed_2X = logits_2T[:, start : start + int(table.context_length[index])]
            if has_null:
                null = first + int(table.cls_token[index])
                weighed_2X = np.concatenate([weighed_2X, logits_2T[:, null : null + 1]], axis=1)
            totals_N2[index] = np.logaddexp.reduce(weighed_2X, axis=1)
            first += length
    return totals_N2


def _add(answers: list[dict[str, Any]], context: str, start: int, end: int, score: float) -> None:
    """Put a span among the answers, or its score on top of that of an answer with the same text."""
    text = context[start:end]
    # Tokens and words of some tokenizers begin with the blank before them.
    start += len(text) - len(text.lstrip())
    text = text.strip()
    for answer in answers:
        if answer["answer"].lower() == text.lower():
            answer["score"] += score
            return
    answers.append({"score": score, "start": start, "end": start + len(text), "answer": text})


def _best(answers: list[dict[str, Any]], top_k: int) -> Any:
    """The best answers: one as it is, several as a list."""
    best = sorted(answers, key=lambda answer: -answer["score"])[:top_k]
    if not best:
        # A context without tokens, such as of zero-width spaces.
        best = [{"score": 0.0, "start": 0, "end": 0, "answer": ""}]
    return best[0] if len(best) == 1 else best
