"""A hand-written data set and small tokenizers for the tests of the data path."""

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qa_dist.common.reading import read_bytes
from qa_dist.config.options import DataConfig, ModelConfig, RunConfig
from qa_dist.data.checking import validate
from qa_dist.data.folders import Split
from qa_dist.data.formats import parse
from qa_dist.data.records import Example, Feature
from qa_dist.data.rows import Record
from qa_dist.features.building import prepare_store
from qa_dist.features.store import FeatureStore
from qa_dist.features.table import FeatureMap
from qa_dist.model.pretrained import load_tokenizer
from tests.tiny import tiny_tokenizer

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
TINY_SQUAD = FIXTURES / "tiny_squad.json"
"""Accents, emoji, combining marks, CRLF, unanswerable questions, and a context of several windows."""
MALFORMED = FIXTURES / "malformed"

THOROUGH = pytest.mark.skipif(
    os.environ.get("QA_DIST_THOROUGH") != "1", reason="takes a minute more than its part: set QA_DIST_THOROUGH=1"
)
"""For tests that do the whole of what another test does a part of."""


def some_articles(path: Path, folder: Path, first: int = 0, every: int = 8) -> str:
    """A file with every eighth article of a gzipped SQuAD file, or with fewer, from one on."""
    document = json.loads(gzip.decompress(path.read_bytes()))
    made = folder / path.name.removesuffix(".gz")
    made.write_text(json.dumps({**document, "data": document["data"][first::every]}), encoding="utf-8")
    return str(made)


def read_file(path: Path) -> list[Record]:
    return list(parse(read_bytes(path), path))


def tiny_examples() -> list[Example]:
    return validate(read_file(TINY_SQUAD))[0]


def row(example_id: str = "q1", **changes: Any) -> dict[str, Any]:
    """A valid row, with some keys changed; ... removes a key."""
    base = {
        "id": example_id,
        "context": "Mora lies on a lake. The lake is deep.",
        "question": "Where does Mora lie?",
        "answers": {"text": ["on a lake"], "answer_start": [10]},
    }
    return {key: value for key, value in (base | changes).items() if value is not ...}


def write_rows(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return str(path)


def byte_tokenizer(template: str = "roberta") -> Any:
    """A byte-level tokenizer of single bytes, several of which make one accented letter or emoji.

    Templates: "roberta" (<s> A </s></s> B </s>, no token types), "xlnet" (A <sep> B <sep> <cls>, pads on the left),
    "bare" (no special tokens at all), "bos" (<s> A B).
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", "<pad>", "<cls>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    names: dict[str, Any] = {"pad_token": "<pad>"}
    side = "right"
    if template == "roberta":
        backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
        names |= {"cls_token": "<s>", "sep_token": "</s>", "bos_token": "<s>"}
    elif template == "xlnet":
        side = "left"
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s> <cls>", pair="$A </s> $B:1 </s>:1 <cls>:2", special_tokens=[("</s>", 1), ("<cls>", 3)]
        )
        names |= {"cls_token": "<cls>", "sep_token": "</s>"}
    elif template == "bos":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 0)]
        )
        names |= {"bos_token": "<s>"}
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if template == "xlnet" else [])
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=side, model_input_names=inputs, **names)


def without_blanks(context: str, offsets: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets without blanks at either end; a token of blanks alone has none, and stands where the next one begins."""
    bare: list[tuple[int, int]] = []
    for start, end in offsets:
        while start < end and context[start].isspace():
            start += 1
        while start < end and context[end - 1].isspace():
            end -= 1
        bare.append((start, end))
    for token in range(len(bare) - 2, -1, -1):
        if bare[token][0] == bare[token][1] > bare[token + 1][0]:
            bare[token] = (bare[token + 1][0],) * 2
    return bare


def save_tokenizer(folder: Path, tokenizer: Any = None) -> str:
    """The name under which a configuration finds the tokenizer."""
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


def prepared(config: RunConfig, split: Split, **options: Any) -> FeatureStore:
    """The store of a split, made with the tokenizer of the configuration's own model."""
    return prepare_store(config, split, tokenizer=load_tokenizer(config.model), **options)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored_feature(store: FeatureStore, index: int) -> Feature:
    """A feature put together from the columns of a store."""
    places = store.feature_map()
    ids, types = store.flat([index])
    return Feature(
        example_index=int(store.example_index[index]),
        window=int(store.window[index]),
        input_ids=ids,
        token_type_ids=types,
        context_start=int(store.context_start[index]),
        context_offsets=places.context_offsets_T2[slice(*places.first_offset_N1[index : index + 2])],
        cls_token=int(store.cls_token[index]),
        start_token=int(store.start_token[index]),
        end_token=int(store.end_token[index]),
    )


def map_of(features: Iterable[Feature]) -> FeatureMap:
    """The map of features at hand, in their order."""
    rows = list(features)
    lengths = [len(feature.context_offsets) for feature in rows]
    no_offsets = np.zeros((0, 2), np.int32)
    return FeatureMap(
        example_index_N=np.array([feature.example_index for feature in rows], np.int32),
        window_N=np.array([feature.window for feature in rows], np.int32),
        context_start_N=np.array([feature.context_start for feature in rows], np.int32),
        context_offsets_T2=np.concatenate([no_offsets, *(feature.context_offsets for feature in rows)]),
        first_offset_N1=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
    )


def run_config(tokenizer_folder: str | Path, store_dir: str | Path, **data: Any) -> RunConfig:
    """A configuration with short windows, on the hand-written data set unless told otherwise."""
    options: dict[str, Any] = {"max_seq_length": 96, "doc_stride": 24, "store_dir": str(store_dir), **data}
    if "dataset_name" not in options:
        options.setdefault("train_file", str(TINY_SQUAD))
    return RunConfig(data=DataConfig(**options), model=ModelConfig(model_name_or_path=str(tokenizer_folder)))
