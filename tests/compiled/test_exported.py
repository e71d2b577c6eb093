"""An exported model gives the logits and answers of the model itself, or it is not written; it runs without torch."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qa_dist import export, predict
from qa_dist.answering import export as exporting
from qa_dist.answering.exported import DESCRIPTION, INPUTS
from qa_dist.answering.onnx_backend import OnnxBackend
from qa_dist.answering.reader import Reader
from qa_dist.common.errors import UserError
from qa_dist.config.options import DataConfig, ModelConfig
from qa_dist.data.sources import load_examples
from qa_dist.evaluation.scoring import score_v1
from qa_dist.features.table import FeatureTable
from qa_dist.features.windows import FeatureColumns
from qa_dist.model.saved import load_trained
from tests.tiny import tiny_squad
from tests.unit.data_fixtures import THOROUGH
from tests.unit.trained import edit_json, export_words, random_adapter, some_calibration

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason="the onnx extra is not installed")

ROOT = Path(__file__).parents[2]
FAMILIES = (
    *("bert", "deberta-v2", "modernbert", "roberta"),
    # ELECTRA is BERT behind another product, DistilBERT BERT without a segment of the input.
    *(pytest.param(model_type, marks=THOROUGH) for model_type in ("distilbert", "electra")),
)


def made(folder: Path, model_type: str, *more: str) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration of a random adapter in folder/adapter, and the report of its export into folder/exported."""
    # The exporter takes seconds for a layer. ModernBERT's are of two kinds.
    config = random_adapter(folder, model_type, num_layers=2 if model_type == "modernbert" else 1)
    tiny_squad(folder / "dev.json", 12, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        written: list[str] = []
        patch.setattr(export.sys.stdout, "write", written.append)
        assert export.main(export_words(folder, *more)) == 0
    return config, json.loads("".join(written))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bert")
    return folder, *made(folder, "bert", "--quantize", "int8")


@pytest.fixture(scope="module")
def items(bert: tuple[Path, ModelConfig, dict[str, Any]]) -> list[dict[str, str]]:
    """The questions of dev.json: some contexts have several windows."""
    examples, _, _ = load_examples(DataConfig(validation_file=str(bert[0] / "dev.json")), "validation")
    return [{"question": example.question, "context": example.context} for example in examples]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_graph_gives_the_logits_of_the_model(
    model_type: str, bert: tuple[Path, ModelConfig, dict[str, Any]], tmp_path: Path
) -> None:
    import onnxruntime

    folder, config, report = bert if model_type == "bert" else (tmp_path, *made(tmp_path, model_type))
    session = onnxruntime.InferenceSession(folder / "exported" / "onnx" / "model.onnx")
    names = [node.name for node in session.get_inputs()]
    assert names == report["inputs"] == list(INPUTS[: 3 if model_type in ("bert", "electra") else 2])
    axes = [tuple(node.shape) for node in (*session.get_inputs(), *session.get_outputs())]
    assert set(axes) == {("batch_size", "sequence_length")}
    assert [node.name for node in session.get_outputs()] == ["start_logits", "end_logits"]

    model = load_trained(config, str(folder / "adapter"), max_seq_length=64, tokenizer_pads_left=False)
    # Sizes that the exporter did not see, one of them 1.
    for lengths in ((33,), (5, 64, 17)):
        rows = [torch.arange(length).remainder(40) + 5 for length in lengths]
        with torch.no_grad():
            types = torch.cat([(row > 20).long() for row in rows])
            expected = torch.stack(model(torch.cat(rows), types, lengths)).numpy()
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.full_like(mask, model.model.config.pad_token_id)
        ids[mask.bool()] = torch.cat(rows)
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids > 20) * mask}
        outputs = session.run(None, {name: batch[name].numpy() for name in names})
        found = np.stack(outputs)[:, mask.bool().numpy()]
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_folder_is_laid_out_as_optimum_and_transformers_js_expect(
    bert: tuple[Path, ModelConfig, dict[str, Any]],
) -> None:
    folder, _, report = bert
    there = {path.relative_to(folder / "exported").as_posix() for path in (folder / "exported").rglob("*.*")}
    assert there == {
        *("config.json", "tokenizer.json", "tokenizer_config.json", "onnx/model.onnx", "onnx/model_quantized.onnx"),
        DESCRIPTION,
    }
    assert json.loads((folder / "exported" / "config.json").read_text())["architectures"] == [
        "BertForQuestionAnswering"
    ]
    described = json.loads((folder / "exported" / DESCRIPTION).read_text())
    assert described["provenance"]["model"] == "adapter"
    texts = [path.read_text(encoding="utf-8") for path in (folder / "exported").glob("*.json")]
    assert len(texts) == 4
    assert not [text for text in texts if str(folder.parent) in text], "no path of this machine is in what others get"
    assert described["provenance"]["compared"] == {"float32": report["float32"], "int8": report["int8"]}
    assert report["float32"]["num_questions"] == 12
    assert report["float32"]["num_different_answers"] == 0
    assert 0 < report["float32"]["largest_difference"] <= 1e-4 * report["float32"]["largest_logit"]
    assert report["bytes"]["onnx/model_quantized.onnx"] < report["bytes"]["onnx/model.onnx"]


