"""The feature store: prepared examples and features on disk, built once and mapped into memory by every rank.

    <root>/<fingerprint>/manifest.json    what it was made from, counts, and the hash of each file
                        /examples.arrow   questions, contexts and answers
                        /features.arrow   token ids, offsets and labels
    <root>/.<fingerprint>.lock            held by the process that builds
    <root>/.<fingerprint>.<n>.building    what is not complete yet

The fingerprint covers everything that features depend on: the bytes of the data, the tokenizer, the lengths, the
choice of examples and the format. Equal fingerprints mean equal bytes, so a store is never changed, and no store is
ever out of date. It appears under its name by a single rename of a finished, synchronised folder: whatever happens to
a builder, there is a whole store or none. Files are Arrow IPC with one record batch, so that whole columns are NumPy
views of the mapped pages.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qa_dist.common.errors import StoreError
from qa_dist.common.files import synchronise
from qa_dist.config.options import DataConfig, RunConfig
from qa_dist.data.checking import Report
from qa_dist.data.records import Answer, Example, Feature
from qa_dist.data.sources import Source, Split, load_source, max_samples, open_source
from qa_dist.features.windows import FeatureBuilder, FeatureColumns, FeatureSpec, FeatureStats, TokenizerSpec
from qa_dist.features.workers import build_columns
from qa_dist.model.pretrained import load_tokenizer

if TYPE_CHECKING:
    # Decoding imports torch, which building a store does without.
    from qa_dist.evaluation.answers import FeatureMap

Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

FORMAT_VERSION = 2
"""Changes with the layout of the files and with whatever in this program decides what a feature is."""

_MANIFEST = "manifest.json"
_EXAMPLES = "examples.arrow"
_FEATURES = "features.arrow"
_STAGING_SUFFIX = ".building"

_logger = logging.getLogger(__name__)


class FeatureStore:
    """A prepared store, mapped. Opening reads a few columns; the rest stays on disk until it is looked at.

    Arrays are read-only. A store pickles as its path, and forked processes share its pages.

    Shapes: N features, E examples, L tokens of a feature, C context tokens of a feature.

    Attributes:
        path: its folder.
        fingerprint: hex digest over all it was made from.
        ingredients: what the fingerprint covers, by name.
        report: what validation found in the whole source.
        stats: counts over the features.
        num_features: N.
        num_examples: E.
        num_unanswerable: examples without answers.
        lengths: int32 [N], tokens of each feature.
        context_length: int32 [N], context tokens of each feature.
        example_index: int32 [N]; this and the following are as in `Feature`.
        window: int32 [N].
        context_start: int32 [N].
        cls_token: int32 [N].
        start_token: int32 [N].
        end_token: int32 [N].
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        """Map the store in a folder.

        Args:
            path: The folder.
            verify: Whether to compare all files with the hashes in the manifest, at about half a second per 100 MB.

        Raises:
            StoreError: It is damaged, or of another version of this program.
        """
        self.path = Path(path)
        manifest = _read_manifest(self.path)
        for name, expected in manifest["files"].items():
            _check_file(self.path, name, expected, verify=verify)
        self.fingerprint: str = manifest["fingerprint"]
        self.ingredients: Mapping[str, Any] = manifest["ingredients"]
        self.report = Report.from_json(manifest["report"])
        self.stats = FeatureStats(**manifest["stats"])
        self.num_unanswerable: int = manifest["num_unanswerable"]
        try:
            self._examples = _map_batch(self.path / _EXAMPLES)
            self._map_features(_map_batch(self.path / _FEATURES))
        except (pa.ArrowException, OSError, KeyError) as error:
            raise _damaged(self.path, f"{error} while mapping it") from error
        self.num_examples: int = self._examples.num_rows
        self.num_features = len(self.lengths)

    def _map_features(self, batch: pa.RecordBatch) -> None:
        def column(name: str) -> Int32:
            values: Int32 = batch.column(name).to_numpy(zero_copy_only=True)
            return values

        self.example_index = column("example_index")
        self.window = column("window")
        self.context_start = column("context_start")
        self.cls_token = column("cls_token")
        self.start_token = column("start_token")
        self.end_token = column("end_token")
        ids, types, offsets = (batch.column(name) for name in ("input_ids", "token_type_ids", "context_offsets"))
        self._first_token: Int64 = ids.offsets.to_numpy(zero_copy_only=True)
        self._first_offset: Int64 = offsets.offsets.to_numpy(zero_copy_only=True)
        self._input_ids: Int32 = ids.values.to_numpy(zero_copy_only=True)
        self._token_type_ids: Int8 = types.values.to_numpy(zero_copy_only=True)
        self._context_offsets: Int32 = offsets.values.values.to_numpy(zero_copy_only=True).reshape(-1, 2)
        self.lengths: Int32 = np.diff(self._first_token).astype(np.int32)
        self.context_length: Int32 = np.diff(self._first_offset).astype(np.int32)
        for array in (self.lengths, self.context_length):
            array.flags.writeable = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path,)

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}, {self.num_examples} examples, {self.num_features} features)"

    def input_ids(self, feature_index: int) -> Int32:
        """Token ids int32 [L] of a feature, a view."""
        return self._input_ids[self._first_token[feature_index] : self._first_token[feature_index + 1]]

    def token_type_ids(self, feature_index: int) -> Int8:
        """Token types int8 [L] of a feature, a view."""
        return self._token_type_ids[self._first_token[feature_index] : self._first_token[feature_index + 1]]

    def context_offsets(self, feature_index: int) -> Int32:
        """Start and end character int32 [C, 2] of the context tokens of a feature, a view."""
        return self._context_offsets[self._first_offset[feature_index] : self._first_offset[feature_index + 1]]

    def flat(self, feature_indices: npt.NDArray[np.integer[Any]] | Sequence[int]) -> tuple[Int32, Int8]:
        """Token ids int32 [T] and token types int8 [T] of the given features, one behind the other, as copies."""
        chosen = np.asarray(feature_indices, np.int64)
        lengths = self.lengths[chosen].astype(np.int64)
        # Token j of the result is token j - (tokens of the features before it) of its feature.
        shift = self._first_token[chosen] - (np.cumsum(lengths) - lengths)
        positions = np.repeat(shift, lengths) + np.arange(lengths.sum())
        return self._input_ids[positions], self._token_type_ids[positions]

    @cached_property
    def largest_token_id(self) -> int:
        """The largest token id of all features; reads the whole column."""
        return int(self._input_ids.max(initial=0))

    def feature(self, feature_index: int) -> Feature:
        """One feature, whose arrays are views."""
        return Feature(
            example_index=int(self.example_index[feature_index]),
            window=int(self.window[feature_index]),
            input_ids=self.input_ids(feature_index),
            token_type_ids=self.token_type_ids(feature_index),
            context_start=int(self.context_start[feature_index]),
            context_offsets=self.context_offsets(feature_index),
            cls_token=int(self.cls_token[feature_index]),
            start_token=int(self.start_token[feature_index]),
            end_token=int(self.end_token[feature_index]),
        )

    def feature_map(self) -> "FeatureMap":
        """Where all features come from, for decoding; its arrays are views."""
        from qa_dist.evaluation.answers import FeatureMap

        return FeatureMap(
            example_index_N=self.example_index,
            window_N=self.window,
            context_start_N=self.context_start,
            context_offsets_T2=self._context_offsets,
            first_offset_N1=self._first_offset,
        )

    def example(self, example_index: int) -> Example:
        """One example."""
        row = {name: self._examples.column(name)[example_index].as_py() for name in self._examples.schema.names}
        answers = zip(row["answer_texts"], row["answer_starts"], strict=True)
        return Example(
            id=row["id"],
            question=row["question"],
            context=row["context"],
            answers=tuple(Answer(text, start) for text, start in answers),
            title=row["title"],
        )

    @cached_property
    def example_ids(self) -> list[str]:
        """Id of every example [E]."""
        ids: list[str] = self._examples.column("id").to_pylist()
        return ids

    @cached_property
    def contexts(self) -> list[str]:
        """Context of every example [E]; examples of one context share the string."""
        column = self._examples.column("context")
        distinct = column.dictionary.to_pylist()
        return [distinct[index] for index in column.indices.to_pylist()]

    def answer_texts(self, example_index: int) -> list[str]:
        """Texts of the reference answers of an example; none if it is unanswerable."""
        return self._answer_texts[example_index]

    @cached_property
    def _answer_texts(self) -> list[list[str]]:
        texts: list[list[str]] = self._examples.column("answer_texts").to_pylist()
        return texts


