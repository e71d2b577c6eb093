"""Spoilt models and adapters: each is refused in one sentence, and no results of an earlier run are lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qa_dist import estimate, evaluate, train
from tests.refusals import contents, finished_run, refusal
from tests.tiny import tiny_model
from tests.unit.data_fixtures import MALFORMED
from tests.unit.trained import edit_json, options_of, reset_accelerate, words

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "finished")


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def edit_tensors(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def small_vocabulary(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=40)
    name = "embeddings.word_embeddings.weight"
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({name: tensors[name][:40].clone()}))


def without_layer(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".layer.1." in name]:
        del tensors[name]


def graph(folder: Path) -> Path:
    """Where the graph of an exported model lies."""
    folder.mkdir()
    return folder / "model.onnx"


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda m: [path.unlink() for path in m.glob("tokenizer*")], "knows special tokens only"),
    "tokenizer cut short": (lambda m: cut(m / "tokenizer.json"), "the tokenizer in"),
    "tokenizer of another shape": (lambda m: (m / "tokenizer.json").write_text("[]"), "the tokenizer in"),
    "tokenizer in Latin-1": (lambda m: (m / "tokenizer.json").write_bytes(b'{"\xe9": 1}'), "the tokenizer in"),
    "tokenizer settings are a list": (lambda m: (m / "tokenizer_config.json").write_text("[]"), "the tokenizer in"),
    "no configuration": (lambda m: (m / "config.json").unlink(), "the configuration of the model in"),
    "configuration cut short": (lambda m: cut(m / "config.json"), "is not a valid JSON file"),
    "configuration is a list": (lambda m: (m / "config.json").write_text("[]"), "cannot be loaded ("),
    "configuration without a type": (lambda m: edit_json(m / "config.json", model_type=...), "the configuration of"),
    "unknown architecture": (lambda m: edit_json(m / "config.json", model_type="brain"), "the configuration of"),
    "architecture without answers": (lambda m: edit_json(m / "config.json", model_type="vit"), "cannot be loaded"),
    "width is text": (lambda m: edit_json(m / "config.json", hidden_size="wide"), "cannot be loaded"),
    "width is null": (lambda m: edit_json(m / "config.json", hidden_size=None), "cannot be loaded"),
    "heads that do not divide": (lambda m: edit_json(m / "config.json", num_attention_heads=5), "cannot be loaded"),
    "another width": (lambda m: edit_json(m / "config.json", hidden_size=64), "cannot be loaded"),
    "another depth": (lambda m: edit_json(m / "config.json", num_hidden_layers=3), "would not be trained"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "holds no weights (model.safetensors)"),
    "exported": (lambda m: (m / "model.safetensors").replace(graph(m / "onnx")), "is an exported model"),
    "weights cut short": (lambda m: cut(m / "model.safetensors"), "cannot be loaded"),
    "empty weights": (lambda m: (m / "model.safetensors").write_bytes(b""), "cannot be loaded"),
    "endless header": (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 64), "cannot be loaded"),
    "weights of another program": (lambda m: (m / "model.safetensors").write_text("hello"), "cannot be loaded"),
    "half the weights": (lambda m: edit_tensors(m / "model.safetensors", without_layer), "would not be trained"),
    "too few embeddings": (small_vocabulary, "but the model has 40 embeddings"),
}
"""How a model folder is spoilt, and part of what training says about it."""


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_is_refused(case: str, copy: Path, trained: Path, finished: Path, capsys: Capture) -> None:
    before = contents(finished)
    spoil, part = BAD_MODELS[case]
    spoil(copy / "model")
    options = {**options_of(trained), "model_name_or_path": str(copy / "model"), "output_dir": str(finished)}
    assert part in refusal(train.main, [*words(options), "--overwrite_output_dir"], capsys)
    assert contents(finished) == before


XMOD = {"model_type": "xmod", "languages": ["en_XX", "de_DE"]}


@pytest.mark.parametrize(
    ("changes", "precision", "said"),
    [
        ({"model_type": "t5", "classifier_dropout": 0.0}, "no", "t5 models are not trained here"),
        (XMOD, "no", "has nothing as default_language"),
        (
            {**XMOD, "default_language": "en_XX"},
            "bf16",
            "--mixed_precision bf16 does not work for a model of type xmod",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_features_are_made(
    changes: dict[str, Any],
    precision: str,
    said: str,
    copy: Path,
    trained: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What a process takes is measured meanwhile in another one, and not asked for where the model is refused.
    monkeypatch.setattr("qa_dist.memory.estimate.process_bytes", lambda modules: 2**20)
    edit_json(copy / "model" / "config.json", **changes)
    folders = {"store_dir": str(tmp_path / "stores"), "output_dir": str(tmp_path / "out")}
    changed = {"model_name_or_path": str(copy / "model"), "mixed_precision": precision}
    assert said in refusal(train.main, words({**options_of(trained), **folders, **changed}), capsys)
    assert not (tmp_path / "stores").exists()
    lengths = {"max_seq_length": "64", "doc_stride": "16"}
    assert said in refusal(estimate.main, words({**changed, **lengths, "strategy": "ddp", "device": "cpu"}), capsys)
    if precision == "no":
        asked = {"adapter": str(copy / "adapter"), "model_name_or_path": changed["model_name_or_path"]}
        assert said in refusal(evaluate.main, words({**asked, "store_dir": folders["store_dir"]}), capsys)
        assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize("name", ["several.json", "truncated.json.gz", "none.json"])
def test_bad_data_costs_no_results(name: str, trained: Path, finished: Path, capsys: Capture) -> None:
    before = contents(finished)
    reset_accelerate()
    options = {**options_of(trained), "train_file": str(MALFORMED / name), "output_dir": str(finished)}
    refusal(train.main, [*words(options), "--overwrite_output_dir"], capsys)
    assert contents(finished) == before


def other_base(adapter: Path) -> None:
    tiny_model("distilbert", adapter / "base")
    text = (adapter / "config.yaml").read_text(encoding="utf-8").splitlines()
    text = [f"model_name_or_path: {adapter / 'base'}" if "model_name_or_path" in line else line for line in text]
    (adapter / "config.yaml").write_text("\n".join(text), encoding="utf-8")


def add_line(path: Path, line: str) -> None:
    path.write_text(f"{path.read_text(encoding='utf-8')}{line}\n", encoding="utf-8")


def foreign(adapter: Path, **changes: Any) -> None:
    """Make the folder one that peft alone has written, with changes to its configuration."""
    (adapter / "config.yaml").unlink()
    edit_json(adapter / "adapter_config.json", **changes)


def only(part: str) -> Callable[[dict[str, Any]], None]:
    def keep(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if part not in name]:
            del tensors[name]

    return keep


BAD_ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "settings cut short": (lambda a: cut(a / "adapter_config.json"), "adapter_config.json is not JSON"),
    "settings are a list": (
        lambda a: (a / "adapter_config.json").write_text("[]"),
        "holds a list instead of an object",
    ),
    "settings in UTF-16": (
        lambda a: (a / "adapter_config.json").write_bytes('{"r": 8}'.encode("utf-16")),
        "is not UTF-8 (byte 0)",
    ),
    "settings twice": (
        lambda a: (a / "adapter_config.json").write_text('{"peft_type": "LORA", "peft_type": "IA3"}'),
        "more than once",
    ),
    "no type": (lambda a: edit_json(a / "adapter_config.json", peft_type=...), "an adapter of type None"),
    "another type": (lambda a: edit_json(a / "adapter_config.json", peft_type="IA3"), "an adapter of type IA3"),
    "rank is text": (lambda a: edit_json(a / "adapter_config.json", r="eight"), "cannot be loaded"),
    "another rank": (lambda a: edit_json(a / "adapter_config.json", r=4), "cannot be loaded"),
    "rank zero": (lambda a: edit_json(a / "adapter_config.json", r=0), "cannot be loaded"),
    "no such layers": (lambda a: edit_json(a / "adapter_config.json", target_modules=["nothing"]), "cannot be loaded"),
    "fewer layers": (lambda a: edit_json(a / "adapter_config.json", target_modules=["query"]), "has no place"),
    "more layers": (lambda a: edit_json(a / "adapter_config.json", target_modules=["query", "key", "value"]), "lacks"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "holds no weights (adapter_model"),
    "weights cut short": (lambda a: cut(a / "adapter_model.safetensors"), "cannot be loaded"),
    "empty weights": (lambda a: (a / "adapter_model.safetensors").write_bytes(b""), "cannot be loaded"),
    "no tensors": (
        lambda a: edit_tensors(a / "adapter_model.safetensors", dict.clear),
        "qa_outputs.weight' is missing",
    ),
    "head alone": (lambda a: edit_tensors(a / "adapter_model.safetensors", only("qa_outputs")), "would be random"),
    "adapters alone": (
        lambda a: edit_tensors(a / "adapter_model.safetensors", only("lora")),
        "qa_outputs.weight' is missing",
    ),
    "another base model": (other_base, "cannot be loaded"),
    "options cut short": (lambda a: (a / "config.yaml").write_text("seed: ["), "config.yaml cannot be used as YAML"),
    "options of another program": (lambda a: add_line(a / "config.yaml", "beam: 5"), "--beam is no option here"),
    "options of the entry": (
        lambda a: add_line(a / "config.yaml", f"results_dir: {a / 'chosen-by-a-stranger'}"),
        "--results_dir is no option here",
    ),
    "options with a tag": (
        lambda a: (a / "config.yaml").write_text("seed: !!python/object/apply:os.getpid []"),
        "is not allowed",
    ),
    "foreign without base": (
        lambda a: foreign(a, base_model_name_or_path=None),
        "names no base model",
    ),
    "foreign, base a number": (lambda a: foreign(a, base_model_name_or_path=5), "gives a number as the name"),
    "foreign, base gone": (lambda a: foreign(a, base_model_name_or_path="/no/such/base"), "/no/such/base does not"),
    "foreign with a module": (lambda a: foreign(a, megatron_config={"a": 1}), "asks for a Python module"),
}
"""How an adapter's folder is spoilt, and part of what evaluation says about it."""


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_a_bad_adapter_is_refused(case: str, copy: Path, trained: Path, finished: Path, capsys: Capture) -> None:
    # With it the folder itself would be refused.
    (finished / "run.json").unlink()
    before = contents(finished)
    spoil, part = BAD_ADAPTERS[case]
    spoil(copy / "adapter")
    options = {name: value for name, value in options_of(trained).items() if name in ("store_dir", "validation_file")}
    options |= {"max_seq_length": "64", "doc_stride": "16"}
    options |= {"adapter": str(copy / "adapter"), "results_dir": str(finished)}
    message = refusal(evaluate.main, words(options), capsys)
    assert part in message
    assert contents(finished) == before
    assert not (copy / "adapter" / "chosen-by-a-stranger").exists()


def test_what_was_spoilt_is_good_before(copy: Path, trained: Path, capsys: Capture) -> None:
    assert evaluate.main(["--adapter", str(copy / "adapter"), "--store_dir", str(trained / "stores")]) == 0
    mine = json.loads(capsys.readouterr().out)
    foreign(copy / "adapter")
    reset_accelerate()
    of_training = ("global_batch_size", "disable_tqdm", "train_file", "model_name_or_path")
    options = {key: value for key, value in options_of(trained).items() if key not in of_training}
    assert evaluate.main([*words(options), "--adapter", str(copy / "adapter")]) == 0
    assert json.loads(capsys.readouterr().out) == mine
