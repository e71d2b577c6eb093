"""Questions from files, the hub or the package, as validated examples.

    source ──► `Record`s (rows as they were written) ──► `validate` ──► `Example`s and a `Report`

Every record is checked before anything expensive happens, and everything found wrong is reported together. Mistakes
of a whole file (not there, not gzip, not JSON, ...) are a `DataError` of one sentence.

This module neither logs nor writes: it returns what it found.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import pkgutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qa_dist.common.errors import DataError
from qa_dist.common.parsers import ParseError, read_json, type_name
from qa_dist.config.options import DataConfig
from qa_dist.data.records import Answer, Example

Split = Literal["train", "validation"]
Row = Mapping[str, Any]

COLUMNS = ("id", "context", "question", "answers")
"""What a row must have; `title` is optional, and `is_impossible` is honoured where it occurs."""

PROBLEMS = {
    "not_object": "an entry is not an object",
    "surplus_values": "a row has more values than the header has columns",
    **{f"missing_{key}": f"{key} is missing" for key in ("paragraphs", "qas", "id", "question", "context")},
    **{f"wrong_{key}": f"{key} is not a list" for key in ("paragraphs", "qas")},
    **{f"wrong_{key}": f"{key} is not a string" for key in ("id", "question", "context", "title")},
    "wrong_is_impossible": "is_impossible is not true or false",
    "wrong_answers": "answers is neither a list of {text, answer_start} nor a list of each, texts and whole numbers",
    "empty_id": "id is empty",
    "duplicate_id": "the id occurred before",
    "empty_question": "question is empty",
    "empty_context": "context is empty",
    "not_unicode": "a text holds half a surrogate pair and cannot be written as UTF-8",
    "empty_answer": "an answer text is empty",
    "answer_beyond_context": "an answer reaches beyond the context",
    "answer_not_at_offset": "an answer text is not at its answer_start, nor at exactly one other place",
    "impossible_with_answers": "is_impossible is true but there are answers",
    "no_answers": "there are no answers; pass --version_2_with_negative true or drop them",
}
"""Every kind of problem a record can have, in the order in which they are reported."""

_NUM_IDS_SHOWN = 3
_NUM_NAMES_SHOWN = 8
_NUM_HASHED_SYNTHETIC = 100
_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"
_LAYOUTS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_ALLOWED = (
    "allowed are SQuAD JSON, or JSONL, CSV or Parquet rows with id, context, question and answers, each plain or .gz"
)


@dataclass(frozen=True, slots=True)
class Record:
    """One question as its source has it, not yet checked.

    Attributes:
        place: where it stands in its source, for records without a usable id.
        row: its keys and values; SQuAD's nesting is already flattened.
        problem: a key of `PROBLEMS`, if the record is already known to be unusable.
    """

    place: str
    row: Row
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """How many records have one kind of problem, and the ids (or places) of the first few."""

    kind: str
    count: int
    first_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What validation found in all records of a source, before any subset is taken.

    Attributes:
        num_records: records read.
        num_invalid: records with at least one problem.
        num_examples: valid records.
        num_unanswerable: valid records without answers.
        num_mended: valid records whose answer_start was wrong and could be corrected.
        first_mended: ids of the first few of those.
        problems: the kinds found, in the order of `PROBLEMS`. A record with two problems counts in both.
    """

    num_records: int
    num_invalid: int
    num_examples: int
    num_unanswerable: int
    num_mended: int
    first_mended: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def text(self) -> str:
        """The findings in one paragraph."""
        parts = [
            f"records: {self.num_records:,}",
            f"valid: {self.num_examples:,}",
            f"unanswerable: {self.num_unanswerable:,}",
        ]
        if self.num_mended:
            parts.append(
                f"mended: {self.num_mended:,}, whose answer text occurs exactly once but not at its answer_start "
                f"({_listed(self.first_mended, self.num_mended)})"
            )
        if self.problems:
            kinds = "; ".join(
                f"{problem.count:,} where {PROBLEMS[problem.kind]} ({_listed(problem.first_ids, problem.count)})"
                for problem in self.problems
            )
            parts.append(f"invalid: {self.num_invalid:,}: {kinds}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Report":
        """The report that `to_json` gave."""
        problems = tuple(Problem(item["kind"], item["count"], tuple(item["first_ids"])) for item in value["problems"])
        return cls(**{**value, "first_mended": tuple(value["first_mended"]), "problems": problems})


@dataclass(frozen=True, slots=True)
class Source:
    """Data that is identified but not parsed, so that a store that is ready costs one hash.

    Attributes:
        name: what messages call it.
        content_sha256: hex digest of the bytes of a file, or of the rows of anything else.
        records: parses; gives the same records every time.
    """

    name: str
    content_sha256: str
    records: Callable[[], Iterable[Record]] = field(repr=False)


def load_examples(data: DataConfig, split: Split) -> tuple[list[Example], Report, str]:
    """The examples of one split after validation and subset, what validation found, and the hash of the content.

    Raises:
        DataError: The source cannot be read, holds invalid records under `--on_invalid error`, or no valid ones.
    """
    source = open_source(data, split)
    examples, report = load_source(source, data, split)
    return examples, report, source.content_sha256


def load_source(source: Source, data: DataConfig, split: Split) -> tuple[list[Example], Report]:
    """The examples of an opened source after validation and subset, and what validation found.

    Raises:
        DataError: It cannot be parsed, holds invalid records under `--on_invalid error`, or no valid ones.
    """
    examples, report = validate(source.records(), allow_unanswerable=data.version_2_with_negative is not False)
    if report.num_records == 0:
        raise DataError(f"{source.name} holds no questions; name a source with at least one")
    if report.problems and data.on_invalid == "error":
        raise DataError(f"{source.name}: {report.text()}. Mend them, or pass --on_invalid drop to leave them out")
    if not examples:
        raise DataError(f"{source.name}: {report.text()}. Nothing is left after dropping the invalid ones; mend them")
    chosen = subset(len(examples), max_samples(data, split), data.subset_seed)
    return [examples[index] for index in chosen], report


def max_samples(data: DataConfig, split: Split) -> int | None:
    """How many examples of this split the configuration asks for; None means all."""
    return data.max_train_samples if split == "train" else data.max_eval_samples


def subset(num_items: int, max_items: int | None, seed: int | None) -> npt.NDArray[np.int64]:
    """Indices int64 [min(num_items, max_items)] of the items to use.

    With a seed these are the first of NumPy's permutation, which are also those that
    `Dataset.shuffle(seed).select(range(max_items))` of the datasets library takes; without one, the first ones.
    """
    num_chosen = num_items if max_items is None else min(num_items, max_items)
    if seed is None or max_items is None:
        return np.arange(num_chosen, dtype=np.int64)
    return np.random.default_rng(seed).permutation(num_items)[:num_chosen]


# ----------------------------------------------------------------------------------------------------------- sources


def available_splits(data: DataConfig) -> tuple[Split, ...]:
    """The splits that the configured source has.

    Raises:
        DataError: The source is a hub data set that cannot be loaded, or one with neither split.
    """
    every: tuple[Split, ...] = ("train", "validation")
    if data.train_file or data.validation_file:
        return tuple(split for split in every if _file_of(data, split))
    if data.source == "sample" or data.source.startswith("synthetic:"):
        return every
    found = _load_hub(data)
    splits = tuple(split for split in every if split in found)
    if not splits:
        raise DataError(
            f"{data.source} has the splits {', '.join(found)}, but train or validation is needed; name another data "
            "set, or save its questions to a file for --train_file or --validation_file"
        )
    return splits


def open_source(data: DataConfig, split: Split) -> Source:
    """The configured source of one split, hashed but not parsed.

    Raises:
        DataError: It is not there, cannot be read, or has no such split.
    """
    if data.train_file or data.validation_file:
        path = _file_of(data, split)
        if path is None:
            raise DataError(f"the configuration names no {split} data; pass --{split}_file")
        return _file_source(Path(path))
    if data.source == "sample":
        from qa_dist.data.sample import sample_path

        return _file_source(sample_path(split))
    if data.source.startswith("synthetic:"):
        return _synthetic_source(data.source, 0 if split == "train" else 1)
    splits = _load_hub(data)
    if split not in splits:
        raise DataError(f"{data.source} has the splits {', '.join(splits)} but no {split}; pass --{split}_file")
    rows = splits[split]
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        raise DataError(
            f"{data.source} has the columns {', '.join(rows.column_names)} but not {', '.join(missing)}; "
            f"a data set needs {', '.join(COLUMNS)}"
        )
    return _rows_source(f"{data.source} ({split})", rows.with_format("arrow")[:].to_pylist())


def _file_of(data: DataConfig, split: Split) -> str | None:
    return data.train_file if split == "train" else data.validation_file


def _file_source(path: Path) -> Source:
    content = _read_bytes(path)
    return Source(str(path), hashlib.sha256(content).hexdigest(), lambda: parse(content, path))


def _rows_source(name: str, rows: Sequence[Row]) -> Source:
    digest = hashlib.sha256()
    for row in rows:
        values = [row.get(column) for column in (*COLUMNS, "title", "is_impossible")]
        digest.update(json.dumps(values, default=str).encode())
    return Source(name, digest.hexdigest(), lambda: read_rows(rows))


def _synthetic_source(name: str, seed: int) -> Source:
    from qa_dist.data.sample import synthetic_examples

    def rows(count: int) -> Iterator[Row]:
        return map(_row_of, synthetic_examples(count, seed=seed))

    count = int(name.removeprefix("synthetic:"))
    # An example depends on its seed and number only, so the first few tell which generator made all of them.
    few = _rows_source(name, list(rows(min(count, _NUM_HASHED_SYNTHETIC)))).content_sha256
    digest = hashlib.sha256(json.dumps([count, seed, few]).encode())
    return Source(name, digest.hexdigest(), lambda: read_rows(rows(count)))


def _row_of(example: Example) -> Row:
    answers = [{"text": answer.text, "answer_start": answer.start_char} for answer in example.answers]
    return {
        "id": example.id,
        "title": example.title,
        "context": example.context,
        "question": example.question,
        "answers": answers,
    }


def _load_hub(data: DataConfig) -> Any:
    """The `DatasetDict` of a hub id or local folder."""
    import datasets
    import datasets.packaged_modules

    source = data.source
    if os.path.isdir(os.path.expanduser(source)):
        # The library takes some words for formats even where there is a folder of that name.
        source = os.path.abspath(os.path.expanduser(source))
    elif source in {module.name for module in pkgutil.iter_modules(datasets.packaged_modules.__path__)}:
        raise DataError(
            f"--dataset_name {source} is the name of a file format, and whatever lies in the current folder would be "
            "read; name files with --train_file and --validation_file"
        )
    try:
        found = datasets.load_dataset(source, data.dataset_config_name)
    except Exception as error:  # the library raises a dozen unrelated types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"--dataset_name {data.source} cannot be loaded ({reason}); it must be `sample`, `synthetic:N`, a local "
            "folder, or a hub data set while the hub can be reached: without it, pass --train_file and "
            "--validation_file"
        ) from error
    return found


