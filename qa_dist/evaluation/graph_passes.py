"""Passes of an evaluation replayed as CUDA graphs: the host asks for some hundred operations at once.

As in training (`qa_dist.training.graph_passes`), batches go into buckets of few sizes, filled up with dummy features;
the first batch of a bucket is launched operation by operation, the second one is launched, recorded and replayed, and
the graph is kept if that gives the same logits and losses, to the last bit. So it makes no difference which batches
are replayed: scores are the same at every world size, and where a rank goes on without graphs.

Legend: B features of a batch, T tokens of them together, S slots for features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qa_dist.config.options import RunConfig
from qa_dist.distributed.graph_choice import graph_problem, wants_graphs
from qa_dist.distributed.ranks import Ranks
from qa_dist.features.buckets import Bucket, BucketBatch, BucketInputs
from qa_dist.features.collate import FeatureBatch
from qa_dist.features.table import FeatureTable
from qa_dist.features.token_budget import EVALUATION_TOKENS
from qa_dist.machine.cuda_graphs import CudaRecorder, Recorder
from qa_dist.machine.kept_graphs import KeptGraphs, Recorded, recording_problem
from qa_dist.machine.usage import is_out_of_memory
from qa_dist.model.span_model import SpanModel, span_loss

MAX_GRAPHS = 32
"""Graphs that are kept; a new one takes the place of the one that has not been replayed for longest. Evaluation
batches are full, so that all of SQuAD's need about six."""

_Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Start and end logits, float32 [tokens of a bucket], and the loss of each of its slots, float32 [S]."""


@dataclass(slots=True, eq=False)
class _Recorded(Recorded):
    """A forward pass and its losses, for a bucket.

    Attributes:
        outputs: what it computes.
        weights: where the weights were that it reads.
    """

    outputs: _Outputs
    weights: Sequence[int]


class EvaluationGraphs:
    """Computes evaluation batches of one model; replays a graph for every bucket that has been seen twice."""

    def __init__(
        self,
        model: SpanModel,
        ranks: Ranks,
        recorder: Recorder,
        notice: Callable[[str], object],
        *,
        max_tokens: int,
    ) -> None:
        """Prepare to record.

        Args:
            model: The model, with its weights where they stay; it must be in evaluation mode whenever `run` is called.
            ranks: In whose autocast it computes.
            recorder: What records.
            notice: Called with a sentence if graphs are given up.
            max_tokens: Tokens of a batch, which its bucket has no more of.
        """
        self._model, self._ranks, self._recorder, self._notice = model, ranks, recorder, notice
        self._max_tokens = max_tokens
        self._graphs: KeptGraphs[Bucket, _Recorded] = KeptGraphs()

    def run(self, features: FeatureTable, batch: FeatureBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Start and end logits, both float32 [T], and losses, float64 [B], of a batch of at least one feature.

        Raises:
            RuntimeError: A pass cannot be computed operation by operation either.
        """
        assert not self._model.training
        (bucketed,) = BucketBatch.several(
            features,
            [(batch.indices, batch.indices)],
            [0.0],
            batch.input_ids_T.device,
            longest=self._model.max_seq_length,
            max_tokens=self._max_tokens,
        )
        start_T, end_T, losses_S = self._outputs(bucketed)
        num_tokens = sum(batch.lengths)
        return start_T[:num_tokens], end_T[:num_tokens], losses_S[: bucketed.num_features].double()

    def release(self) -> None:
        """Give back the memory that is kept from one pass to the next."""
        self._graphs.release()

    def describe(self) -> dict[str, Any]:
        """What was used, for run.json; {} if nothing was evaluated."""
        return self._graphs.describe() if self._graphs.num_launched or self._graphs.problem is not None else {}

    def give_up(self, problem: str) -> None:
        """Go on without graphs, because of a problem; ranks need not agree, as results are the same."""
        self._graphs.give_up(problem)
        self._notice(f"CUDA graphs are not used in evaluation from here on: {problem}")

    def _outputs(self, batch: BucketBatch) -> _Outputs:
        # No graph is good any more if somebody moved the weights.
        recorded = self._graphs.replay(
            batch.bucket, batch.numbers, is_good=lambda each: each.weights == self._addresses()
        )
        if recorded is not None:
            # The next replay writes there, before these are used.
            start, end, losses_S = (output.clone() for output in recorded.outputs)
            return start, end, losses_S
        return self._launch_and_record(batch) if self._graphs.note_launch(batch.bucket) else self._launch(batch)

    def _launch(self, batch: BucketBatch) -> _Outputs:
        """A pass operation by operation."""
        inputs = BucketInputs.within(batch.numbers, batch.bucket)
        try:
            with self._recorder.beside():
                return self._compute(inputs)
        except RuntimeError as error:
            if not self._graphs or not is_out_of_memory(error):
                raise
        self.give_up("there is no memory for them beside a pass")
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        with self._recorder.beside():
            return self._compute(inputs)

    def _compute(self, inputs: BucketInputs) -> _Outputs:
        # Not inference_mode, whose tensors must not meet a backward pass: layers may keep some for the next step.
        with torch.no_grad(), self._ranks.autocast():
            start, end = self._model(inputs.input_ids_T, inputs.token_type_ids_T, (), inputs.row)
            return start, end, span_loss(start, end, (), inputs.labels_S2, inputs.row)

    def _launch_and_record(self, batch: BucketBatch) -> _Outputs:
        """A pass operation by operation, of whose bucket a graph is kept if it gives the same."""
        with self._recorder.waits() as waits:
            wanted = self._launch(batch)
        if waits:
            self.give_up(f"the device is waited for in a pass ({waits[0]})")
        # What is no number equals nothing; another batch will do.
        elif self._graphs.problem is None and all(bool(output.isfinite().all()) for output in wanted):
            with self._problems_given_up():
                self._record(batch, wanted)
        return wanted

    @contextmanager
    def _problems_given_up(self) -> Iterator[None]:
        state = self._recorder.dropout_state()
        try:
            yield
        except RuntimeError as error:
            self.give_up(recording_problem(error))
        finally:
            # Nothing is dropped here; but what follows a failed recording draws from where it was.
            self._recorder.set_dropout_state(state)

    def _record(self, batch: BucketBatch, wanted: _Outputs) -> None:
        """Keep a graph of a batch's bucket if it gives these outputs."""
        numbers = batch.numbers.clone()
        inputs = BucketInputs.within(numbers, batch.bucket)
        start, end, losses_S = (torch.zeros_like(output) for output in wanted)
        found = start, end, losses_S

        def work() -> None:
            for output, computed in zip(found, self._compute(inputs), strict=True):
                output.copy_(computed)

        graph = self._recorder.record(work)
        self._graphs[batch.bucket] = _Recorded(graph, numbers, found, self._addresses())
        graph.replay()
        if not all(map(torch.equal, found, wanted)):
            furthest = max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, wanted, strict=True))
            self.give_up(f"a replay differs by up to {furthest:.2g} from what it replays, and must be the same")
        else:
            self._graphs.shrink(MAX_GRAPHS)

    def _addresses(self) -> list[int]:
        return [weight.data_ptr() for weight in self._model.parameters()]


def choose_evaluation_graphs(
    config: RunConfig,
    ranks: Ranks,
    model: SpanModel,
    notice: Callable[[str], object],
    recorder: Recorder | None = None,
) -> EvaluationGraphs | None:
    """CUDA graphs for evaluations of a model, where they are wanted and can be; None: batches are launched as they are.

    All ranks choose alike. Nothing is said of what is known to be in the way: launching is no slower than ever.

    Args:
        config: The run's options.
        ranks: Where it computes.
        model: The model on its device.
        notice: Called with a sentence if graphs are given up later.
        recorder: What records; None: a new one.
    """
    if not wants_graphs(config, ranks):
        return None
    if graph_problem(config, ranks.launch_config.strategy, model.padding, is_training=False) is not None:
        return None
    max_tokens = config.evaluation.eval_tokens_per_device or EVALUATION_TOKENS[ranks.device.type]
    return EvaluationGraphs(
        model, ranks, CudaRecorder(ranks.device) if recorder is None else recorder, notice, max_tokens=max_tokens
    )