def test_what_eight_bits_cost_is_said(
    bert: tuple[Path, ModelConfig, dict[str, Any]], items: list[dict[str, str]]
) -> None:
    folder, _, report = bert
    examples, _, _ = load_examples(DataConfig(validation_file=str(folder / "dev.json")), "validation")
    references = {example.id: [answer.text for answer in example.answers] for example in examples}
    texts = {}
    for name, quantized in (("float32", False), ("int8", True)):
        reader = Reader(folder / "exported", quantized=quantized, num_threads=1)
        assert isinstance(reader.backend, OnnxBackend)
        assert reader.backend.precision == name
        texts[name] = [answer.text for _, answer in reader.answer_many(items)]
        scores = score_v1(references, dict(zip(references, texts[name], strict=True)))
        assert report["int8"][name] == pytest.approx(scores)
    different = sum(a != b for a, b in zip(texts["float32"], texts["int8"], strict=True))
    assert report["int8"]["num_different_answers"] == different
    assert report["int8"]["f1_cost"] == report["int8"]["float32"]["f1"] - report["int8"]["int8"]["f1"]


def test_attention_in_eight_bits_is_one_operation(bert: tuple[Path, ModelConfig, dict[str, Any]]) -> None:
    import onnx

    operations = {
        name: [node.op_type for node in onnx.load(bert[0] / "exported" / "onnx" / f"{name}.onnx").graph.node]
        for name in ("model", "model_quantized")
    }
    for name, fused in (("model", 0), ("model_quantized", 1)):
        found = operations[name]
        assert (found.count("If"), found.count("Softmax")) == (fused, 1 - fused)


def test_attention_in_float32_is_one_operation_where_that_is_asked_for(
    bert: tuple[Path, ModelConfig, dict[str, Any]], items: list[dict[str, str]], tmp_path: Path
) -> None:
    import onnx

    shutil.copytree(bert[0] / "adapter", tmp_path / "adapter")
    shutil.copy(bert[0] / "dev.json", tmp_path)
    assert export.main(export_words(tmp_path, "--fuse_attention")) == 0
    assert "If" in {node.op_type for node in onnx.load(tmp_path / "exported" / "onnx" / "model.onnx").graph.node}
    readers = [Reader(folder / "exported", quantized=False) for folder in (tmp_path, bert[0])]
    fused, plain = ([answer.text for _, answer in reader.answer_many(items)] for reader in readers)
    assert fused == plain


def test_the_head_keeps_its_precision(bert: tuple[Path, ModelConfig, dict[str, Any]]) -> None:
    import onnx

    graph = onnx.load(bert[0] / "exported" / "onnx" / "model_quantized.onnx").graph
    # Enough are integers of 8 bits, and of matrices with the two columns of the head none is.
    kinds = {tuple(tensor.dims): tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2}
    assert kinds[(32, 64)] == kinds[(64, 32)] == onnx.TensorProto.INT8
    assert kinds[(32, 2)] == onnx.TensorProto.FLOAT