def _reopen(path: Path) -> FeatureStore:
    # Who pickled the store had it open, so its bytes were checked if anybody wanted that.
    return FeatureStore(path, verify=False)


def store_root(data: DataConfig) -> Path:
    """The folder that holds all stores: `--store_dir`, else $QA_DIST_STORE, else qa_dist in the user's cache folder."""
    # Not Path.expanduser, which raises for a user that does not exist.
    if data.store_dir:
        return Path(os.path.expanduser(data.store_dir))
    if named := os.environ.get("QA_DIST_STORE"):
        return Path(os.path.expanduser(named))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "qa_dist"


def prepare_store(
    config: RunConfig, split: Split, *, tokenizer: Any = None, progress: bool = False, verify: bool = True
) -> FeatureStore:
    """The store of one split, built first if it is not there.

    Any number of processes may call this at once: one builds, the others wait for it and map what it built. The lock
    they wait for belongs to a process and is free when that has ended, in whatever way.

    Args:
        config: Its `data` and `model` options are used.
        split: "train" or "validation".
        tokenizer: The tokenizer of `config.model`, if the caller has loaded it already.
        progress: Whether to tell on stderr what goes on: a bar while tokenising, and what validation found. One rank
            does.
        verify: Whether to check the files of a store that was there already.

    Raises:
        UserError: The data, the tokenizer or the lengths cannot be used, the store is damaged, or it cannot be written.
    """
    data = config.data
    source = open_source(data, split)
    tokenizer_spec = TokenizerSpec.of(load_tokenizer(config.model) if tokenizer is None else tokenizer)
    spec = FeatureSpec(data.max_seq_length, data.doc_stride, data.max_question_length)
    # The length itself and not the option: "as long as fits" and the number that comes out are one and the same.
    spec = dataclasses.replace(spec, max_question_length=FeatureBuilder(tokenizer_spec, spec).max_question_length)
    ingredients = _ingredients(source, tokenizer_spec, spec, data, split)
    fingerprint = _digest(ingredients)
    root = store_root(data)
    path = root / fingerprint
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
                    progress=progress,
                )
                with _writing(root):
                    _write_store(path, ingredients, examples, columns, stats, report)
                verify = False
    store = FeatureStore(path, verify=verify)
    if store.fingerprint != fingerprint:
        raise _damaged(path, f"its manifest is that of {store.fingerprint}")
    if progress and (store.report.problems or store.report.num_mended):
        _logger.warning("%s: %s", source.name, store.report.text())
    if progress and (num_cut := store.stats.num_truncated_questions):
        _logger.warning("%s: %d questions were cut to %d tokens", source.name, num_cut, spec.max_question_length)
    return store


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
        "on_invalid": data.on_invalid,
        "max_samples": most,
        "subset_seed": None if most is None else data.subset_seed,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------- reading


