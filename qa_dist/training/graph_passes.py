"""Passes replayed as CUDA graphs: the host asks for a thousand operations at once.

Each bucket of batches (`qa_dist.features.buckets`) has a graph of its own. The first batch of a bucket is computed
operation by operation, so that libraries have loaded what they need. The second one is computed so as well, and
recorded, and replayed with the same dropout: only a graph that gives the same losses and gradients is kept. What has
none goes on operation by operation, with the same batches and the same dropout, so that a resumed run does not depend
on which of its passes were replayed.

Exchange, clipping and update are not recorded: they are a few launches, which the host asks for while the device is at
the pass; the exchange may go through a library that cannot be recorded, and the learning rate stays a number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import is_not
from typing import Any

import torch

from qa_dist.distributed.engine import Engine
from qa_dist.distributed.ranks import Ranks
from qa_dist.features.buckets import Bucket, BucketBatch, BucketInputs
from qa_dist.machine.cuda_graphs import Recorder
from qa_dist.machine.kept_graphs import KeptGraphs, Recorded, recording_problem
from qa_dist.model.span_model import span_loss
from qa_dist.training.distances import norm, relative_distance
from qa_dist.training.passes import Passes
from qa_dist.training.step_inputs import MicroBatch

MAX_GRAPHS = 64
"""Graphs that are kept; a new one takes the place of the one that has not been replayed for longest."""

REPLAY_TOLERANCE = {"no": 1e-3, "bf16": 2e-2, "fp16": 2e-2}
"""How far a replay may be from what it replays, as a share of the losses and of the gradient.

