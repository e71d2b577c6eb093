"""Answer files of questions: `qa-dist predict`, or `accelerate launch -m qa_dist.predict ...` on several ranks.

qa-dist predict --model outputs/mine --input_file questions.jsonl.gz --output_file answers.jsonl
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from qa_dist.answering.options import STREAM, ReaderOptions, lengths_of_run
from qa_dist.answering.records import OVERLAP_THRESHOLD
from qa_dist.common.command import note_exit, run_command
from qa_dist.common.errors import ConfigError, UserError
from qa_dist.common.signals import Stopped, StopSignals
from qa_dist.config.answer_rules import AnswerNormalization
from qa_dist.config.options import option
from qa_dist.config.parsing import parse
from qa_dist.config.texts import shown
from qa_dist.distributed.slurm_step import join_slurm_step
from qa_dist.machine.allocator import start_with_flat_heap
from qa_dist.machine.cuda_environment import prepare_cuda
from qa_dist.machine.requirements import require_package

if TYPE_CHECKING:
    import torch

    from qa_dist.answering.journal import Sink
    from qa_dist.answering.prediction import Manner, Rounds
    from qa_dist.answering.question_files import QuestionFiles
    from qa_dist.answering.reader import Reader
    from qa_dist.distributed.ranks import Ranks

PROG = "qa_dist.predict"


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictConfig(ReaderOptions):
    """What is answered, with which model, and where the answers go."""

    input_file: str | None = option(
        None,
        "questions with contexts: JSONL, CSV, TSV, Parquet or SQuAD JSON, .gz allowed; a folder or a pattern in quotes "
        "for many files; - for standard input",
        required=True,
    )
    output_file: str | None = option(
        None,
        "file of the answers, a line of JSON for each question, compressed if it ends in .gz; - for standard output, "
        "whose run cannot be resumed",
        required=True,
    )
    overwrite_output_file: bool = option(
        False, "replace an --output_file that holds other answers or anything else; its own answers are resumed"
    )
    top_k: int = option(1, "answers to each question; above 1 they are in `nbest`", minimum=1)
    overlap_threshold: float = option(
        OVERLAP_THRESHOLD,
        "of two answers that share more than this share of the shorter one's characters, keep the better one; 1: both",
        minimum=0,
        maximum=1,
    )
    on_invalid: Literal["error", "skip"] = option(
        "error",
        "stop at what cannot be answered, with all whole chunks before it written, or say so, count it and go on with "
        "the others",
    )
    eval_tokens_per_device: int | None = option(
        None,
        "tokens of one forward pass; auto: as in that run, else 576 on CPU, 16384 on CUDA; of an exported model 512",
        minimum=16,
    )
    answer_normalization: AnswerNormalization | None = option(  # noqa: RUF009 - a field, as in evaluation's options
        None, "whose rules say which answers are the same, where reference answers are given; auto: as in that run"
    )
    questions_per_chunk: int = option(
        128,
        "questions that a rank answers at a time: more of them fill batches better, fewer are lost when a run is "
        "killed; a chunk also ends after 262,144 characters",
        minimum=1,
        maximum=100_000,
    )
    ddp_timeout: int = option(
        1800, "seconds that a rank waits for the others, and they for the input, before the run fails", minimum=1
    )
    disable_tqdm: bool = option(False, "no progress bar")

    def problems(self) -> Iterable[str]:
        yield from self.contradictions()
        if self.output_file == STREAM and self.overwrite_output_file:
            yield "--overwrite_output_file is about a file and --output_file is standard output; drop one"
        if self.n_best_size is not None and self.top_k > self.n_best_size:
            yield f"--top_k {self.top_k} is more than --n_best_size {self.n_best_size}; raise the latter"
        if self.top_k == 1 and self.overlap_threshold != OVERLAP_THRESHOLD:
            yield (
                f"--overlap_threshold {self.overlap_threshold:g} chooses among several answers and --top_k is 1; raise "
                "the latter or drop the former"
            )
        if self.output_file is not None and os.path.isdir(self.output_file):
            yield f"--output_file {shown(self.output_file)} is a folder; name a file in it"


def main(argv: Sequence[str] | None = None) -> int:
    if argv is None:
        start_with_flat_heap(os.environ, sys.orig_argv)
    join_slurm_step()
    return note_exit(run_command(PROG, lambda: _predict(sys.argv[1:] if argv is None else argv)))


def _predict(argv: Sequence[str]) -> int:
    _, options = parse(
        argv,
        prog=PROG,
        description=__doc__ or "",
        groups=(),
        entry=PredictConfig,
        base=lengths_of_run(argv),
    )
    require_package("torch", "qa-dist predict")
    # Before torch is imported.
    prepare_cuda(os.environ, deterministic=False)
    with StopSignals() as stop, _output_of_answers() as stdout:
        # Imported here, as these take seconds: mistakes in the options do not wait for them.
        from qa_dist.distributed.failures import failures_named, launched_rank
        from qa_dist.distributed.ranks import Ranks

        with failures_named():
            is_asked = lambda: stop.received is not None  # noqa: E731
            files, problem = None, None
            if launched_rank() == 0:
                try:
                    files = _files(options, is_asked)
                except UserError as error:
                    if os.environ.get("WORLD_SIZE", "1") == "1":
                        raise
                    # Ranks that have begun to wait for this one would not notice its end for half a minute.
                    problem = str(error)
            ranks = Ranks(timeout_seconds=options.ddp_timeout, asked_to_stop=lambda: stop.received)
            _refuse_together(problem, ranks)
            metrics = _predict_on_ranks(options, ranks, files, stdout.buffer, is_asked)
            ranks.close()
    if metrics is not None:
        where = sys.stderr if options.output_file == STREAM else sys.stdout
        where.write(json.dumps(metrics, indent=2) + "\n")
    return 0


@contextlib.contextmanager
def _output_of_answers() -> Any:
    """Standard output, which belongs to the answers: what libraries greet with goes to standard error meanwhile."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield stdout


