"""A mapped store: what it holds, and damage."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qa_dist.common.errors import StoreError
from qa_dist.features import building
from qa_dist.features.store import FeatureStore
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureBuilder, FeatureSpec
from tests.tiny import tiny_tokenizer
from tests.unit.data_fixtures import (
    files_of,
    map_of,
    prepared,
    run_config,
    stored_feature,
    tiny_examples,
)

ROOT = Path(__file__).resolve().parents[3]


# ---------------------------------------------------------------------------------------------------------- contents


def test_a_store_holds_the_examples_and_their_features(built: FeatureStore) -> None:
    examples = tiny_examples()
    spec = TokenizerSpec.of(tiny_tokenizer())
    features, stats = FeatureBuilder(spec, FeatureSpec(96, 24)).build(examples)
    assert (built.num_examples, built.num_features) == (len(examples), len(features))
    assert built.num_features > built.num_examples
    assert built.num_unanswerable == 2
    assert built.stats == stats
    assert built.report.num_examples == len(examples)
    assert [built.example(i) for i in range(built.num_examples)] == examples
    assert built.example_ids == [example.id for example in examples]
    assert built.contexts == [example.context for example in examples]
    for i, example in enumerate(examples):
        assert built.answer_texts(i) == [answer.text for answer in example.answers]
    for i, feature in enumerate(features):
        stored = stored_feature(built, i)
        for name in ("input_ids", "token_type_ids", "context_offsets"):
            np.testing.assert_array_equal(getattr(stored, name), getattr(feature, name))
            assert getattr(stored, name).dtype == getattr(feature, name).dtype
        for name in ("example_index", "window", "context_start", "cls_token", "start_token", "end_token"):
            assert getattr(stored, name) == getattr(feature, name)
            assert getattr(built, name).dtype == np.int32
        assert built.lengths[i] == len(feature.input_ids)
        assert built.context_length[i] == len(feature.context_offsets)


def test_columns_are_views_that_cannot_be_written(built: FeatureStore) -> None:
    offsets = built.feature_map().context_offsets_T2
    arrays = [built.lengths, built.start_token, built.input_ids(1), built.token_type_ids(1), offsets]
    for array in arrays:
        assert not array.flags.writeable
    assert not built.input_ids(1).flags.owndata


@pytest.mark.parametrize("indices", [[0], [5, 2, 2, 9], [], list(range(20))])
def test_flat_is_the_given_features_one_behind_the_other(built: FeatureStore, indices: list[int]) -> None:
    for chosen in (indices, np.array(indices, np.int64), np.array(indices, np.int32)):
        ids, types = built.flat(chosen)
        np.testing.assert_array_equal(ids, np.concatenate([[], *(built.input_ids(i) for i in indices)]))
        np.testing.assert_array_equal(types, np.concatenate([[], *(built.token_type_ids(i) for i in indices)]))
        assert (ids.dtype, types.dtype) == (np.int32, np.int8)
        assert ids.flags.writeable


def test_the_feature_map_is_that_of_the_features(built: FeatureStore) -> None:
    features, _ = FeatureBuilder(TokenizerSpec.of(tiny_tokenizer()), FeatureSpec(96, 24)).build(tiny_examples())
    expected = map_of(features)
    found = built.feature_map()
    for name in ("example_index_N", "window_N", "context_start_N", "context_offsets_T2", "first_offset_N1"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype


def test_stores_pickle_as_their_path(built: FeatureStore) -> None:
    content = pickle.dumps(built)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert (again.path, again.fingerprint) == (built.path, built.fingerprint)
    np.testing.assert_array_equal(again.input_ids(3), built.input_ids(3))


FORK = """
import json, os, sys
from qa_dist.features.store import FeatureStore

store = FeatureStore(sys.argv[1])
expected = store.flat([1, 2])[0].tolist()
child = os.fork()
if child == 0:
    is_equal = store.flat([1, 2])[0].tolist() == expected and bool(store.contexts[1])
    mappings = []
    for line in open("/proc/self/smaps"):
        first, *rest = line.split()
        if not first.endswith(":"):
            is_ours = line.endswith("/features.arrow\\n")
            mappings += [{}] if is_ours else []
        elif is_ours and rest[-1] == "kB":
            mappings[-1][first[:-1]] = int(rest[0])
    print(json.dumps([is_equal, mappings]), flush=True)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what a process has of its mappings")
def test_forked_processes_share_the_pages_of_a_store(built: FeatureStore) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(built.path)]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    is_equal, mappings = json.loads(done.stdout)
    assert is_equal
    assert len(mappings) == 1, "the file is mapped, and not read into memory of each process"
    assert mappings[0]["Rss"] > 0, "the child has looked at it"
    # Copies of the file's pages. Private_Dirty would count the file's own as well where they are on no disk, as in a
    # tmpfs.
    assert mappings[0]["Anonymous"] == 0


# ------------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["examples.arrow", "features.arrow", "manifest.json"])
@pytest.mark.parametrize("place", [0.02, 0.5, 0.97])
def test_a_flipped_bit_is_found(copy: Path, name: str, place: float) -> None:
    content = bytearray((copy / name).read_bytes())
    content[int(place * len(content))] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(StoreError, match=f"{copy.name} is damaged .*{name}.*delete that folder"):
        FeatureStore(copy)


@pytest.mark.parametrize("name", ["examples.arrow", "features.arrow", "manifest.json"])
def test_a_short_or_missing_file_is_found_even_without_verification(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    for spoil in (lambda path: path.write_bytes(content[:-100]), lambda path: path.unlink()):
        spoil(copy / name)
        with pytest.raises(StoreError, match=f"is damaged .*{name}"):
            FeatureStore(copy, verify=False)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"\xff", b"[" * 100_000])
def test_a_manifest_of_another_shape_is_found(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"is damaged \(manifest.json"):
        FeatureStore(copy)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest in a way that its own hash does not tell."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del manifest["manifest_sha256"]
    change(manifest)
    manifest["manifest_sha256"] = building.digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_another_format_version_is_refused(copy: Path) -> None:
    edit_manifest(copy, lambda manifest: manifest.update(format_version=99))
    with pytest.raises(StoreError, match=r"has format 99 but this program reads .*delete that folder"):
        FeatureStore(copy)


def test_files_that_are_no_arrow_are_damage_even_if_hashed(copy: Path) -> None:
    content = b"not Arrow at all" * 100
    (copy / "features.arrow").write_bytes(content)
    entry = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(copy, lambda manifest: manifest["files"].update({"features.arrow": entry}))
    with pytest.raises(StoreError, match="while mapping it"):
        FeatureStore(copy)


def test_a_store_under_another_fingerprint_is_refused(
    tokenizer_folder: str, built: FeatureStore, tmp_path: Path
) -> None:
    config = run_config(tokenizer_folder, tmp_path, doc_stride=25)
    wanted = prepared(config, "train")
    shutil.rmtree(wanted.path)
    shutil.copytree(built.path, wanted.path)
    with pytest.raises(StoreError, match="its manifest is that of"):
        prepared(config, "train")


def test_deleting_a_damaged_store_brings_it_back(tokenizer_folder: str, tmp_path: Path) -> None:
    config = run_config(tokenizer_folder, tmp_path)
    path = prepared(config, "train").path
    before = files_of(path)
    (path / "features.arrow").write_bytes(b"")
    with pytest.raises(StoreError, match=r"is damaged \(features\.arrow has 0 bytes instead of [1-9][\d,]*\)"):
        prepared(config, "train")
    shutil.rmtree(path)
    assert files_of(prepared(config, "train").path) == before
