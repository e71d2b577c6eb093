"""From a trained model to a folder that onnxruntime, optimum and transformers.js can run; compared before it counts.

The graph is made from the model with its adapter folded in. What it gives in onnxruntime is compared with what the
model itself gives, adapter and all, on real questions: their logits, and their answers.

Shapes: N features, B features of a batch, L tokens of the longest of them.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from qa_dist.answering.exported import INPUTS, ONNX_FILES, Exported
from qa_dist.answering.onnx_backend import TOKENS_PER_BATCH, OnnxBackend, best_spans
from qa_dist.answering.onnx_graph import TOLERANCE, write_fused, write_graph, write_quantized
from qa_dist.answering.opening import allows_no_answer
from qa_dist.common.arrays import Float32, Indices
from qa_dist.common.errors import CheckpointError, ConfigError
from qa_dist.common.secrets import masked
from qa_dist.config.options import ModelConfig, RunConfig
from qa_dist.data.records import Example
from qa_dist.evaluation.answers import Answers, ExampleAnswer, decode
from qa_dist.evaluation.candidates import CandidateTable
from qa_dist.evaluation.normalization import normalization
from qa_dist.evaluation.scoring import score_v1, score_v2
from qa_dist.features.batching import evaluation_batches
from qa_dist.features.table import FeatureTable
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureBuilder, FeatureColumns, FeatureSpec
from qa_dist.machine.environment import installed
from qa_dist.model.building import longest_feature
from qa_dist.model.calibration import read_calibration
from qa_dist.model.families import family_of
from qa_dist.model.merging import fold, load_plain
from qa_dist.model.pretrained import model_configuration
from qa_dist.model.span_model import SpanModel
from qa_dist.model.trainable import check_vocabulary

NUM_COMPARED = 64
"""Questions, of those at hand, on which the graph is compared with the model itself."""

_PACKAGES = ("qa-dist", "torch", "transformers", "tokenizers", "onnx", "onnxscript", "onnxruntime")
_READER_OPTIONS = (
    *("max_seq_length", "doc_stride", "max_question_length", "decoding", "n_best_size", "max_answer_length"),
    *("answer_length_penalty", "answer_normalization"),
)


class Questions(NamedTuple):
    """Questions to compare on, and how they are answered.

    Attributes:
        examples: The questions.
        columns: Their features.
        table: The same.
        config: Options of the run.
        version_2: Whether the null answer is a choice.
    """

    examples: Sequence[Example]
    columns: FeatureColumns
    table: FeatureTable
    config: RunConfig
    version_2: bool

    @classmethod
    def of(cls, examples: Sequence[Example], tokenizer: TokenizerSpec, config: RunConfig) -> "Questions":
        """The questions with their features."""
        data = config.data
        builder = FeatureBuilder(tokenizer, FeatureSpec(data.max_seq_length, data.doc_stride, data.max_question_length))
        features, _ = builder.build(examples)
        columns = FeatureColumns.of(features)
        version_2 = data.version_2_with_negative
        if version_2 is None:
            version_2 = any(example.is_unanswerable for example in examples)
        return cls(examples, columns, FeatureTable.of(columns), config, version_2)

    def answers(self, candidates: CandidateTable) -> Answers:
        """The answers that follow from the candidates of the features."""
        evaluation = self.config.evaluation
        return decode(
            candidates,
            self.table.feature_map(),
            [example.context for example in self.examples],
            [example.id for example in self.examples],
            n_best_size=evaluation.n_best_size,
            version_2=self.version_2,
            null_score_diff_threshold=evaluation.null_threshold,
        )

    def scores(self, answers: Answers) -> dict[str, float]:
        """Exact match and F1 in percent of the questions whose references are known; nothing where none are."""
        references = {
            example.id: [*(answer.text for answer in example.answers), *example.other_texts]
            for example in self.examples
            if example.has_references
        }
        if not references:
            return {}
        predictions = {key: text for key, text in answers.predictions().items() if key in references}
        rules = normalization(self.config.evaluation.answer_normalization)
        if self.version_2:
            found = score_v2(references, predictions, rules=rules)
            return {"exact_match": found["exact"], "f1": found["f1"]}
        found = score_v1(references, predictions, rules=rules)
        return {"exact_match": found["exact_match"], "f1": found["f1"]}


def require_exportable(model: ModelConfig, name: str) -> None:
    """Refuse what no graph can hold, from the model's configuration alone.

    Raises:
        ConfigError: The message says why.
    """
    model_config = model_configuration(model)
    model_type = model_config.model_type
    family = family_of(model_config)
    problem = None
    if family.depends_on_padding:
        problem = "its logits depend on how far a feature is padded, which whoever runs the graph decides"
    elif family.full_attention:
        problem = "its attention changes its kind with the length of a text, and a graph has one kind"
    elif family.global_question:
        problem = "it must be told which tokens are the question's, and no program for ONNX files does"
    elif getattr(model_config, "quantization_config", None):
        problem = (
            "its weights are quantised already, so that an adapter cannot be folded in and no graph be made of them"
        )
    if problem:
        raise ConfigError(
            [f"{name} is a {model_type} model, which cannot be exported: {problem}; use it with torch, as it is"]
        )


def export(
    config: RunConfig,
    name: str,
    tokenizer: Any,
    examples: Sequence[Example],
    folder: Path,
    *,
    quantize: bool,
    fuse: bool = False,
    called: str | None = None,
) -> dict[str, Any]:
    """Write an exported model into a folder, and compare it; the report says with what result.

    Args:
        config: Options of the run that trained the model.
        name: The model.
        tokenizer: Its tokenizer, of transformers.
        examples: Questions to compare on.
        folder: Where the files go; what is in it after an error is worth nothing.
        quantize: Whether to write a second graph with weights of 8 bits.
        fuse: Whether attention in the first one is an operation of onnxruntime's own, too.
        called: The name that the user has for it; None: `name`.

    Raises:
        UserError: The model cannot be loaded or exported.
        CheckpointError: The graph gives other logits or other answers than the model.
    """
    questions = Questions.of(examples, TokenizerSpec.of(tokenizer), config)
    compared = Questions.of(examples[:NUM_COMPARED], TokenizerSpec.of(tokenizer), config)
    model = load_plain(config, name, tokenizer_pads_left=tokenizer.padding_side == "left", padding="sorted").eval()
    check_vocabulary(model, questions.table.largest_token_id)
    reads_types = model.takes_token_types and "token_type_ids" in tokenizer.model_input_names
    inputs = INPUTS if reads_types else INPUTS[:2]
    expected = _model_logits(model, compared.table)

    plain = fold(model).eval()
    pad_token_id = plain.config.pad_token_id or 0
    num_heads = getattr(plain.config, "num_attention_heads", None)
    write_graph(plain, inputs, pad_token_id, folder / ONNX_FILES["float32"])
    plain.config.architectures = [type(plain).__name__]
    plain.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    described = Exported(
        tokenizer=TokenizerSpec.of(tokenizer),
        inputs=inputs,
        pad_token_id=pad_token_id,
        longest_feature=longest_feature(plain.config),
        options=_reader_options(config, name),
        provenance=_provenance(called or name, plain.config),
    )
    del model, plain
    described.write(folder)
    if config.model.quantization == "no" and (calibration := read_calibration(name)):
        calibration.write(folder)
    report = _graph_reports(questions, compared, expected, folder, num_heads, quantize=quantize, fuse=fuse)
    described = dataclasses.replace(described, provenance={**described.provenance, "compared": report})
    described.write(folder)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*.onnx*"))}
    return {"inputs": list(inputs), "bytes": sizes, **report}


def _graph_reports(
    questions: Questions,
    compared: Questions,
    expected: Sequence[tuple[Float32, Float32]],
    folder: Path,
    num_heads: int | None,
    *,
    quantize: bool,
    fuse: bool,
) -> dict[str, Any]:
    """Make the other graphs of the plain one in a folder, as they are asked for; what comparing each of them gave."""
    exact = OnnxBackend(folder, precision="float32")
    tried = [exact.inputs(compared.table, indices) for indices in _batches(compared.table)]
    if fuse:
        write_fused(folder / ONNX_FILES["float32"], num_heads, tried)
        exact = OnnxBackend(folder, precision="float32")
    report = {"float32": _compared(compared, expected, exact)}
    if quantize:
        write_quantized(folder / ONNX_FILES["float32"], folder / ONNX_FILES["int8"], num_heads, tried)
        report["int8"] = _quantization_report(questions, exact, OnnxBackend(folder, precision="int8"))
    return report


def _reader_options(config: RunConfig, name: str) -> dict[str, Any]:
    """What a reader of the exported model of this name does as the run that trained it did."""
    return {
        **{key: value for key, value in config.flat().items() if key in _READER_OPTIONS},
        "null_score_diff_threshold": config.evaluation.null_threshold,
        "version_2_with_negative": allows_no_answer(name, config),
    }


def _provenance(name: str, model_config: Any) -> dict[str, Any]:
    """Where an exported model comes from, for those who get it."""
    return {"model": _public_name(name), "model_type": model_config.model_type, "versions": installed(_PACKAGES)}


def _public_name(name: str) -> str:
    """The name of a model for a file that others get: of a folder its last part, without secrets."""
    is_folder = os.path.isabs(name) or os.path.isdir(name)
    return masked(os.path.basename(os.path.abspath(name)) if is_folder else name)


def _batches(table: FeatureTable) -> list[Indices]:
    return evaluation_batches(table.lengths, TOKENS_PER_BATCH)


def _model_logits(model: SpanModel, table: FeatureTable) -> list[tuple[Float32, Float32]]:
    """Start and end logits of each batch, both float32 [B, L], -inf behind a feature's tokens."""
    found = []
    for indices in _batches(table):
        ids_T, types_T = table.flat(indices)
        lengths = table.lengths[indices]
        with torch.inference_mode():
            rows = model(torch.from_numpy(ids_T).long(), torch.from_numpy(types_T).long(), tuple(lengths.tolist()))
        is_token_BL = np.arange(lengths.max()) < lengths[:, None]
        sides = []
        for logits_T in rows:
            sides.append(np.full(is_token_BL.shape, -np.inf, np.float32))
            sides[-1][is_token_BL] = logits_T.numpy()
        found.append((sides[0], sides[1]))
    return found


