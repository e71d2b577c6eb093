"""Questions from files, the hub, the embedded sample or the generator: what `--train_file` and `--dataset_name` mean.

    `Source` ──► values (formats) ──► `Record`s (layouts) ──► `validate` (checking, placing) ──► `Example`s, a `Report`

Every record is checked before anything expensive happens, and everything found wrong is reported together. Mistakes
of a whole file (not there, not gzip, not JSON, ...) are a `DataError` of one sentence.

This module neither logs nor writes: it returns what it found.
"""

import glob
import hashlib
import json
import os
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qa_dist.common.errors import DataError
from qa_dist.common.libraries import logs_held_back, reason
from qa_dist.common.reading import read_bytes, require_readable
from qa_dist.config.options import DataConfig
from qa_dist.data.checking import Report, validate
from qa_dist.data.folders import Split, files_for, files_of_split, is_saved, name_of_split, saved_splits
from qa_dist.data.formats import parse
from qa_dist.data.layouts import lay_out
from qa_dist.data.records import Example
from qa_dist.data.rows import COLUMNS, Reading, Record, Row, listed, read_rows, with_whole_ids

_FILES_INSTEAD = "--train_file and --validation_file in the place of --dataset_name"
"""Advice that can be followed: one or the other names the data, and both are refused."""

_NUM_HASHED_SYNTHETIC = 100


@dataclass(frozen=True, slots=True)
class Source:
    """Data that is identified but not parsed, so that a store that is ready costs one hash.

    Attributes:
        name: what messages call it.
        content_sha256: hex digest of the bytes of a file, or of the rows of anything else.
        records: parses; gives the same records every time.
        note: which files it is read from, if they are several; None of anything else.
    """

    name: str
    content_sha256: str
    records: Callable[[], Reading] = field(repr=False)
    note: str | None = None


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
    examples, report = validate(
        source.records(),
        allow_unanswerable=data.version_2_with_negative is not False,
        for_training=split == "train",
        keep_scored=split == "validation" and data.on_invalid == "drop",
        keep_spelling=split == "validation",
    )
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
        files = {split: file for split in every if (file := _file_of(data, split))}
        for split, file in files.items():
            for path in _files_at(_expanded(file), split):
                require_readable(path)
        return tuple(files)
    if data.source == "sample" or data.source.startswith("synthetic:"):
        return every
    if folder := _folder_of_files(data):
        return tuple(split for split in every if files_of_split(folder, split))
    loaded = _load_hub(data)
    splits = tuple(split for split in every if name_of_split(loaded, split))
    if not splits:
        raise DataError(
            f"{data.source} has the splits {', '.join(loaded)}, but train or validation is needed; name another data "
            "set, or save its questions to a file for --train_file or --validation_file"
        )
    return splits


def require_split(data: DataConfig, split: str) -> None:
    """Make sure that the configured source has a split.

    Raises:
        DataError: It has not.
    """
    splits = available_splits(data)
    if split not in splits:
        raise DataError(f"the data has no split {split}, only {' and '.join(splits)}; name that, or more data")