def _files(options: PredictConfig, is_asked_to_stop: Callable[[], bool]) -> "QuestionFiles":
    """The input, and a look at where the output goes, before anything expensive.

    Raises:
        UserError: One of them cannot be used.
    """
    from qa_dist.answering.question_files import Interruptible, QuestionFiles, find_files, inside, opened_pipe
    from qa_dist.common.files import require_writable

    source, output = str(options.input_file), Path(str(options.output_file))
    if options.output_file != STREAM:
        if source != STREAM and inside(output, source):
            raise ConfigError([f"--output_file {output} would be one of the files of --input_file; name another place"])
        if not os.path.lexists(output):
            require_writable(output.absolute().parent, "the folder of --output_file")
    if source == STREAM:
        if sys.stdin is None:
            raise ConfigError(
                ["--input_file is standard input, which is closed; pipe questions into it or name a file"]
            )
        _require_other(output, os.fstat(sys.stdin.fileno()))
        return QuestionFiles([], io.BufferedReader(Interruptible(sys.stdin.fileno(), is_asked_to_stop)))
    if pipe := opened_pipe(source, is_asked_to_stop):
        return QuestionFiles([], pipe, stream_name=source)
    paths = find_files(source)
    for path in paths:
        _require_other(output, path.stat())
    return QuestionFiles(paths)


def _require_other(output: Path, source: os.stat_result) -> None:
    """Make sure that a file of the input is not the output under another name, such as a link's.

    Raises:
        ConfigError: It is.
    """
    if output.is_file() and os.path.samestat(output.stat(), source):
        raise ConfigError([f"--output_file {output} is a file of --input_file, too; name another place"])