WITHOUT_TORCH = """
import json, sys

present = {"qa_dist", *sys.stdlib_module_names, *sys.argv[2:]}

class Only:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return self.finder.find_spec(name, path, target) if name.partition(".")[0] in present else None

sys.meta_path[:] = map(Only, sys.meta_path)
import qa_dist
try:
    qa_dist.Reader(sys.argv[1].replace("exported", "adapter"))
except qa_dist.UserError as error:
    print(error, file=sys.stderr)
reader = qa_dist.Reader(sys.argv[1], quantized=False, num_threads=1)
for _, answers in reader.answer_many(json.load(sys.stdin), top_k=3):
    print(json.dumps([answer.as_dict() for answer in answers]))
"""


def modules_of(packages: Iterable[str]) -> set[str]:
    """What can be imported where these packages are installed, and what they need."""
    found, waiting = set(), list(packages)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        needed = [Requirement(line) for line in metadata.requires(name) or ()]
        waiting += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    there = metadata.packages_distributions()
    return {module for module, names in there.items() if found & {canonicalize_name(name) for name in names}}


def test_a_reader_without_torch_gives_the_answers_of_the_model(
    bert: tuple[Path, ModelConfig, dict[str, Any]], items: list[dict[str, str]]
) -> None:
    page = (ROOT / "docs" / "exporting.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^pip install --no-deps \.\npip install (.*)$", page, re.MULTILINE)
    modules = modules_of(line.split())
    assert {"numpy", "onnxruntime", "tokenizers"} <= modules
    assert not {"torch", "transformers", "peft", "safetensors", "pyarrow", "datasets"} & modules
    command = [sys.executable, "-c", WITHOUT_TORCH, str(bert[0] / "exported"), *sorted(modules)]
    done = subprocess.run(command, input=json.dumps(items), capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "which is not exported, needs torch; install it with: pip install qa-dist" in done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    with_torch = Reader(bert[0] / "adapter", device="cpu", max_seq_length=64, doc_stride=16)
    expected = [answers for _, answers in with_torch.answer_many(items, top_k=3)]
    assert len(found) == len(expected) == 12
    assert sum(len(answers) for answers in found) > 12
    for mine, theirs in zip(found, expected, strict=True):
        assert isinstance(theirs, list)
        for answer, other in zip(mine, theirs, strict=True):
            scores = {name: answer.pop(name) for name in ("score", "probability")}
            wanted = other.as_dict()
            assert scores == pytest.approx({name: wanted.pop(name) for name in scores}, rel=1e-4)
            assert answer == wanted


def test_predict_runs_it_on_the_cpu_where_there_is_a_gpu(bert: tuple[Path, ModelConfig, dict[str, Any]]) -> None:
    options = predict.PredictConfig(model=str(bert[0] / "exported"), input_file="q", output_file="a")
    _, alone = predict._opened_reader(options, torch.device("cpu"))
    _, reader = predict._opened_reader(options, torch.device("cuda", 0))
    assert reader.backend.device == alone.backend.device == "cpu"
    assert reader.settings == alone.settings
    assert alone.notes == ()
    (note,) = reader.notes
    assert note.endswith(
        "exported is an exported model and runs on the CPU; to use the GPU, name the model that it was exported from"
    )


@pytest.mark.parametrize(
    ("environment", "given", "threads"),
    [({}, None, 0), ({"OMP_NUM_THREADS": "3"}, None, 3), ({"OMP_NUM_THREADS": "3"}, 2, 2)],
)
@pytest.mark.parametrize("more", ["", ",1", "x"])
def test_threads_are_as_many_as_the_launcher_says(
    environment: dict[str, str],
    given: int | None,
    threads: int,
    more: str,
    bert: tuple[Path, ModelConfig, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value + more)
    import onnxruntime

    session = onnxruntime.InferenceSession

    def opened(path: str, options: Any, **others: Any) -> Any:
        seen.append(options.intra_op_num_threads)
        return session(path, options, **others)

    monkeypatch.setattr("onnxruntime.InferenceSession", opened)
    OnnxBackend(bert[0] / "exported", num_threads=given)
    # What is no number asks for nothing.
    assert seen == [0 if more == "x" and given is None else threads]


class _Echo:
    """A session whose start logits are the token ids, and whose end logits are 1 where there is a token."""

    def __init__(self) -> None:
        self.given: list[dict[str, list[list[int]]]] = []

    def run(self, outputs: list[str], batch: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert outputs == ["start_logits", "end_logits"]
        self.given.append({name: values.tolist() for name, values in batch.items()})
        return [batch["input_ids"].astype(np.float32), batch["attention_mask"].astype(np.float32)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_are_padded_on_the_side_of_the_tokenizer(
    side: str, bert: tuple[Path, ModelConfig, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(bert[0] / "exported", tmp_path / "exported")
    tokenizer = {**json.loads((folder / DESCRIPTION).read_text())["tokenizer"], "padding_side": side}
    edit_json(folder / DESCRIPTION, tokenizer=tokenizer, pad_token_id=9)
    backend = OnnxBackend(folder, num_threads=1)
    session = _Echo()
    monkeypatch.setattr(backend._sessions, "one", lambda: session)
    numbers = np.arange(5, dtype=np.int32)
    two = dict.fromkeys(("example_index", "window", "context_start", "cls_token", "start_token"), numbers[:2])
    columns = FeatureColumns(
        **two,
        end_token=numbers[:2],
        lengths=np.array([3, 2], np.int32),
        context_lengths=np.array([1, 1], np.int32),
        input_ids=numbers,
        token_type_ids=np.ones(5, np.int8),
        context_offsets=np.ones((2, 2), np.int32),
    )
    start_BL, end_BL = backend.logits(FeatureTable.of(columns), np.array([0, 1]))
    places = [0, 1, 1] if side == "left" else [1, 1, 0]
    assert session.given == [
        {
            "input_ids": [[0, 1, 2], [9, 3, 4] if side == "left" else [3, 4, 9]],
            "attention_mask": [[1, 1, 1], places],
            "token_type_ids": [[1, 1, 1], places],
        }
    ]
    assert start_BL[0].tolist() == [0, 1, 2]
    assert start_BL[1, :2].tolist() == [3, 4]
    assert end_BL[1, :2].tolist() == [1, 1]


def test_a_graph_with_other_logits_is_not_kept(
    bert: tuple[Path, ModelConfig, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("adapter", "dev.json"):
        (tmp_path / name).symlink_to(bert[0] / name)
    graph = bert[0] / "exported" / "onnx" / "model_quantized.onnx"

    def write_another(model: Any, inputs: Any, pad_token_id: int, path: Path) -> None:
        path.parent.mkdir()
        shutil.copy(graph, path)

    monkeypatch.setattr(exporting, "write_graph", write_another)
    assert export.main(export_words(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "the logits of the exported model differ from the model's by" in said
    assert "nothing was written" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "dev.json"]


def test_a_model_that_may_answer_nothing_still_may(
    bert: tuple[Path, ModelConfig, dict[str, Any]],
    items: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def copy_graph(model: Any, inputs: Any, pad_token_id: int, path: Path) -> None:
        path.parent.mkdir()
        shutil.copy(bert[0] / "exported" / "onnx" / "model.onnx", path)

    monkeypatch.setattr(exporting, "write_graph", copy_graph)
    (tmp_path / "adapter").symlink_to(bert[0] / "adapter")
    tiny_squad(tmp_path / "dev.json", 16, seed=4, unanswerable=True)
    lengths = {"max_seq_length": 64, "doc_stride": 16}
    model = Reader(tmp_path / "adapter", device="cpu", allow_no_answer=True, **lengths)
    odds = [answer.no_answer_odds for _, answer in model.answer_many(items)]  # type: ignore[union-attr]
    # Such that both kinds of answers occur, and not the odds of any question.
    threshold = float(np.mean(np.sort(odds)[5:7]))
    # What was tuned for the model goes with it; the adapter of others stays as it is.
    (tmp_path / "tuned").mkdir()
    for path in (bert[0] / "adapter").iterdir():
        (tmp_path / "tuned" / path.name).symlink_to(path)
    (tmp_path / "adapter").unlink()
    (tmp_path / "tuned").rename(tmp_path / "adapter")
    some_calibration(temperature=2.0, threshold=threshold).write(tmp_path / "adapter")
    assert export.main(export_words(tmp_path, "--version_2_with_negative", "true")) == 0
    reader = Reader(tmp_path / "exported", num_threads=1)
    assert reader.allow_no_answer
    assert (reader.temperature, reader.settings["null_score_diff_threshold"]) == (2.0, threshold)
    assert Reader(tmp_path / "exported", null_score_diff_threshold=9).settings["null_score_diff_threshold"] == 9
    found = [answer for _, answer in reader.answer_many(items)]
    again = Reader(
        tmp_path / "adapter", device="cpu", allow_no_answer=True, null_score_diff_threshold=threshold, **lengths
    )
    expected = [answer for _, answer in again.answer_many(items)]
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    assert 1 < sum(answer.is_no_answer for answer in found) < len(items) - 1


@pytest.fixture
def spoilt(bert: tuple[Path, ModelConfig, dict[str, Any]], tmp_path: Path) -> Path:
    return shutil.copytree(bert[0] / "exported", tmp_path / "exported")


def test_a_folder_that_is_not_whole_is_a_sentence(spoilt: Path) -> None:
    (spoilt / "onnx" / "model_quantized.onnx").unlink()
    with pytest.raises(UserError, match=r"holds no int8 model, only float32; name one of these"):
        Reader(spoilt, quantized=True)
    graph = (spoilt / "onnx" / "model.onnx").read_bytes()
    (spoilt / "onnx" / "model.onnx").write_bytes(graph[: len(graph) // 2])
    with pytest.raises(UserError, match=r"model\.onnx cannot be loaded \(.*\); export the model again"):
        Reader(spoilt)
    (spoilt / "onnx" / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"holds no onnx/model\.onnx; export the model again"):
        Reader(spoilt)
    described = json.loads((spoilt / DESCRIPTION).read_text())
    for text, problem in (
        ("{", "is not JSON that can be used"),
        ("[]", "has format None but this program reads 1"),
        (json.dumps({**described, "format_version": 2}), "has format 2 but this program reads 1"),
        (
            json.dumps({"format_version": 1, "tokenizer": {}, "inputs": []}),
            "lacks longest_feature, options, pad_token_id",
        ),
        (json.dumps({**described, "tokenizer": {"backend": 7}}), "is not as it was written"),
        (json.dumps({**described, "inputs": ["pixels"]}), "has no `inputs` that a reader can use"),
    ):
        (spoilt / DESCRIPTION).write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=problem):
            Reader(spoilt)


def test_options_that_an_exported_model_cannot_honour_are_refused(
    bert: tuple[Path, ModelConfig, dict[str, Any]],
) -> None:
    exported = bert[0] / "exported"
    for options, problem in (
        ({"device": "cuda"}, "an exported model runs on the CPU"),
        ({"mixed_precision": "bf16"}, "an exported model has a precision of its own"),
        ({"max_seq_length": 384}, "max_seq_length 384 is more than the 160 positions of"),
    ):
        with pytest.raises(UserError, match=problem):
            Reader(exported, **options)
    with pytest.raises(UserError, match="quantized and num_threads can be set for an exported model only"):
        Reader(bert[0] / "adapter", quantized=True, num_threads=2)
    assert Reader(exported, num_threads=1).backend.precision == "int8"  # type: ignore[attr-defined]
    assert Reader(exported, max_seq_length=160, num_threads=1).settings["max_seq_length"] == 160