def _compared(
    questions: Questions, expected: Sequence[tuple[Float32, Float32]], backend: OnnxBackend
) -> dict[str, Any]:
    """What the comparison of the float32 graph with the model gave.

    Raises:
        CheckpointError: They differ.
    """
    table, config = questions.table, questions.config.evaluation
    differences, largest = [0.0], 0.0
    tables: tuple[list[CandidateTable], list[CandidateTable]] = ([], [])
    for indices, wanted in zip(_batches(table), expected, strict=True):
        found = backend.logits(table, indices)
        is_token_BL = np.arange(wanted[0].shape[1]) < table.lengths[indices][:, None]
        for mine, other in zip(wanted, found, strict=True):
            differences.append(float(np.abs(mine - other)[is_token_BL].max()))
            largest = max(largest, float(np.abs(mine[is_token_BL]).max()))
        for side, logits in zip(tables, (wanted, found), strict=True):
            side.append(best_spans(table, indices, logits, config))
    # A NaN is no number that `max` would find.
    difference = float(np.max(differences))
    if not difference <= TOLERANCE * largest:
        raise CheckpointError(
            f"the logits of the exported model differ from the model's by {difference:.1e}, where the largest is "
            f"{largest:.3g} and {TOLERANCE:.0e} of that is allowed; nothing was written - use the model with torch"
        )
    model_answers, graph_answers = (
        questions.answers(CandidateTable.concatenate(side).ordered(table.num_features)) for side in tables
    )
    # Each of two scores is a sum of two logits.
    threshold = config.null_threshold
    different = [
        answer.id
        for answer, other in zip(model_answers, graph_answers, strict=True)
        if not is_same(answer, other, margin=4 * difference, threshold=threshold)
    ]
    if different:
        raise CheckpointError(
            f"{len(different)} of {len(questions.examples)} answers of the exported model are not the model's (first: "
            f"{different[0]}); nothing was written - use the model with torch"
        )
    return {
        "num_questions": len(questions.examples),
        "largest_difference": difference,
        "largest_logit": largest,
        "num_different_answers": 0,
    }