# ------------------------------------------------------------------------------------------------- files to records


def read_file(path: str | Path) -> list[Record]:
    """The records of a file: SQuAD JSON, or JSONL, CSV or Parquet rows, plain or gzip-compressed.

    Raises:
        DataError: The file cannot be read or parsed, or is laid out in another way.
    """
    path = Path(path)
    return list(parse(_read_bytes(path), path))


def read_rows(rows: Iterable[Row]) -> Iterator[Record]:
    """Records of rows that already have the schema of the hub's `squad` and `squad_v2`."""
    for number, row in enumerate(rows, 1):
        yield Record(f"row {number}", row)


def parse(content: bytes, path: Path) -> Iterable[Record]:
    """The records in the bytes of a file; `path` says by its name how they are laid out, else the content does.

    Raises:
        DataError: As for `read_file`.
    """
    content = _decompressed(content, path)
    if not content.strip():
        raise DataError(f"{path} is empty; {_ALLOWED}")
    layout = _layout(content, path)
    if layout == "parquet":
        return _parquet_records(content, path)
    text = _decoded(content, path)
    if layout == "csv":
        return _csv_records(text, path)
    if layout == "jsonl":
        return _jsonl_records(text, path)
    return _json_records(text, path)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; name one file, or pass the folder as --dataset_name") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error


