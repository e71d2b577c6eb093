"""Predictions in this process without a model: a reader whose answers are known, and files of questions."""

import csv
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from qa_dist.answering.journal import Journal
from qa_dist.answering.prediction import Answered, Manner, Parcel, Progress, Rounds, answer, predict
from qa_dist.answering.question_files import QuestionFiles
from qa_dist.answering.records import Answer, InvalidQuestionError, Question
from qa_dist.evaluation.normalization import SQUAD

IDENTITY = {"--top_k": 1, "--model": "one"}


class FirstWord:
    """Answers with the first word of the first context; refuses questions that hold "unanswerable".

    The score is the number of questions in the chunk, so that the lines show how the input was cut.
    """

    def __init__(self) -> None:
        self.chunks: list[list[str]] = []

    def problem(self, question: Question) -> str | None:
        return "the question is too long" if "unanswerable" in question.question else None

    def answer_chunk(
        self, questions: Sequence[Question], top_k: int = 1, *, overlap_threshold: float | None = None
    ) -> list[list[Answer]]:
        for index, question in enumerate(questions):
            if problem := self.problem(question):
                raise InvalidQuestionError(index, problem)
        self.chunks.append([question.question for question in questions])
        answers = []
        for question in questions:
            word = question.contexts[0].split()[0]
            start = question.contexts[0].index(word)
            best = Answer(word, start, start + len(word), float(len(questions)), 0.75, False, None, 0)
            answers.append([best, Answer("", -1, -1, 0.0, 0.25, True, None, -1)][:top_k])
        return answers


def ranks_of(count: int, reader: FirstWord, how: Manner) -> Any:
    """What `predict` asks of the ranks, for rank 0 of so many; the others' share is done when it is collected."""
    handed: list[Parcel] = []

    def scatter(parcels: Sequence[Parcel]) -> Parcel:
        assert len(parcels) == count
        handed[:] = parcels
        return parcels[0]

    def gather(value: Answered) -> list[Answered]:
        return [value, *(answer(parcel.questions, reader, how) for parcel in handed[1:])]

    return SimpleNamespace(world_size=count, stop_if_asked=lambda: None, scatter=scatter, gather=gather)


def manner(**changes: Any) -> Manner:
    usual = {"top_k": 1, "overlap_threshold": 0.01, "rules": SQUAD, "questions_per_chunk": 3, "skips_flaws": False}
    return Manner(**{**usual, **changes})


def run(
    paths: Sequence[Path],
    output: Path,
    reader: FirstWord | None = None,
    *,
    identity: dict[str, Any] | None = None,
    overwrite: bool = False,
    num_ranks: int = 1,
    **changes: Any,
) -> tuple[Rounds, list[str]]:
    """The finished work, and the sentences about what was left out."""
    notices: list[str] = []
    sink = Journal(output, IDENTITY if identity is None else identity, overwrite=overwrite)
    read = [0]

    def advance(progress: Progress, files: QuestionFiles) -> None:
        read.append(files.num_bytes_read)
        assert 0 <= read[-1] <= (files.num_bytes or 0)

    try:
        how = manner(**changes)
        rounds = Rounds(QuestionFiles(paths), sink, how, notice=notices.append, advance=advance)
        reader = reader or FirstWord()
        predict(reader, ranks_of(num_ranks, reader, how), rounds, how)
    finally:
        sink.close()
    return rounds, notices


def rows(count: int, *, with_answers: bool = False) -> list[dict[str, Any]]:
    """Questions q0, q1, ... about texts whose first words are w0, w1, ..."""
    made: list[dict[str, Any]] = []
    for number in range(count):
        row: dict[str, Any] = {"id": f"q{number}", "question": "what is first?", "context": f"w{number} stands first"}
        if with_answers:
            row["answers"] = {"text": [f"w{number // 2 * 2}"], "answer_start": [0]}
        made.append(row)
    return made


def write_jsonl(path: Path, values: Iterable[Any]) -> Path:
    content = "".join(f"{json.dumps(value)}\n" for value in values).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_all_formats(folder: Path, values: Sequence[dict[str, Any]]) -> list[Path]:
    """The same questions as JSONL, gzipped, CSV, TSV, Parquet of several row groups, JSON and in SQuAD's layout."""
    folder.mkdir()
    paths = [write_jsonl(folder / name, values) for name in ("a.jsonl", "b.jsonl.gz", "c.json")]
    for name, mark in (("d.csv", ","), ("e.tsv", "\t")):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(values[0]), delimiter=mark)
            writer.writeheader()
            writer.writerows(values)
        paths.append(folder / name)
    parquet.write_table(pa.Table.from_pylist(list(values)), folder / "f.parquet", row_group_size=2)
    (folder / "g.json").write_text(json.dumps(list(values), indent=1), encoding="utf-8")
    articles = [
        {"title": "t", "paragraphs": [{"context": v["context"], "qas": [{"id": v["id"], "question": v["question"]}]}]}
        for v in values
    ]
    (folder / "h.json").write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")
    return [*paths, *(folder / name for name in ("f.parquet", "g.json", "h.json"))]


def lines(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()]