def training_splits(data: DataConfig, *, evaluates: bool) -> tuple[Split, ...]:
    """The splits that a run with this data has.

    Args:
        data: The data.
        evaluates: Whether the run is evaluated before its end.

    Raises:
        DataError: The source cannot be used, or a split that the run needs is not there.
    """
    splits = available_splits(data)
    if "train" not in splits:
        raise DataError("there is no training data; give --train_file, or --dataset_name of a set with a train split")
    if evaluates and "validation" not in splits:
        raise DataError(
            "there is no validation data to evaluate on during training; give "
            f"{_FILES_INSTEAD if data.dataset_name else '--validation_file'}, or --eval_steps no"
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
        return file_source(path, split)
    if data.source == "sample":
        from qa_dist.data.sample import sample_path

        return file_source(str(sample_path(split)), split)
    if data.source.startswith("synthetic:"):
        return _synthetic_source(data.source, 0 if split == "train" else 1)
    if folder := _folder_of_files(data):
        files = files_of_split(folder, split)
        if not files:
            raise DataError(
                f"{data.source} has files of one split but no {split}; pass --train_file and --validation_file"
            )
        return _files_source(str(folder), files)
    splits = _load_hub(data)
    name = name_of_split(splits, split)
    if name is None:
        raise DataError(f"{data.source} has the splits {', '.join(splits)} but no {split}; pass {_FILES_INSTEAD}")
    if {"data", "paragraphs"} & set(splits[name].column_names):
        raise DataError(
            f"{data.source} holds files of SQuAD articles whose names do not say of which split they are; call them "
            "train... and dev... in a local folder, or pass --train_file and --validation_file"
        )
    return _data_set_source(f"{data.source} ({name})", splits[name])


def _file_of(data: DataConfig, split: Split) -> str | None:
    return data.train_file if split == "train" else data.validation_file


def file_source(name: str, split: Split) -> Source:
    """What a path means: a file, a folder with files, or a data set saved to disk.

    Args:
        name: The path; `~` stands for a home folder.
        split: Which files or which part of a folder is meant.

    Raises:
        DataError: It is not there, cannot be read, or holds nothing of this split.
    """
    path = _expanded(name)
    if os.path.isdir(path) and is_saved(path):
        splits = saved_splits(path)
        named = name_of_split(splits, split)
        # A data set that stands alone may serve as any.
        if (path / "dataset_dict.json").is_file() and named is None:
            raise DataError(
                f"{path} has the splits {', '.join(splits)} but no {split}; name a file or folder that has it"
            )
        data_set = next(iter(splits.values())) if named is None else splits[named]
        return _data_set_source(str(path), data_set)
    return _files_source(str(path), _files_at(path, split))


def _files_at(path: Path, split: Split) -> Sequence[Path]:
    """The files that a path means; none for a data set saved to disk, which has its own."""
    if not os.path.isdir(path):
        return [path]
    return [] if is_saved(path) else files_for(path, split)


def _files_source(name: str, paths: Sequence[Path]) -> Source:
    contents = [read_bytes(path) for path in paths]
    if len(paths) == 1:
        return Source(str(paths[0]), hashlib.sha256(contents[0]).hexdigest(), lambda: parse(contents[0], paths[0]))
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    files = f"read from {len(paths)} files: {listed([path.name for path in paths], len(paths))}"

    def read() -> Reading:
        readings = {path.name: parse(content, path) for path, content in zip(paths, contents, strict=True)}
        # Numbers that begin anew in each file tell rows of one file apart, and are no ids in a folder.
        begins_anew = sum(reading.is_numbered for reading in readings.values()) > 1
        records = [
            Record(f"{file}: {record.place}", _without_id(record.row) if is_no_id else record.row, record.problem)
            for file, reading in readings.items()
            for is_no_id in [begins_anew and reading.is_numbered]
            for record in reading
        ]
        notes = [f"{file}: {note}" for file, reading in readings.items() for note in reading.notes]
        versions = {reading.is_version_2 for reading in readings.values()} - {None}
        return Reading(records, (files, *notes), any(versions) if versions else None)

    return Source(name, hashlib.sha256(json.dumps(digests).encode()).hexdigest(), read, files)


def _without_id(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "id"}


def _folder_of_files(data: DataConfig) -> Path | None:
    """The local folder that `--dataset_name` names, if files of a split lie in it under names that say so."""
    folder = _expanded(data.source)
    if data.dataset_config_name or not os.path.isdir(folder) or is_saved(folder):
        return None
    return folder if files_of_split(folder, "train") or files_of_split(folder, "validation") else None


def _expanded(name: str) -> Path:
    # Not Path.expanduser, which raises for a user that does not exist.
    return Path(os.path.expanduser(name))


def _data_set_source(name: str, data_set: Any) -> Source:
    """A data set of the `datasets` library, with its values as Arrow has them, undecoded."""
    return _rows_source(name, data_set.with_format("arrow")[:].to_pylist())


def _rows_source(name: str, rows: Sequence[Row]) -> Source:
    digest = hashlib.sha256()
    usual = (*COLUMNS, "title", "is_impossible")
    for row in rows:
        values: Any = [row.get(column) for column in usual]
        if not row.keys() <= {*usual}:
            values = dict(row)
        digest.update(json.dumps(values, default=str).encode())
    return Source(name, digest.hexdigest(), lambda: lay_out(with_whole_ids(rows), Path(name)))


def _synthetic_source(name: str, seed: int) -> Source:
    from qa_dist.data.sample import synthetic_examples

    def rows(count: int) -> Iterator[Row]:
        return map(_row_of, synthetic_examples(count, seed=seed))

    count = int(name.removeprefix("synthetic:"))
    # An example depends on its seed and number only, so the first few tell which generator made all of them.
    few = _rows_source(name, list(rows(min(count, _NUM_HASHED_SYNTHETIC)))).content_sha256
    digest = hashlib.sha256(json.dumps([count, seed, few]).encode())
    return Source(name, digest.hexdigest(), lambda: read_rows(list(rows(count))))


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
    """The data sets of a hub id or local folder by split."""
    import datasets
    import datasets.packaged_modules

    source = data.source
    folder = _expanded(source)
    if os.path.isdir(folder):
        if is_saved(folder):
            if data.dataset_config_name:
                raise DataError(
                    f"--dataset_config_name is for data sets of the hub and {folder} is saved; leave it out"
                )
            return saved_splits(folder)
        # The library takes some words for formats even where there is a folder of that name.
        source = os.path.abspath(folder)
        if glob.has_magic(source):
            raise DataError(
                f"--dataset_name {data.source} cannot be read: {source} has *, ? or [ in it, and the datasets library "
                "would read other folders that match; rename it, or pass --train_file and --validation_file"
            )
    elif source in {module.name for module in pkgutil.iter_modules(datasets.packaged_modules.__path__)}:
        raise DataError(
            f"--dataset_name {source} is the name of a file format, and whatever lies in the current folder would be "
            "read; name files with --train_file and --validation_file"
        )
    try:
        with logs_held_back("huggingface_hub", "datasets"):
            return datasets.load_dataset(source, data.dataset_config_name)
    except Exception as error:  # the library raises a dozen unrelated types
        raise DataError(
            f"--dataset_name {data.source} cannot be loaded ({reason(error)}); it must be `sample`, `synthetic:N`, a "
            "local folder, or a hub data set while the hub can be reached: without it, pass --train_file and "
            "--validation_file"
        ) from error