def _decompressed(content: bytes, path: Path) -> bytes:
    if not content.startswith(_GZIP_MAGIC):
        if path.suffix.lower() == ".gz" and content:
            raise DataError(f"{path} is not gzip-compressed although it ends in .gz; rename it or compress it")
        return content
    try:
        return gzip.decompress(content)
    except EOFError:
        raise DataError(f"{path} ends in the middle of its gzip stream; copy or download it again") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged gzip ({error}); copy or download it again") from error


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start:,} is 0x{content[error.start]:02x}; convert the file to UTF-8"
        ) from error


def _layout(content: bytes, path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    start = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    is_json = start[:1] in (b"{", b"[")
    is_parquet = content.startswith(_PARQUET_MAGIC)
    if suffixes and suffixes[-1] in _LAYOUTS:
        named = _LAYOUTS[suffixes[-1]]
        if (is_parquet and named != "parquet") or (is_json and named == "csv"):
            found = "Parquet" if is_parquet else "JSON"
            raise DataError(f"{path} is {found} although its name ends in {suffixes[-1]}; rename it")
        return named
    if is_parquet:
        return "parquet"
    if is_json:
        return "json"
    header = start.split(b"\n", 1)[0]
    if b"context" in header and b"question" in header:
        return "csv"
    raise DataError(f"{path} is neither JSON, JSONL, CSV with a header, nor Parquet; {_ALLOWED}")


def _json_records(text: str, path: Path) -> Iterable[Record]:
    try:
        value = read_json(text)
    except ParseError as error:
        # Many tools write one object per line into a file called .json.
        first, _, rest = text.lstrip().partition("\n")
        if rest.strip() and _is_object(first):
            return _jsonl_records(text, path)
        raise DataError(f"{path} is not JSON that can be used: {error}; mend the file") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    elif isinstance(value, dict) and "context" in value and "question" in value:
        value = [value]
    if not isinstance(value, list):
        found = type_name(value)
        if isinstance(value, dict):
            found += f" with the keys {_listed(list(value), len(value))}"
        raise DataError(
            f"{path} is JSON but not in SQuAD's layout: its top level is {found}, and must be "
            f'{{"data": [articles]}} or a list of rows with {", ".join(COLUMNS)}'
        )
    if any(isinstance(item, dict) and "context" in item and "question" in item for item in value):
        return _checked_rows(value, path, "row")
    if value and not any(isinstance(item, dict) and "paragraphs" in item for item in value):
        raise DataError(
            f"{path} is JSON but not in SQuAD's layout: its list holds {type_name(value[0])}, and must hold articles "
            f"with paragraphs, or rows with {', '.join(COLUMNS)}"
        )
    return _article_records(value)


def _is_object(line: str) -> bool:
    try:
        return isinstance(read_json(line), dict)
    except ParseError:
        return False


def _article_records(articles: Sequence[Any]) -> Iterator[Record]:
    """SQuAD's articles → paragraphs → questions, flattened; what is broken on the way is a record with a problem."""
    for article_number, article in enumerate(articles, 1):
        article_place = f"article {article_number}"
        if problem := _list_problem(article, "paragraphs"):
            yield Record(article_place, {}, problem)
            continue
        for paragraph_number, paragraph in enumerate(article["paragraphs"], 1):
            paragraph_place = f"{article_place}, paragraph {paragraph_number}"
            if problem := _list_problem(paragraph, "qas"):
                yield Record(paragraph_place, {}, problem)
                continue
            shared = {"title": article.get("title"), "context": paragraph.get("context")}
            for number, qa in enumerate(paragraph["qas"], 1):
                place = f"{paragraph_place}, question {number}"
                if isinstance(qa, dict):
                    yield Record(place, {**qa, **shared})
                else:
                    yield Record(place, {}, "not_object")


def _list_problem(parent: Any, key: str) -> str | None:
    if not isinstance(parent, dict):
        return "not_object"
    if parent.get(key) is None:
        return f"missing_{key}"
    return None if isinstance(parent[key], list) else f"wrong_{key}"


def _jsonl_records(text: str, path: Path) -> Iterable[Record]:
    rows: list[Any] = []
    # Not splitlines: JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(read_json(line))
        except ParseError as error:
            what = f"{error.reason} at line {number}" + (f", column {error.column}" if error.column else "")
            raise DataError(f"{path} is not JSONL: {what}; write one JSON object per line") from error
    return _checked_rows(rows, path, "record")


def _csv_records(text: str, path: Path) -> Iterable[Record]:
    # The module's limit of 128 KiB per field is global, and shorter than some contexts.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns = reader.fieldnames or []
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{path} is not CSV: {error} at line {reader.line_num}; mend the file") from error
    finally:
        csv.field_size_limit(limit)
    if len(columns) == 1 and any(separator in columns[0] for separator in ";\t|"):
        raise DataError(f"{path} has one column called {columns[0]!r}; separate columns by commas")
    _require_columns(columns, path)
    # The reader files surplus values under None: a comma without quotes has shifted the columns.
    return [
        Record(f"row {number}", row, "surplus_values" if None in row else None) for number, row in enumerate(rows, 1)
    ]


def _parquet_records(content: bytes, path: Path) -> Iterable[Record]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not Parquet ({reason}); write it again") from error
    _require_columns(table.column_names, path)
    return read_rows(table.to_pylist())


def _checked_rows(rows: Sequence[Any], path: Path, word: str) -> Iterable[Record]:
    """Records of JSON rows, some of which may be no objects at all."""
    names = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    if rows:
        _require_columns(list(names), path)
    for number, row in enumerate(rows, 1):
        place = f"{word} {number}"
        yield Record(place, row) if isinstance(row, dict) else Record(place, {}, "not_object")


def _require_columns(found: Sequence[str], path: Path) -> None:
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(missing)}: it has {_listed(found, len(found)) or 'nothing'}, and rows need "
            f"{', '.join(COLUMNS)}"
        )
    repeated = [name for name in dict.fromkeys(found) if list(found).count(name) > 1]
    if repeated:
        raise DataError(f"{path} has the column {_listed(repeated, len(repeated))} more than once; keep one of them")