def _damaged(path: Path, what: str) -> StoreError:
    return StoreError(f"the feature store {path} is damaged ({what}); delete that folder and it will be built again")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
        intact = manifest["manifest_sha256"] == _digest(body)
    except OSError as error:
        raise _damaged(path, f"{_MANIFEST}: {error.strerror}") from error
    except (ValueError, AttributeError, KeyError, RecursionError) as error:
        raise _damaged(path, f"{_MANIFEST} cannot be read") from error
    if not intact:
        raise _damaged(path, f"{_MANIFEST} was changed")
    if manifest["format_version"] != FORMAT_VERSION:
        raise StoreError(
            f"the feature store {path} has format {manifest['format_version']} but this program reads "
            f"{FORMAT_VERSION}; delete that folder and it will be built again"
        )
    return body


def _check_file(path: Path, name: str, expected: Mapping[str, Any], *, verify: bool) -> None:
    try:
        with (path / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected["num_bytes"]:
                raise _damaged(path, f"{name} has {size:,} bytes instead of {expected['num_bytes']:,}")
            if verify and hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise _damaged(path, f"{name} does not have the bytes that were written")
    except OSError as error:
        raise _damaged(path, f"{name}: {error.strerror}") from error


def _map_batch(path: Path) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


# ----------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Turn what the file system refuses into one sentence.

    Raises:
        StoreError: Instead of any OSError inside.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
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
            _sweep(root, fingerprint)
        yield


def _sweep(root: Path, fingerprint: str) -> None:
    """Remove what dead builders left behind; the caller holds the lock of `fingerprint`."""
    for staging in root.glob(f".*{_STAGING_SUFFIX}"):
        owner = staging.name.split(".")[1]
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
    """Write a store under another name, then give it its own."""
    # Not tempfile: its folders are closed to other users, with whom a store may be shared.
    staging = path.parent / f".{path.name}.{secrets.token_hex(4)}{_STAGING_SUFFIX}"
    staging.mkdir()
    try:
        _write_batch(staging / _EXAMPLES, _example_batch(examples))
        _write_batch(staging / _FEATURES, _feature_batch(columns))
        manifest = {
            "format_version": FORMAT_VERSION,
            "fingerprint": path.name,
            "ingredients": dict(ingredients),
            "num_unanswerable": sum(not example.answers for example in examples),
            "stats": dataclasses.asdict(stats),
            "report": report.to_json(),
            "files": {name: _file_entry(staging / name) for name in (_EXAMPLES, _FEATURES)},
        }
        # Through JSON once, so that the digest is over what a reader will see.
        manifest = json.loads(json.dumps(manifest))
        manifest["manifest_sha256"] = _digest(manifest)
        (staging / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for name in (_EXAMPLES, _FEATURES, _MANIFEST, "."):
            synchronise(staging / name)
        staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    synchronise(path.parent)


def _example_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    texts = [[answer.text for answer in example.answers] for example in examples]
    starts = [[answer.start_char for answer in example.answers] for example in examples]
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
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"num_bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
