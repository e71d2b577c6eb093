"""The description of an exported model, damaged or edited: one sentence when it is opened, and not at a question."""

import json
from pathlib import Path
from typing import Any

import pytest

from qa_dist.answering.exported import Exported
from qa_dist.common.errors import CheckpointError
from qa_dist.features.tokenizer import TokenizerSpec
from tests.tiny import tiny_tokenizer
from tests.unit.trained import edit_json

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    spec = TokenizerSpec.of(tiny_tokenizer())
    Exported(spec, INPUTS, 0, 160, {"max_seq_length": 64}, {"made_with": "a test"}).write(tmp_path)
    return tmp_path


def test_what_was_written_is_read(folder: Path) -> None:
    assert Exported.read(folder).inputs == INPUTS


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"options": 3}, "no `options` that"),
        ({"provenance": []}, "no `provenance` that"),
        ({"longest_feature": "x"}, "no `longest_feature` that"),
        ({"pad_token_id": None}, "no `pad_token_id` that"),
        ({"inputs": ["input_ids"]}, "no `inputs` that"),
        ({"inputs": [["input_ids"], "attention_mask"]}, "no `inputs` that"),
        ({"inputs": 3}, "is not as it was written"),
        ({"tokenizer": 3}, "is not as it was written"),
        ({"tokenizer": {"backend": "{}"}}, "no `tokenizer` that"),
        ({"tokenizer": {"backend": 3}}, "no `tokenizer` that"),
        ({"tokenizer": {"padding_side": "top"}}, "no `tokenizer` that"),
        ({"tokenizer": {"cls_token_id": "1"}}, "no `tokenizer` that"),
        ({"tokenizer": {"has_token_types": "yes"}}, "no `tokenizer` that"),
        ({"options": ...}, "lacks options"),
        ({"format_version": 9}, "has format 9"),
    ],
)
def test_what_was_edited_is_one_sentence(folder: Path, changes: dict[str, Any], part: str) -> None:
    path = folder / "reader.json"
    if isinstance(tokenizer := changes.get("tokenizer"), dict):
        changes = {"tokenizer": json.loads(path.read_text(encoding="utf-8"))["tokenizer"] | tokenizer}
    edit_json(path, **changes)
    with pytest.raises(CheckpointError) as caught:
        Exported.read(folder)
    assert str(caught.value).startswith(f"{path} ")
    assert part in str(caught.value)
    assert str(caught.value).endswith("; export the model again")


def test_inputs_that_the_graph_has_not_are_told_of_when_it_is_opened(folder: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    from qa_dist.answering.onnx_backend import OnnxBackend

    shape = ("B", "L")
    tensors = onnx.TensorProto
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Cast", [source], [name], to=tensors.FLOAT)
            for source, name in zip(INPUTS, ("start_logits", "end_logits"), strict=False)
        ],
        "model",
        [onnx.helper.make_tensor_value_info(name, tensors.INT64, shape) for name in INPUTS],
        [onnx.helper.make_tensor_value_info(name, tensors.FLOAT, shape) for name in ("start_logits", "end_logits")],
    )
    (folder / "onnx").mkdir()
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    onnx.save(model, folder / "onnx" / "model.onnx")
    OnnxBackend(folder)
    edit_json(folder / "reader.json", inputs=["input_ids", "attention_mask"])
    with pytest.raises(CheckpointError, match="onnx reads input_ids, attention_mask, token_type_ids, and a reader"):
        OnnxBackend(folder)
