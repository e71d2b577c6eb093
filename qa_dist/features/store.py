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

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qa_dist.common.arrays import Int8, Int32, Int64
from qa_dist.common.errors import StoreError
from qa_dist.data.checking import Report
from qa_dist.data.records import Answer, Example
from qa_dist.features.table import FeatureTable
from qa_dist.features.windows import FeatureStats

FORMAT_VERSION = 2
"""Changes with the layout of the files and with whatever in this program decides what a feature is."""

MANIFEST = "manifest.json"
EXAMPLES = "examples.arrow"
FEATURES = "features.arrow"
STAGING_SUFFIX = ".building"


class FeatureStore(FeatureTable):
    """A prepared store, mapped. Opening reads a few columns; the rest stays on disk until it is looked at.

    Arrays are read-only. A store pickles as its path, and forked processes share its pages.

    Shapes: N features, E examples.

    Attributes:
        path: its folder.
        fingerprint: hex digest over all it was made from.
        ingredients: what the fingerprint covers, by name.
        report: what validation found in the whole source.
        stats: counts over the features.
        num_examples: E.
        num_unanswerable: examples that are known to have no answer.
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
            self._examples = _map_batch(self.path / EXAMPLES)
            self._map_features(_map_batch(self.path / FEATURES))
        except (pa.ArrowException, OSError, KeyError) as error:
            raise damaged(self.path, f"{error} while mapping it") from error
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

    @property
    def has_several_answers(self) -> bool:
        """Whether some example has more than one reference answer."""
        places = self._examples.column("answer_texts").offsets.to_numpy()
        return bool((np.diff(places) > 1).any())

    def holds(self, examples: pa.RecordBatch) -> bool:
        """Whether these are the examples of the store, in the columns that it has."""
        return bool(self._examples.equals(examples))

    def answer_texts(self, example_index: int) -> list[str]:
        """Texts of the reference answers of an example; none if it is unanswerable, or if they are not known."""
        return self._answer_texts[example_index] or []

    def references(self, example_index: int) -> list[tuple[str, int]] | None:
        """Text and first character of each reference answer of an example.

        The character is -1 where the place is not known; None instead of a list where the answers are not.
        """
        texts = self._answer_texts[example_index]
        return None if texts is None else list(zip(texts, self._answer_starts[example_index], strict=True))

    @cached_property
    def _answer_starts(self) -> list[list[int]]:
        starts: list[list[int]] = self._examples.column("answer_starts").to_pylist()
        return starts

    def example(self, example_index: int) -> Example:
        """An example as it was read; references without a place come behind those with one."""
        row = {name: self._examples.column(name)[example_index].as_py() for name in self._examples.schema.names}
        texts, starts = row.pop("answer_texts"), row.pop("answer_starts")
        places = list(zip(texts or [], starts or [], strict=True))
        return Example(
            **row,
            answers=tuple(Answer(text, start) for text, start in places if start >= 0),
            other_texts=tuple(text for text, start in places if start < 0),
            has_references=texts is not None,
        )

    @cached_property
    def questions(self) -> list[str]:
        """Question of every example [E]."""
        questions: list[str] = self._examples.column("question").to_pylist()
        return questions

    def context_share(self, token_id: int) -> float:
        """Share of a token among the context tokens of all features, from 0 to 1."""
        num_before = np.concatenate([[0], np.cumsum(self._input_ids == token_id, dtype=np.int64)])
        first = self._first_token[:-1] + self.context_start
        count = int((num_before[first + self.context_length] - num_before[first]).sum())
        return count / max(1, int(self.context_length.sum()))

    @cached_property
    def _answer_texts(self) -> list[list[str] | None]:
        texts: list[list[str] | None] = self._examples.column("answer_texts").to_pylist()
        return texts

    @cached_property
    def has_references(self) -> npt.NDArray[np.bool_]:
        """Whether the reference answers of each example are known, bool [E]; only those can be scored."""
        return np.asarray(self._examples.column("answer_texts").is_valid().to_numpy(zero_copy_only=False), np.bool_)

    @cached_property
    def is_labelled(self) -> npt.NDArray[np.bool_]:
        """Whether it is known what a model should say to each feature, bool [N].

        It is not where nothing is known of the example's answers, or where none of them has a place.
        """
        has_place = np.array([not starts or max(starts) >= 0 for starts in self._answer_starts], np.bool_)
        has_label = has_place & self.has_references
        return has_label[self.example_index]


def _reopen(path: Path) -> FeatureStore:
    # Who pickled the store had it open, so its bytes were checked if anybody wanted that.
    return FeatureStore(path, verify=False)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------- reading


def damaged(path: Path, what: str) -> StoreError:
    """The error of a store that is not as it was written."""
    return StoreError(f"the feature store {path} is damaged ({what}); delete that folder and it will be built again")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
        intact = manifest["manifest_sha256"] == digest(body)
    except OSError as error:
        raise damaged(path, f"{MANIFEST}: {error.strerror}") from error
    except (ValueError, AttributeError, KeyError, RecursionError) as error:
        raise damaged(path, f"{MANIFEST} cannot be read") from error
    if not intact:
        raise damaged(path, f"{MANIFEST} was changed")
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
                raise damaged(path, f"{name} has {size:,} bytes instead of {expected['num_bytes']:,}")
            if verify and hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise damaged(path, f"{name} does not have the bytes that were written")
    except OSError as error:
        raise damaged(path, f"{name}: {error.strerror}") from error


def _map_batch(path: Path) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
