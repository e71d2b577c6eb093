"""Lengths that a command line gives, beside those of the run that made the model."""

import json
from pathlib import Path
from typing import Any

import pytest

from qa_dist.answering.exported import INPUTS, Exported
from qa_dist.answering.options import ReaderConfig, read_options
from qa_dist.common.errors import ConfigError
from qa_dist.features.tokenizer import TokenizerSpec
from tests.tiny import tiny_model, tiny_tokenizer


def read(*words: str) -> Any:
    return read_options(words, prog="test", description="", entry=ReaderConfig)


def test_lengths_go_together_with_those_of_an_export(tmp_path: Path) -> None:
    spec = TokenizerSpec.of(tiny_tokenizer())
    Exported(spec, INPUTS, 0, 160, {"max_seq_length": 128, "doc_stride": 32}, {}).write(tmp_path)
    options = read(str(tmp_path), "--max_seq_length", "100")
    assert (options.max_seq_length, options.doc_stride) == (100, 32)
    with pytest.raises(ConfigError, match="--doc_stride 32 leaves no room in --max_seq_length 30"):
        read(str(tmp_path), "--max_seq_length", "30")
    (tmp_path / "reader.json").write_text(json.dumps({}), encoding="utf-8")
    # Nobody looks at the model before one of its lengths is given.
    assert read(str(tmp_path)).doc_stride is None


def test_a_model_without_a_run_has_the_stride_that_it_is_read_with(tmp_path: Path) -> None:
    options = read(str(tiny_model("bert", tmp_path)), "--max_seq_length", "100")
    assert (options.max_seq_length, options.doc_stride) == (100, 50)
    assert read(str(tmp_path), "--max_seq_length", "300").doc_stride == 128
    with pytest.raises(ConfigError, match="--max_seq_length many is not an integer"):
        read(str(tmp_path), "--max_seq_length", "many")