# -------------------------------------------------------------------------------------------------------- validation


def validate(records: Iterable[Record], *, allow_unanswerable: bool = True) -> tuple[list[Example], Report]:
    """The valid examples, and what was found in all records.

    An answer that is not at its offset is mended where its text occurs exactly once in the context. The first of
    several records with one id is kept. Examples of one context share one string.
    """
    examples: list[Example] = []
    found: dict[str, list[str]] = {kind: [] for kind in PROBLEMS}
    mended_ids: list[str] = []
    contexts: dict[str, str] = {}
    ids: set[str] = set()
    num_records = 0
    for record in records:
        num_records += 1
        example, problems, mended = _check(record, allow_unanswerable)
        label = _label(record)
        if label is not None:
            if label in ids:
                problems.add("duplicate_id")
            ids.add(label)
        shown = _printable(label or record.place)
        for kind in problems:
            found[kind].append(shown)
        if example is None or problems:
            continue
        context = contexts.setdefault(example.context, example.context)
        examples.append(Example(example.id, example.question, context, example.answers, example.title))
        if mended:
            mended_ids.append(shown)
    problems_found = tuple(
        Problem(kind, len(where), tuple(where[:_NUM_IDS_SHOWN])) for kind, where in found.items() if where
    )
    return examples, Report(
        num_records=num_records,
        num_invalid=num_records - len(examples),
        num_examples=len(examples),
        num_unanswerable=sum(not example.answers for example in examples),
        num_mended=len(mended_ids),
        first_mended=tuple(mended_ids[:_NUM_IDS_SHOWN]),
        problems=problems_found,
    )


