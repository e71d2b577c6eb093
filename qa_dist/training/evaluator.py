"""Evaluations of a run: during training, and of the weights that it ends with."""

from pathlib import Path

from qa_dist.config.options import RunConfig
from qa_dist.data.sources import subset
from qa_dist.distributed.ranks import Ranks
from qa_dist.evaluation import loop as evaluation_loop
from qa_dist.evaluation.results import Evaluation
from qa_dist.training.inputs import RunData
from qa_dist.training.trainer import Trainer


class Evaluator:
    """Evaluates the model that a trainer holds on the validation data, as the options of the run say."""

    def __init__(self, config: RunConfig, ranks: Ranks, logits_path: Path) -> None:
        """Prepare to evaluate; with `--gather logits`, all logits of an evaluation are kept in `logits_path`."""
        self._config = config
        self._ranks = ranks
        self._logits_path = logits_path

    def during_training(self, trainer: Trainer, data: RunData) -> Evaluation:
        """All answers and scores, or with `--max_eval_features` only the loss of so many features; for all ranks.

        Raises:
            Stopped: On every rank, if any of them was asked to stop meanwhile.
        """
        limit = self._config.data.max_eval_features
        if limit is None:
            return self.whole(trainer, data)
        if data.validation is None:
            raise ValueError("nothing to evaluate on")
        return evaluation_loop.evaluate_loss(
            trainer.model,
            data.validation,
            self._ranks,
            self._config.evaluation,
            subset(data.validation.num_features, limit, self._config.data.subset_seed),
            forward_needs_all_ranks=trainer.engine.forward_needs_all_ranks,
            graphs=trainer.evaluation_graphs,
        )

    def whole(self, trainer: Trainer, data: RunData) -> Evaluation:
        """All answers and scores, with a bar on the way; every rank must call this.

        Raises:
            Stopped: On every rank, if any of them was asked to stop meanwhile.
        """
        if data.validation is None:
            raise ValueError("nothing to evaluate on")
        is_shown = self._ranks.is_main and not self._config.training.disable_tqdm
        with evaluation_loop.evaluation_bar(shown=is_shown) as advance:
            return evaluation_loop.evaluate(
                trainer.model,
                data.validation,
                self._ranks,
                self._config.evaluation,
                version_2=data.version_2,
                forward_needs_all_ranks=trainer.engine.forward_needs_all_ranks,
                graphs=trainer.evaluation_graphs,
                logits_path=self._logits_path,
                advance=advance,
            )