def _predict_on_ranks(
    options: PredictConfig,
    ranks: "Ranks",
    files: "QuestionFiles | None",
    stdout: BinaryIO,
    is_asked_to_stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """Answer with whatever ranks a launcher started; returns the metrics on rank 0."""
    from qa_dist.answering.prediction import Manner, Rounds, predict, prediction_bar
    from qa_dist.evaluation.normalization import normalization

    if options.answer_normalization is not None:
        # What its rules need may be missing, which is better known before a model is loaded.
        normalization(options.answer_normalization)
    with ranks.local_main_first():
        folder, reader = _opened_reader(options, ranks.device)
    if options.top_k > (most := reader.config.evaluation.n_best_size):
        problem = f"--top_k {options.top_k} is more than the {most} answers of --n_best_size; raise the latter"
        raise ConfigError([problem], on_all_ranks=True)
    manner = Manner(
        top_k=options.top_k,
        overlap_threshold=options.overlap_threshold,
        rules=normalization(options.answer_normalization or reader.config.evaluation.answer_normalization),
        questions_per_chunk=options.questions_per_chunk,
        skips_flaws=options.on_invalid == "skip",
        compresses=str(options.output_file).endswith(".gz"),
    )
    digest = _require_same(folder, reader, ranks)
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(_opened(options, manner, reader, digest, ranks, files, stdout, is_asked_to_stop))
        # Also where nobody reads a named pipe.
        ranks.stop_if_asked()
        rounds = None
        if files is not None and sink is not None:
            _tell(reader.notes, sink)
            num_before = sink.state["num_answered"] if sink.state else 0
            advance, notice = stack.enter_context(prediction_bar(num_before, shown=not options.disable_tqdm))
            rounds = Rounds(files, sink, manner, notice=lambda text: notice(f"{PROG}: {text}"), advance=advance)
        try:
            predict(reader, ranks, rounds, manner)
        except Stopped as stop:
            _tell_of_stop(stop, rounds, options)
            raise
        if rounds is None:
            return None
        metrics = rounds.progress.metrics()
        if options.answer_normalization is not None and "f1" not in metrics:
            note = (
                "no question has reference answers, so that nothing was scored and --answer_normalization had no effect"
            )
            sys.stderr.write(f"{PROG}: note: {note}\n")
        return {"answer_normalization": manner.rules.name, **metrics} if "f1" in metrics else metrics


def _opened_reader(options: PredictConfig, device: "torch.device") -> tuple[str, "Reader"]:
    """The folder or name of the model, and what answers with it: on this device, but for an exported model.

    Raises:
        UserError: There is no such model, or an option does not fit it.
    """
    from qa_dist.answering.exported import is_exported
    from qa_dist.answering.reader import Reader
    from qa_dist.model.hub import local_copy

    folder = local_copy(str(options.model))
    runs_elsewhere = device.type != "cpu" and is_exported(folder)
    reader = Reader(
        folder,
        device="cpu" if runs_elsewhere else device,
        tokens_per_batch=options.eval_tokens_per_device,
        **options.for_reader(),
    )
    if runs_elsewhere:
        reader.notes += (
            f"note: {options.model} is an exported model and runs on the CPU; to use the GPU, name the model that it "
            "was exported from",
        )
    return folder, reader


def _require_same(folder: str, reader: "Reader", ranks: "Ranks") -> str:
    """Digest of the model, once all ranks are found to have the same one and the same program.

    Raises:
        ConfigError: On every rank alike: they differ.
    """
    from qa_dist.distributed.agreement import common_facts, require_same
    from qa_dist.model.folder import model_sha256

    digest = model_sha256(folder)
    settings = {f"option {name}": value for name, value in _settings(reader).items()}
    require_same({**common_facts(), **settings, "bytes model": digest}, ranks)
    return digest


def _settings(reader: "Reader") -> dict[str, Any]:
    """What the answers depend on beside the model, by the names of the options."""
    names = {"tokens_per_batch": "eval_tokens_per_device"}
    return {f"--{names.get(name, name)}": value for name, value in reader.settings.items()}


@contextlib.contextmanager
def _opened(
    options: PredictConfig,
    manner: "Manner",
    reader: "Reader",
    digest: str,
    ranks: "Ranks",
    files: "QuestionFiles | None",
    stdout: BinaryIO,
    is_asked_to_stop: Callable[[], bool],
) -> Any:
    """Where the answers go, on rank 0; None elsewhere.

    Raises:
        UserError: On every rank alike: it cannot be used.
    """
    from qa_dist import __version__
    from qa_dist.answering.journal import Stream, open_sink

    sink: Sink | None = None
    problem = None
    if files is not None:
        identity = {
            "the version of qa_dist": __version__,
            "the content of --model": digest,
            **_settings(reader),
            "--top_k": manner.top_k,
            "--overlap_threshold": manner.overlap_threshold,
            "--answer_normalization": manner.rules.name,
            "--questions_per_chunk": manner.questions_per_chunk,
            "the device": reader.backend.device.partition(":")[0],
            "--input_file": files.names,
        }
        try:
            if options.output_file == STREAM:
                sink = Stream(stdout, "standard output")
            else:
                output = Path(str(options.output_file))
                # Journals of earlier versions have the option alone: none, where the run's precision was taken.
                earlier = {} if options.mixed_precision else {"--mixed_precision": None}
                sink = open_sink(
                    output,
                    identity,
                    overwrite=options.overwrite_output_file,
                    earlier=earlier,
                    is_asked_to_stop=is_asked_to_stop,
                )
        except UserError as error:
            problem = str(error)
    _refuse_together(problem, ranks)
    try:
        yield sink
    finally:
        if sink is not None:
            sink.close()


def _refuse_together(problem: str | None, ranks: "Ranks") -> None:
    """End all ranks where rank 0 has a problem.

    Raises:
        UserError: On every rank alike: it has.
    """
    if told := ranks.broadcast(problem):
        refused = UserError(told)
        refused.on_all_ranks = True
        raise refused


def _tell(notes: Sequence[str], sink: "Sink") -> None:
    """What the user should know before the first answer."""
    sys.stderr.writelines(f"{PROG}: {note}\n" for note in notes)
    if sink.is_finished:
        sys.stderr.write(f"{PROG}: every question is answered already; the input is compared with what was answered\n")
    elif sink.state is not None:
        sys.stderr.write(f"{PROG}: going on behind {sink.state['num_answered']:,} answers that are there already\n")


def _tell_of_stop(stop: Stopped, rounds: "Rounds | None", options: PredictConfig) -> None:
    if rounds is None:
        return
    count = f"{rounds.progress.num_answered:,} answers"
    how = (
        "nothing of it can be resumed, as --output_file is standard output"
        if options.output_file == STREAM
        else "run the same command to go on behind them"
    )
    sys.stderr.write(f"{PROG}: stopped by {stop.by.name} after {count}; {how}\n")


if __name__ == "__main__":
    sys.exit(main())
