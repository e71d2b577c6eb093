"""The model of a reader in onnxruntime: padded batches, and a search in numpy; torch and transformers are not needed.

Shapes: B features of a batch, L tokens of the longest of them, T tokens of all of them.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qa_dist.answering.backend import Backend
from qa_dist.answering.exported import DESCRIPTION, ONNX_FILES, OUTPUTS, Exported, ExportPrecision
from qa_dist.common.errors import CheckpointError, ConfigError
from qa_dist.common.libraries import reason
from qa_dist.config.options import EvaluationConfig
from qa_dist.evaluation.candidates import CandidateTable, Float32
from qa_dist.evaluation.numpy_searches import top_spans
from qa_dist.features.batching import Indices, evaluation_batches
from qa_dist.features.table import FeatureTable
from qa_dist.features.windows import FeatureColumns
from qa_dist.machine.requirements import require_package

TOKENS_PER_BATCH = 512
"""Tokens of a batch with their padding: what is computed of so many stays in the caches of a core.

The six-layer MiniLM with weights of 8 bits took 52 ms of a processor a question of SQuAD dev with 512 tokens, 60 with
1024, 66 with 2048 and 72 with 4096 (medians of four alternating runs of 60 questions, one thread, AVX2).
"""

SLOWER_TOGETHER = ("SkipLayerNormFusion",)
"""What onnxruntime makes one operation of, by its own name, and computes more slowly then.

A sum and a normalisation of 1360 tokens and 384 channels took 1.1 ms apart and 3.3 ms as one operation (onnxruntime
1.32, one thread, AVX2), which was 8 % of the time of a six-layer MiniLM.
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
            num_threads: Threads that compute a batch together; None: as many as OMP_NUM_THREADS says, as launchers and
                torch have it, else one for each core.

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
        self._session = open_session(file, num_threads)
        _require_names("reads", self.exported.inputs, self._session.get_inputs(), file)
        _require_names("gives", OUTPUTS, self._session.get_outputs(), file)

    def candidates(self, features: FeatureColumns, config: EvaluationConfig) -> CandidateTable:
        table = FeatureTable.of(features)
        batches = evaluation_batches(table.lengths, config.eval_tokens_per_device or TOKENS_PER_BATCH)
        found = [best_spans(table, indices, self.logits(table, indices), config) for indices in batches]
        return CandidateTable.concatenate(found).ordered(table.num_features)

    def logits(self, features: FeatureTable, indices: Indices) -> tuple[Float32, Float32]:
        """Start and end logits of some features, both float32 [B, L]; behind a feature's tokens stands anything."""
        is_token_BL, is_real_BL = self._places(features.lengths[indices])
        logits = self._session.run(list(OUTPUTS), self.inputs(features, indices))
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


def _threads_of(environment: Mapping[str, str]) -> int:
    """Threads that OMP_NUM_THREADS asks for, which onnxruntime does not read by itself; 0 if it does not ask."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def _require_names(verb: str, expected: Sequence[str], there: Sequence[Any], file: Path) -> None:
    """Make sure that a graph has the inputs or outputs which the description beside it tells of.

    Raises:
        CheckpointError: It has others.
    """
    names = [each.name for each in there]
    if set(names) != set(expected):
        raise CheckpointError(
            f"{file} {verb} {', '.join(names)}, and a reader by {DESCRIPTION} expects {', '.join(expected)}; export "
            "the model again"
        )


def open_session(path: Path, num_threads: int | None = None) -> Any:
    """The model in a file, ready to run by any number of threads at once.

    Args:
        path: An ONNX graph.
        num_threads: As `OnnxBackend` takes it.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or _threads_of(os.environ)
    options.inter_op_num_threads = 1
    # Errors are raised, and warnings are about the graph, which no user of it can change.
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(SLOWER_TOGETHER)
        )
    except Exception as error:  # the library has a dozen unrelated types for what is wrong with a file
        raise CheckpointError(f"{path} cannot be loaded ({reason(error)}); export the model again") from error