def _check(record: Record, allow_unanswerable: bool) -> tuple[Example | None, set[str], bool]:
    """The example in a record (None if there is no way to make one), its problems, and whether it was mended."""
    if record.problem:
        return None, {record.problem}, False
    row = record.row
    problems = {f"missing_{key}" for key in ("id", "question", "context") if row.get(key) is None}
    identity, question, context = _label(record), row.get("question"), row.get("context")
    title, impossible = row.get("title"), row.get("is_impossible")
    for key, value in (("question", question), ("context", context), ("title", title)):
        if not isinstance(value, str | None):
            problems.add(f"wrong_{key}")
    if identity is None and row.get("id") is not None:
        problems.add("wrong_id")
    if not isinstance(impossible, bool | None):
        problems.add("wrong_is_impossible")
    answers = _answers(row.get("answers"))
    if answers is None:
        problems.add("wrong_answers")
    if problems or answers is None or identity is None or question is None or context is None:
        return None, problems, False
    if not identity:
        problems.add("empty_id")
    if not question.strip():
        problems.add("empty_question")
    if not context.strip():
        problems.add("empty_context")
    if not all(_is_unicode(text) for text in (identity, question, context, title or "", *(a.text for a in answers))):
        problems.add("not_unicode")
    if answers and impossible:
        problems.add("impossible_with_answers")
    if not answers and not allow_unanswerable:
        problems.add("no_answers")
    placed = []
    for answer in answers:
        found, problem = _placed(answer, context)
        placed.append(found)
        if problem:
            problems.add(problem)
    return Example(identity, question, context, tuple(placed), title or ""), problems, placed != answers


