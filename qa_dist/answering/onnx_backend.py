"""The model of a reader in onnxruntime: padded batches, and a search in numpy; torch and transformers are not needed.

Shapes: B features of a batch, L tokens of the longest of them, T tokens of all of them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qa_dist.answering.backend import Backend
from qa_dist.answering.exported import DESCRIPTION, ONNX_FILES, OUTPUTS, Exported, ExportPrecision
from qa_dist.answering.onnx_sessions import Sessions
from qa_dist.common.arrays import Float32, Indices
from qa_dist.common.errors import CheckpointError, ConfigError
from qa_dist.config.options import EvaluationConfig
from qa_dist.evaluation.candidates import CandidateTable
from qa_dist.evaluation.numpy_searches import top_spans
from qa_dist.features.batching import evaluation_batches
from qa_dist.features.table import FeatureTable
from qa_dist.features.windows import FeatureColumns
from qa_dist.machine.requirements import require_package

TOKENS_PER_BATCH = 512
"""Tokens of a batch with their padding: what is computed of so many stays in the caches of a core.

The six-layer MiniLM with weights of 8 bits took 52 ms of a processor a question of SQuAD dev with 512 tokens, 60 with
1024, 66 with 2048 and 72 with 4096 (medians of four alternating runs of 60 questions, one thread, AVX2).
"""


class OnnxBackend(Backend):
    """An exported model on the CPU.

    Attributes:
        exported: its description.
        precision: which of its files computes.
    """

    def __init__(
        self, folder: str | Path, *, precision: ExportPrecision | None = None, num_threads: int | None = None
    ) -> None:
        """Load the model in a folder.

        Args:
            folder: What `qa-dist export` wrote.
            precision: "float32" or "int8"; None: int8 where the model was exported so.
            num_threads: Threads that compute, as `Sessions` takes it.

        Raises:
            UserError: There is no such model in the folder, it cannot be loaded, or onnxruntime is not installed.
        """
        require_package("onnxruntime", f"the exported model in {folder}")
        self.exported = Exported.read(Path(folder))
        there = [name for name, file in ONNX_FILES.items() if (Path(folder) / file).is_file()]
        if not there:
            raise CheckpointError(f"{folder} holds no {ONNX_FILES['float32']}; export the model again")
        self.precision = precision or there[-1]
        if self.precision not in there:
            raise ConfigError([f"{folder} holds no {self.precision} model, only {', '.join(there)}; name one of these"])
        self.tokenizer = self.exported.tokenizer
        self.device = "cpu"
        self.notes = ()
        file = Path(folder) / ONNX_FILES[self.precision]
        self._sessions = Sessions(file, num_threads)
        _require_names("reads", self.exported.inputs, self._sessions.inputs, file)
        _require_names("gives", OUTPUTS, self._sessions.outputs, file)

    def candidates(self, features: FeatureColumns, config: EvaluationConfig) -> CandidateTable:
        table = FeatureTable.of(features)
        batches = evaluation_batches(table.lengths, config.eval_tokens_per_device or TOKENS_PER_BATCH)

        def found(session: Any, indices: Indices) -> CandidateTable:
            return best_spans(table, indices, self._logits(session, table, indices), config)

        return CandidateTable.concatenate(self._sessions.map(found, batches)).ordered(table.num_features)

    def logits(self, features: FeatureTable, indices: Indices) -> tuple[Float32, Float32]:
        """Start and end logits of some features, both float32 [B, L]; behind a feature's tokens stands anything."""
        return self._logits(self._sessions.one(), features, indices)

    def _logits(self, session: Any, features: FeatureTable, indices: Indices) -> tuple[Float32, Float32]:
        is_token_BL, is_real_BL = self._places(features.lengths[indices])
        logits = session.run(list(OUTPUTS), self.inputs(features, indices))
        if is_real_BL is is_token_BL:
            return logits[0], logits[1]
        aligned = np.full((2, *is_token_BL.shape), -np.inf, np.float32)
        for side, logits_BL in enumerate(logits):
            aligned[side][is_token_BL] = logits_BL[is_real_BL]
        return aligned[0], aligned[1]

    def inputs(self, features: FeatureTable, indices: Indices) -> dict[str, npt.NDArray[np.int64]]:
        """What the graph is given to compute some features, each int64 [B, L]."""
        input_ids_T, types_T = features.flat(indices)
        _, is_real_BL = self._places(features.lengths[indices])
        batch = {"attention_mask": is_real_BL.astype(np.int64)}
        for name, values_T, fill in (
            ("input_ids", input_ids_T, self.exported.pad_token_id),
            ("token_type_ids", types_T, 0),
        ):
            batch[name] = np.full(is_real_BL.shape, fill, np.int64)
            batch[name][is_real_BL] = values_T
        return {name: batch[name] for name in self.exported.inputs}

    def _places(self, lengths_B: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Where tokens stand without padding before them, and where in the batch that is computed; both [B, L]."""
        position_L = np.arange(lengths_B.max(initial=0))
        is_token_BL = position_L < lengths_B[:, None]
        return is_token_BL, is_token_BL[:, ::-1] if self.tokenizer.padding_side == "left" else is_token_BL


def best_spans(
    features: FeatureTable, indices: Indices, logits: tuple[Float32, Float32], config: EvaluationConfig
) -> CandidateTable:
    """The candidates of some features, given their start and end logits, both float32 [B, L]."""
    starts = features.context_start[indices]
    return top_spans(
        indices,
        *logits,
        starts,
        starts + features.context_length[indices],
        features.cls_token[indices],
        features.lengths[indices],
        num_candidates=config.n_best_size,
        max_answer_length=config.max_answer_length,
        search=config.decoding,
        length_penalty=config.answer_length_penalty,
    )


def _require_names(verb: str, expected: Sequence[str], there: Sequence[str], file: Path) -> None:
    """Make sure that a graph has the inputs or outputs which the description beside it tells of.

    Raises:
        CheckpointError: It has others.
    """
    if set(there) != set(expected):
        raise CheckpointError(
            f"{file} {verb} {', '.join(there)}, and a reader by {DESCRIPTION} expects {', '.join(expected)}; export "
            "the model again"
        )
