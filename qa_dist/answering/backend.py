"""What computes a model for a reader: features in, candidates out.

There is one in torch (`torch_backend`) and one in onnxruntime (`onnx_backend`). This module imports neither.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qa_dist.config.options import EvaluationConfig
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureColumns

if TYPE_CHECKING:
    from qa_dist.evaluation.candidates import CandidateTable
    from qa_dist.model.precision import Precision


class Backend(ABC):
    """A model that finds candidates in features.

    Attributes:
        tokenizer: what its features are made with.
        device: where it computes, as "cpu" or "cuda:0".
        mixed_precision: of its matrix products; "no" also where the model's file says what they are.
        notes: what the user should know about the model, one sentence each.
    """

    tokenizer: TokenizerSpec
    device: str
    mixed_precision: "Precision" = "no"
    notes: Sequence[str] = ()

    @abstractmethod
    def candidates(self, features: FeatureColumns, config: EvaluationConfig) -> "CandidateTable":
        """The best spans of each of N features; row i is feature i.

        The batches depend on the lengths of these features and on `config.eval_tokens_per_device` alone. Nothing is
        kept. Any number of threads may call this at once.

        Args:
            features: At least one.
            config: Candidates per feature, longest answer, search, and tokens of a batch.

        Raises:
            UserError: The features were made for another model, or its logits are not numbers.
        """