def _label(record: Record) -> str | None:
    """The id of a record as text, if it has one. Integers are taken, as some data sets number their questions."""
    value = record.row.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _answers(raw: Any) -> list[Answer] | None:
    """The answers in any of the layouts in use, not yet placed; None if `raw` is none of them.

    Layouts: `{"text": [...], "answer_start": [...]}` (hub), `[{"text", "answer_start"}, ...]` (SQuAD files), and the
    JSON text of either (CSV). Nothing, or an empty one, means unanswerable.
    """
    if isinstance(raw, str):
        if not raw.strip():
            return []
        try:
            raw = read_json(raw)
        except ParseError:
            return None
        if isinstance(raw, str):
            return None
    if raw is None or raw == {} or raw == []:
        return []
    if isinstance(raw, dict):
        texts, starts = raw.get("text"), raw.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            return None
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(raw, list) and all(isinstance(item, dict) for item in raw):
        pairs = [(item.get("text"), item.get("answer_start")) for item in raw]
    else:
        return None
    if not all(
        isinstance(text, str) and isinstance(start, int) and not isinstance(start, bool) for text, start in pairs
    ):
        return None
    return [Answer(text, start) for text, start in pairs]


def _placed(answer: Answer, context: str) -> tuple[Answer, str | None]:
    """The answer where its text really is, and a problem if that place is not certain."""
    if not answer.text.strip():
        return answer, "empty_answer"
    if answer.start_char < 0 or answer.end_char > len(context):
        return answer, "answer_beyond_context"
    if context.startswith(answer.text, answer.start_char):
        return answer, None
    first = context.find(answer.text)
    if first < 0 or context.find(answer.text, first + 1) >= 0:
        return answer, "answer_not_at_offset"
    return Answer(answer.text, first), None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _listed(names: Sequence[str], count: int) -> str:
    """The first of `count` names, with dots for the rest."""
    shown = names[:_NUM_NAMES_SHOWN]
    text = ", ".join(_printable(str(name)) for name in shown)
    return f"{text}, ..." if count > len(shown) else text
