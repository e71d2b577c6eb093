"""A store built: once per machine, under a lock, whole or not at all. `prepare_store` is the way in."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qa_dist.common.arrays import Int32
from qa_dist.common.errors import StoreError
from qa_dist.common.files import staged
from qa_dist.config.options import DataConfig, RunConfig
from qa_dist.data.checking import READING_RULES, Report
from qa_dist.data.folders import Split
from qa_dist.data.records import Example
from qa_dist.data.sources import Source, load_source, max_samples, open_source
from qa_dist.features.offsets import has_accents
from qa_dist.features.store import (
    EXAMPLES,
    FEATURES,
    FORMAT_VERSION,
    MANIFEST,
    STAGING_SUFFIX,
    FeatureStore,
    damaged,
    digest,
)
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureBuilder, FeatureColumns, FeatureSpec, FeatureStats
from qa_dist.features.workers import build_columns

_logger = logging.getLogger(__name__)


def store_root(data: DataConfig) -> Path:
    """The folder that holds all stores: `--store_dir`, else $QA_DIST_STORE, else qa_dist in the user's cache folder."""
    # Not Path.expanduser, which raises for a user that does not exist.
    if data.store_dir:
        return Path(os.path.expanduser(data.store_dir))
    if named := os.environ.get("QA_DIST_STORE"):
        return Path(os.path.expanduser(named))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "qa_dist"


def may_lack_answers(data: DataConfig, stores: Iterable[FeatureStore]) -> bool:
    """Whether questions may have no answer: as `--version_2_with_negative` says, else whether some have none."""
    if data.version_2_with_negative is not None:
        return data.version_2_with_negative
    return any(store.num_unanswerable for store in stores)


def prepare_store(config: RunConfig, split: Split, *, tokenizer: Any, progress: bool = False) -> FeatureStore:
    """The store of one split, built first if it is not there.

    Any number of processes may call this at once: one builds, the others wait for it and map what it built. The lock
    they wait for belongs to a process and is free when that has ended, in whatever way.

    Args:
        config: Its `data` options are used.
        split: "train" or "validation".
        tokenizer: The tokenizer of `config.model`, a fast one of transformers.
        progress: Whether to show a bar while tokenising, where `config` has bars, and to log what validation found; one
            rank does.

    Raises:
        UserError: The data, the tokenizer or the lengths cannot be used, the store is damaged, or it cannot be written.
    """
    data = config.data
    source = open_source(data, split)
    tokenizer_spec = TokenizerSpec.of(tokenizer)
    spec = FeatureSpec(data.max_seq_length, data.doc_stride, data.max_question_length)
    # The length itself and not the option: "as long as fits" and the number that comes out are one and the same.
    spec = dataclasses.replace(spec, max_question_length=FeatureBuilder(tokenizer_spec, spec).max_question_length)
    ingredients = _ingredients(source, tokenizer_spec, spec, data, split)
    root = store_root(data)
    fingerprint = _earlier_fingerprint(root, ingredients, source, data, split) or digest(ingredients)
    path = root / fingerprint
    is_built_here = False
    if not os.path.exists(path):
        with _locked(root, fingerprint):
            if not os.path.exists(path):
                _logger.info("preparing %s in %s", source.name, path)
                examples, report = load_source(source, data, split)
                columns, stats = build_columns(
                    examples,
                    tokenizer_spec,
                    spec,
                    num_workers=data.preprocessing_num_workers,
                    progress=progress and not config.training.disable_tqdm,
                )
                with _writing(root):
                    _write_store(path, ingredients, examples, columns, stats, report)
                is_built_here = True
    store = FeatureStore(path, verify=not is_built_here)
    if store.fingerprint != fingerprint:
        raise damaged(path, f"its manifest is that of {store.fingerprint}")
    if progress and store.report.is_worth_telling:
        _logger.warning("%s: %s%s", source.name, store.report.text(), _renamed(source, store.report))
    if progress and (num_cut := store.stats.num_truncated_questions):
        _logger.warning("%s: %d questions were cut to %d tokens", source.name, num_cut, spec.max_question_length)
    return store