Flash attention adds up gradients in any order, which changes those of bfloat16 by 2e-4 to 2e-3 of their norm (measured
on an H100); another mask of dropout changes them by more than 0.1.
"""


@dataclass(slots=True, eq=False)
class _Recorded(Recorded):
    """A forward pass, its losses and its backward pass, for a bucket.

    Attributes:
        losses_S: float32 [S].
        gradients: those of the trained parameters; None for one that gets none.
    """

    losses_S: torch.Tensor
    gradients: list[torch.Tensor | None]


class GraphPasses(Passes):
    """Replays a graph for every bucket that has been seen twice."""

    takes_buckets = True

    def __init__(
        self, ranks: Ranks, engine: Engine, model: Any, recorder: Recorder, notice: Callable[[str], object]
    ) -> None:
        self._ranks, self._engine, self._recorder, self._notice = ranks, engine, recorder, notice
        self._parameters = [parameter for _, parameter in model.trainable()]
        self._graphs: KeptGraphs[Bucket, _Recorded] = KeptGraphs()
        self._is_training = False
        # A graph adds to gradients where they were when it was recorded.
        engine.keeps_gradients = True

    def begin_step(self) -> None:
        # A replay drops what was dropped when it was recorded; to tell hundreds of modules takes milliseconds.
        self._is_training = False

    def run(self, micro_batch: MicroBatch, *, last: bool) -> torch.Tensor:
        batch = micro_batch.batch
        assert isinstance(batch, BucketBatch)
        # No graph is good any more if somebody dropped the gradients that it adds to.
        recorded = self._graphs.replay(
            batch.bucket, batch.numbers, is_good=lambda each: not any(map(is_not, each.gradients, self._gradients()))
        )
        if recorded is not None:
            losses_S = recorded.losses_S
        elif self._graphs.note_launch(batch.bucket):
            losses_S = self._launch_and_record(batch)
        else:
            losses_S = self._launch(batch)
        return losses_S[: batch.num_features]

    def release(self) -> None:
        self._graphs.release()

    def describe(self) -> dict[str, Any]:
        return self._graphs.describe()

    def _launch(self, batch: BucketBatch) -> torch.Tensor:
        """Losses [S] of a pass operation by operation."""
        inputs = BucketInputs.within(batch.numbers, batch.bucket)
        if not self._is_training:
            self._engine.module.train()
            self._is_training = True
        if self._graphs.num_launched == 1:
            self._let_go(inputs)
        with self._recorder.beside():
            return self._compute(inputs)

    def _forward(self, inputs: BucketInputs) -> tuple[torch.Tensor, torch.Tensor]:
        with self._ranks.autocast():
            logits: tuple[torch.Tensor, torch.Tensor] = self._engine.module(
                inputs.input_ids_T, inputs.token_type_ids_T, (), inputs.row
            )
        return logits

    def _compute(self, inputs: BucketInputs) -> torch.Tensor:
        start_T, end_T = self._forward(inputs)
        losses_S = span_loss(start_T, end_T, (), inputs.labels_S2, inputs.row)
        self._engine.backward((losses_S * inputs.weights_S.float()).sum(), last=True)
        return losses_S.detach()

    def _launch_and_record(self, batch: BucketBatch) -> torch.Tensor:
        """Losses [S] of a pass operation by operation, of whose bucket a graph is kept if it gives the same."""
        earlier = [None if each is None else each.clone() for each in self._gradients()]
        begin = self._recorder.dropout_state()
        self._engine.zero_grad()
        with self._recorder.waits() as waits:
            losses_S = self._launch(batch)
        end = self._recorder.dropout_state()
        wanted = [None if each is None else each.clone() for each in self._gradients()]
        if waits:
            self.give_up(f"the device is waited for in a pass ({waits[0]})")
        elif norm(wanted).isfinite() and losses_S.isfinite().all():
            try:
                self._record(batch, losses_S, wanted, begin)
            except RuntimeError as error:
                self.give_up(recording_problem(error))
            self._recorder.set_dropout_state(end)
        # As if nothing but the launched pass had been.
        for now, before, new in zip(self._gradients(), earlier, wanted, strict=True):
            if now is not None and new is not None:
                now.copy_(new if before is None else before + new)
        return losses_S

    def _record(
        self, batch: BucketBatch, losses_S: torch.Tensor, wanted: list[torch.Tensor | None], begin: torch.Tensor
    ) -> None:
        """Keep a graph of a batch's bucket if it gives these losses and gradients, with dropout from this state on."""
        numbers, found_S = batch.numbers.clone(), torch.zeros_like(losses_S)
        inputs = BucketInputs.within(numbers, batch.bucket)
        self._let_go(inputs)
        graph = self._recorder.record(lambda: found_S.copy_(self._compute(inputs)))
        self._graphs[batch.bucket] = _Recorded(graph, numbers, found_S, self._gradients())
        self._recorder.set_dropout_state(begin)
        self._engine.zero_grad()
        graph.replay()
        limit = 0.0 if torch.are_deterministic_algorithms_enabled() else REPLAY_TOLERANCE[self._ranks.mixed_precision]
        distances = relative_distance([found_S], [losses_S]), relative_distance(self._gradients(), wanted)
        # Not greater than: neither is what is no number.
        if not all(distance <= limit for distance in distances):
            share = f"{distances[0]:.2g} of the losses and {distances[1]:.2g} of the gradient"
            self.give_up(f"a replay differs by {share} from what it replays, and rounding explains {limit:.2g}")
        else:
            self._graphs.shrink(MAX_GRAPHS)

    def _let_go(self, inputs: BucketInputs) -> None:
        """Make the model forget the pass before.

        While a layer holds something of a pass, the nodes that add to gradients live on, on the stream of a pass that
        nobody recorded. After a forward pass without gradients it holds nothing that leads to them.
        """
        module = self._engine.module
        module.eval()
        with self._recorder.beside(), torch.no_grad():
            self._forward(inputs)
        module.train()

    def give_up(self, problem: str) -> None:
        """Go on without graphs, because of a problem; ranks need not agree: they exchange nothing in a pass."""
        self._graphs.give_up(problem)
        self._notice(f"CUDA graphs are not used from here on: {problem}")

    def _gradients(self) -> list[torch.Tensor | None]:
        return [parameter.grad for parameter in self._parameters]