def is_same(answer: ExampleAnswer, other: ExampleAnswer, *, margin: float, threshold: float) -> bool:
    """Whether two answers to a question are the same, or as good as each other to a model whose scores are so exact.

    Args:
        answer: The answer of the model.
        other: That of the graph.
        margin: How far scores may be apart that count as equal.
        threshold: Null odds above which the null answer is chosen.
    """
    if answer.prediction.text == other.prediction.text:
        return True
    if answer.null_odds is not None and "" in (answer.prediction.text, other.prediction.text):
        return abs(answer.null_odds - threshold) <= margin
    place = other.prediction.start_char, other.prediction.end_char
    scores = {(entry.start_char, entry.end_char): entry.score for entry in answer.nbest}
    return place in scores and scores[place] >= answer.prediction.score - margin


def _quantization_report(
    questions: Questions, exact_backend: OnnxBackend, rounded_backend: OnnxBackend
) -> dict[str, Any]:
    """What weights of 8 bits change: answers, and scores where references are known."""
    exact, rounded = (
        questions.answers(backend.candidates(questions.columns, questions.config.evaluation))
        for backend in (exact_backend, rounded_backend)
    )
    before, after = questions.scores(exact), questions.scores(rounded)
    report: dict[str, Any] = {
        "num_questions": len(questions.examples),
        "num_different_answers": sum(a != b for a, b in zip(exact.texts, rounded.texts, strict=True)),
    }
    if before:
        report.update(float32=before, int8=after, f1_cost=before["f1"] - after["f1"])
    return report