def _renamed(source: Source, report: Report) -> str:
    """What to add to a report whose files had other names when the store was made; nothing else of them has changed."""
    if source.note is None or source.note in report.notes:
        return ""
    return f"; the files were called so when the store was made, now it would be {source.note}"


def _ingredients(
    source: Source, tokenizer: TokenizerSpec, spec: FeatureSpec, data: DataConfig, split: Split
) -> dict[str, Any]:
    """Everything that the bytes of a store depend on."""
    most = max_samples(data, split)
    return {
        "format_version": FORMAT_VERSION,
        "content_sha256": source.content_sha256,
        "tokenizer_sha256": tokenizer.sha256(),
        **dataclasses.asdict(spec),
        "allow_unanswerable": data.version_2_with_negative is not False,
        "reading_rules": READING_RULES,
        "for_training": split == "train",
        "on_invalid": data.on_invalid,
        "max_samples": most,
        "subset_seed": None if most is None else data.subset_seed,
        "labels": "first answer in the window",
    }


def _earlier_fingerprint(
    root: Path, ingredients: Mapping[str, Any], source: Source, data: DataConfig, split: Split
) -> str | None:
    """The name of a store of an earlier version that has the examples and labels of now, if there is one in `root`.

    At first, only the first answer of an example was a label, and a store did not say by which rules its data was read.
    They make no difference where every question has an answer at its offset; elsewhere the source is read again and
    compared. Accents that are characters of their own were not a letter's. Ids such as "1.0" in JSON were 1.
    """
    later = ("labels", "reading_rules", "for_training")
    first = digest({name: value for name, value in ingredients.items() if name not in later})
    known = [first, *(digest({**ingredients, "reading_rules": rules}) for rules in range(READING_RULES - 1, 0, -1))]
    fingerprint = next((name for name in known if os.path.exists(root / name)), None)
    if os.path.exists(root / digest(ingredients)) or fingerprint is None:
        return None
    store = FeatureStore(root / fingerprint)
    if (fingerprint == first and store.has_several_answers) or any(map(has_accents, {*store.contexts})):
        return None
    report = store.report
    is_plain = not (report.num_mended or report.problems or report.num_unanswerable or report.notes)
    has_numbers_for_ids = all(map(str.isdecimal, store.example_ids))
    # Validation data was scored by its answers as the contexts spell them, and by cells that were lists of answers.
    if not is_plain or report.num_without_references or has_numbers_for_ids or split == "validation":
        examples, _ = load_source(source, data, split)
        num_unanswerable = sum(example.is_unanswerable for example in examples)
        if num_unanswerable != store.num_unanswerable or not store.holds(_example_batch(examples)):
            return None
    return fingerprint


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Turn what the file system refuses into one sentence.

    Raises:
        StoreError: Instead of any OSError inside.
    """
    try:
        yield
    except OSError as error:
        # mkdir says of a file only that it exists.
        is_file = isinstance(error, FileExistsError)
        reason = os.strerror(errno.ENOTDIR) if is_file else error.strerror or " ".join(str(error).split())
        raise StoreError(
            f"the feature store cannot be written to {root} ({reason}); make room or permit writing there, or name "
            "another folder with --store_dir"
        ) from error


@contextlib.contextmanager
def _locked(root: Path, fingerprint: str) -> Iterator[None]:
    """Hold the lock of a fingerprint, after waiting for whoever has it.

    Lock files stay: deleting one would let two processes lock two files of the same name.

    Raises:
        StoreError: The folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _writing(root):
            root.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((root / f".{fingerprint}.lock").open("ab"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _logger.warning("waiting for another process that is preparing the feature store %s", fingerprint)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                # Some file systems of networks know no locks: two may build the same store, and one of them is kept.
                if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise
            _sweep(root, fingerprint)
        yield


def _sweep(root: Path, fingerprint: str) -> None:
    """Remove what dead builders of this machine left behind; the caller holds the lock of `fingerprint`.

    Locks of a folder that machines share may be each machine's own.
    """
    for staging in root.glob(f".*{STAGING_SUFFIX}"):
        _, owner, builder, *_ = staging.name.split(".")
        # Earlier versions did not name the machine.
        if "-" in builder and not builder.startswith(f"{_machine()}-"):
            continue
        if owner == fingerprint:
            shutil.rmtree(staging, ignore_errors=True)
            continue
        # Whoever builds holds the lock, so a lock that can be had belongs to the dead.
        with contextlib.suppress(OSError), (root / f".{owner}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(staging, ignore_errors=True)


def _write_store(
    path: Path,
    ingredients: Mapping[str, Any],
    examples: Sequence[Example],
    columns: FeatureColumns,
    stats: FeatureStats,
    report: Report,
) -> None:
    # Not tempfile: its folders are closed to other users, with whom a store may be shared.
    aside = path.with_name(f".{path.name}.{_machine()}-{secrets.token_hex(4)}{STAGING_SUFFIX}")
    with _kept_if_there(path), staged(path, aside=aside):
        aside.mkdir()
        _write_batch(aside / EXAMPLES, _example_batch(examples))
        _write_batch(aside / FEATURES, _feature_batch(columns))
        manifest = {
            "format_version": FORMAT_VERSION,
            "fingerprint": path.name,
            "ingredients": dict(ingredients),
            "num_unanswerable": sum(example.is_unanswerable for example in examples),
            "stats": dataclasses.asdict(stats),
            "report": report.to_json(),
            "files": {name: _file_entry(aside / name) for name in (EXAMPLES, FEATURES)},
        }
        # Through JSON once, so that the digest is over what a reader will see.
        manifest = json.loads(json.dumps(manifest))
        manifest["manifest_sha256"] = digest(manifest)
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _machine() -> str:
    """What tells this machine from others that share a folder, in a file's name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


@contextlib.contextmanager
def _kept_if_there(path: Path) -> Iterator[None]:
    """Let a store stay that another machine has put in this place meanwhile: it is the same."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (path / MANIFEST).is_file():
            raise


def _example_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    # Null where nothing is known; -1 where a reference has no place.
    texts = [
        [*(answer.text for answer in example.answers), *example.other_texts] if example.has_references else None
        for example in examples
    ]
    starts = [
        [*(answer.start_char for answer in example.answers), *(-1 for _ in example.other_texts)] for example in examples
    ]
    return pa.record_batch(
        {
            "id": pa.array([example.id for example in examples], pa.large_string()),
            "title": pa.array([example.title for example in examples], pa.large_string()),
            "question": pa.array([example.question for example in examples], pa.large_string()),
            # Each context once: SQuAD asks four to five questions about a paragraph.
            "context": pa.array([example.context for example in examples], pa.large_string()).dictionary_encode(),
            "answer_texts": pa.array(texts, pa.large_list(pa.large_string())),
            "answer_starts": pa.array(starts, pa.large_list(pa.int32())),
        }
    )


def _feature_batch(columns: FeatureColumns) -> pa.RecordBatch:
    def offsets(lengths: Int32) -> pa.Array:
        return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))

    def tokens(values: npt.NDArray[Any]) -> pa.Array:
        # Large lists count in 64 bits: 2 ** 31 tokens are only 12 million features.
        return pa.LargeListArray.from_arrays(offsets(columns.lengths), pa.array(values))

    pairs = pa.FixedSizeListArray.from_arrays(pa.array(columns.context_offsets.reshape(-1)), 2)
    names = ("example_index", "window", "context_start", "cls_token", "start_token", "end_token")
    return pa.record_batch(
        {
            **{name: pa.array(getattr(columns, name)) for name in names},
            "input_ids": tokens(columns.input_ids),
            "token_type_ids": tokens(columns.token_type_ids),
            "context_offsets": pa.LargeListArray.from_arrays(offsets(columns.context_lengths), pairs),
        }
    )


def _write_batch(path: Path, batch: pa.RecordBatch) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _file_entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"num_bytes": os.fstat(file.fileno()).st_size, "sha256": sha256}
