"""How a model is opened and read by the commands that answer questions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qa_dist.config.options import option

if TYPE_CHECKING:
    from qa_dist.answering.reader import Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderConfig:
    """The model, and what of its run's configuration is to be otherwise."""

    model: str | None = option(
        None,
        "model that answers: folder of an adapter or a whole model, package:NAME/FOLDER, or hub id",
        required=True,
    )
    device: str | None = option(None, "where the model computes, such as cpu or cuda:1; auto: a GPU where there is one")
    # These are options of runs, too. Where the model's config.yaml has a value, that is the one to start from.
    max_seq_length: int = option(None, "tokens of a window, special tokens included; auto: as in the run", minimum=16)
    doc_stride: int = option(None, "tokens that consecutive windows share; auto: as in the run", minimum=0)
    max_answer_length: int = option(None, "longest answer, in tokens; auto: as in the run", minimum=1)
    allow_no_answer: bool | None = option(
        None, "whether a text may lack the answer; auto: if there were such questions in the run's evaluation"
    )
    null_score_diff_threshold: float = option(
        None, "answer nothing when the null score beats the best span by more than this; auto: as in the run"
    )
    eval_tokens_per_device: int = option(
        None, "tokens of one forward pass; auto: as in the run, else 2048 on CPU, 16384 on CUDA", minimum=16
    )

    def problems(self) -> Iterable[str]:
        return ()

    def open(self) -> "Reader":
        """The reader that these options describe.

        Raises:
            UserError: There is no such model, or it does not go with an option.
        """
        from qa_dist.answering.reader import Reader

        return Reader(
            str(self.model),
            device=self.device,
            max_seq_length=self.max_seq_length,
            doc_stride=self.doc_stride,
            max_answer_length=self.max_answer_length,
            allow_no_answer=self.allow_no_answer,
            null_score_diff_threshold=self.null_score_diff_threshold,
            tokens_per_batch=self.eval_tokens_per_device,
        )


def with_model_named(argv: Sequence[str]) -> list[str]:
    """The words of a command line whose first may be the model: `ask MODEL` is `ask --model MODEL`."""
    return ["--model", *argv] if argv and not argv[0].startswith("-") else list(argv)


def options_of_run(model: str | None) -> dict[str, Any]:
    """Options of the run that made the model, if it is a folder of one."""
    import os

    from qa_dist.model.folder import base_options

    return base_options(model) if model and os.path.isdir(model) else {}
