"""How a model is opened and read by the commands that answer questions."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from qa_dist.config.given import asks_for_help, peek
from qa_dist.config.options import option, usual_stride
from qa_dist.config.parsing import parse
from qa_dist.config.texts import whole_number
from qa_dist.machine.cuda_environment import prepare_cuda

if TYPE_CHECKING:
    from qa_dist.answering.reader import Reader

T = TypeVar("T")

STREAM = "-"
"""The name that stands for standard input and standard output."""

READER_OPTIONS = (
    *("max_seq_length", "doc_stride", "max_question_length", "max_answer_length", "n_best_size", "allow_no_answer"),
    *("answer_length_penalty", "null_score_diff_threshold", "temperature", "mixed_precision"),
)
"""Options that a reader takes under their own names, whatever the command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderOptions:
    """The model, and what of its run's configuration is to be otherwise."""

    model: str | None = option(
        None,
        "model that answers: folder of an adapter, a whole or an exported model, package:NAME/FOLDER, or hub id",
        required=True,
    )
    max_seq_length: int | None = option(None, "tokens of a window; auto: as the model was trained", minimum=16)
    doc_stride: int | None = option(None, "tokens that windows share; auto: as the model was trained", minimum=0)
    max_question_length: int | None = option(
        None, "longer questions are cut to so many tokens; auto: those that do not fit are refused", minimum=1
    )
    max_answer_length: int | None = option(
        None, "longest answer, in tokens; auto: as in the run that trained the model", minimum=1
    )
    answer_length_penalty: float | None = option(
        None,
        "what each token of an answer behind its first takes off its score; auto: as in that run",
        minimum=0,
        maximum=100,
    )
    n_best_size: int | None = option(
        None, "candidates kept of each window and context; auto: as in that run", minimum=1, maximum=1000
    )
    allow_no_answer: bool | None = option(
        None, "whether a question may have no answer; auto: as in the evaluation of that run"
    )
    null_score_diff_threshold: float | None = option(
        None,
        "answer nothing when that scores this much more than the best answer; auto: as tuned for the model, else as in "
        "that run",
    )
    temperature: float | None = option(
        None,
        "divide scores by this before the softmax of probabilities; 1: as the model gives them; auto: as tuned for it",
        above=0,
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None, "precision of the matrix products; auto: as in that run on CUDA, no on CPU"
    )

    def contradictions(self) -> Iterable[str]:
        """Pairs of these options of which one would have no effect."""
        if self.allow_no_answer is False and self.null_score_diff_threshold is not None:
            yield (
                "--null_score_diff_threshold chooses between answers and none, and --allow_no_answer is false; drop one"
            )

    def for_reader(self) -> dict[str, Any]:
        """The arguments of a `Reader` that have these options' names."""
        return {name: getattr(self, name) for name in READER_OPTIONS}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderConfig(ReaderOptions):
    """What a command of one process opens."""

    device: str | None = option(None, "where the model computes, such as cpu or cuda:1; auto: a GPU where there is one")
    tokens_per_batch: int | None = option(
        None,
        "tokens of one forward pass; auto: as in the run, else 576 on CPU, 16384 on CUDA; of an exported model 512",
        minimum=16,
    )

    def problems(self) -> Iterable[str]:
        return self.contradictions()

    def open(self) -> "Reader":
        """The reader that these options describe.

        Raises:
            UserError: There is no such model, or it does not go with an option.
        """
        # Before torch is imported.
        prepare_cuda(os.environ, deterministic=False)
        from qa_dist.answering.reader import Reader

        return Reader(str(self.model), device=self.device, tokens_per_batch=self.tokens_per_batch, **self.for_reader())


def with_model_named(argv: Sequence[str]) -> list[str]:
    """The words of a command line whose first may be the model: `ask MODEL` is `ask --model MODEL`."""
    return ["--model", *argv] if argv and not argv[0].startswith("-") else list(argv)


def read_options(argv: Sequence[str], *, prog: str, description: str, entry: type[T]) -> T:
    """The options of a command of `ReaderConfig`.

    Raises:
        ConfigError: With every problem found.
    """
    words = with_model_named(argv)
    return parse(words, prog=prog, description=description, groups=(), entry=entry, base=lengths_of_run(words))[1]


def lengths_of_run(words: Sequence[str]) -> dict[str, Any]:
    """The lengths of the run that made the model of a command line, with which those that are given must go together.

    Of a model that no run here has made it is the stride that it would be read with (`opening.fitted`).

    Raises:
        UserError: What is said of the model cannot be read, or cannot be had from the hub.
    """
    from qa_dist.answering.exported import Exported, is_exported
    from qa_dist.model.folder import LENGTHS, base_options
    from qa_dist.model.hub import is_hub_id, local_copy

    model = peek(words, "model")
    # Without any of them, nobody has to look for the model yet.
    if model is None or asks_for_help(words) or all(peek(words, name) is None for name in LENGTHS):
        return {}
    if is_hub_id(model):
        model = local_copy(model)
    found: Mapping[str, Any] = {}
    if is_exported(model):
        found = Exported.read(Path(model)).options
    elif os.path.isdir(model):
        found = base_options(model)
    if lengths := {name: found[name] for name in LENGTHS if found.get(name) is not None}:
        return lengths
    longest = whole_number(str(peek(words, "max_seq_length")))
    return {"doc_stride": usual_stride(longest)} if longest > 0 else {}
