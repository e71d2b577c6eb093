"""Models, adapters, data and stores of strangers are data: nothing in them is run, and no secret is written anywhere.

Pickles planted here leave a mark when something unpickles them, and so does Python code when something imports it.
"""

import hashlib
import json
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qa_dist
from qa_dist import evaluate, prepare, train
from qa_dist.common import command
from qa_dist.common.errors import CheckpointError, UserError
from qa_dist.config.options import ModelConfig
from qa_dist.distributed.failures import failures_named
from qa_dist.model.building import build_model
from qa_dist.model.pretrained import model_configuration
from qa_dist.training.checkpoints import (
    BEST,
    REQUIRED,
    Checkpoint,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from qa_dist.training.run_state import BestScore, RunState
from tests.refusals import contents, refusal
from tests.tiny import tiny_model
from tests.unit.data_fixtures import prepared, row, run_config, save_tokenizer, write_rows
from tests.unit.trained import edit_json, options_of, reset_accelerate, words

Capture = pytest.CaptureFixture[str]
PACKAGE = Path(qa_dist.__file__).parent
TENSORS = {"bias": torch.ones(3)}
STATE = RunState(best=BestScore(0.5, 5), world_size=1, max_tokens_per_device=64)
CHECKPOINT = Checkpoint(step=5, weights=TENSORS, optimizer={}, best=TENSORS, identity={}, state=STATE)
TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"


class Trap:
    """What leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plants traps as files; after the test, none may have gone off and nothing may have been asked for."""
    mark, opened, questions = tmp_path / "mark", [], []

    def plant(*paths: Path, format: str = "pickle") -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            if format == "torch":
                torch.save({"weight": Trap(mark)}, path)
            else:
                path.write_bytes(pickle.dumps(Trap(mark)))

    load = torch.load

    def recorded(file: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(file)
        return load(file, *arguments, **options)

    def asked(prompt: str = "") -> str:
        questions.append(prompt)
        return "no"

    monkeypatch.setattr(torch, "load", recorded)
    monkeypatch.setattr("builtins.input", asked)
    yield plant
    assert not mark.exists(), "a planted pickle was read"
    assert opened == [], "torch.load was called, which reads pickles"
    assert questions == [], "a library asked the user whether to run code"


def test_a_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "mark")))
    assert (tmp_path / "mark").is_dir()
    torch.save({"weight": Trap(tmp_path / "other")}, tmp_path / "file.bin")
    torch.load(tmp_path / "file.bin", weights_only=False)
    assert (tmp_path / "other").is_dir()


# ------------------------------------------------------------------------------------------------------------ models


def trained_on(model: Path, trained: Path, out: Path) -> list[str]:
    return words({**options_of(trained), "model_name_or_path": str(model), "output_dir": str(out)})


@pytest.mark.parametrize("format", ["pickle", "torch"])
def test_a_model_in_a_pickle_is_refused(copy: Path, trained: Path, trap: Any, format: str, capsys: Capture) -> None:
    model = copy / "model"
    (model / "model.safetensors").unlink()
    trap(model / "pytorch_model.bin", format=format)
    message = refusal(train.main, trained_on(model, trained, copy / "out"), capsys)
    assert "has its weights only in pytorch_model.bin, a pickle" in message
    assert "convert it once with: python -c" in message


def test_an_index_that_names_a_pickle_is_refused(copy: Path, trained: Path, trap: Any, capsys: Capture) -> None:
    model = copy / "model"
    weights = (model / "model.safetensors").rename(copy / "elsewhere.safetensors")
    trap(model / "part.bin", format="torch")
    for name in ("part.bin", "../elsewhere.safetensors", str(weights)):
        index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": name}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        message = refusal(train.main, trained_on(model, trained, copy / "out"), capsys)
        assert "safetensors files in its own folder only" in message
        reset_accelerate()
    trap(model / "pytorch_model-00001-of-00001.bin", format="torch")
    (model / "model.safetensors.index.json").rename(model / "pytorch_model.bin.index.json")
    assert "holds no weights" in refusal(train.main, trained_on(model, trained, copy / "out"), capsys)


def test_a_configuration_that_names_a_pickle_is_refused(copy: Path, trained: Path, trap: Any, capsys: Capture) -> None:
    trap(copy / "model" / "adapter_model.bin", format="torch")
    edit_json(copy / "model" / "config.json", transformers_weights="adapter_model.bin")
    message = refusal(train.main, trained_on(copy / "model", trained, copy / "out"), capsys)
    assert "names a file of weights (transformers_weights)" in message


def test_an_adapter_in_the_folder_of_a_model_is_refused(copy: Path, trained: Path, trap: Any, capsys: Capture) -> None:
    trap(copy / "model" / "adapter_model.bin", format="torch")
    (copy / "adapter" / "adapter_config.json").rename(copy / "model" / "adapter_config.json")
    message = refusal(train.main, trained_on(copy / "model", trained, copy / "out"), capsys)
    assert "holds an adapter (adapter_config.json), and a whole model is needed" in message


def test_pickles_beside_the_weights_are_not_looked_at(copy: Path, trained: Path, trap: Any) -> None:
    model = copy / "model"
    names = "pytorch_model.bin training_args.bin optimizer.pt scheduler.pt rng_state.pth vocab.pkl .metadata"
    trap(*(model / name for name in names.split()))
    assert train.main(trained_on(model, trained, copy / "out")) == 0
    name = "adapter_model.safetensors"
    reset_accelerate()
    assert train.main(trained_on(trained / "model", trained, copy / "other")) == 0
    assert (copy / "out" / name).read_bytes() == (copy / "other" / name).read_bytes()


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_the_conversion_that_a_refusal_names_works(kind: str, copy: Path, trained: Path, capsys: Capture) -> None:
    from safetensors.torch import load_file

    name = {"model": "model.safetensors", "adapter": "adapter_model.safetensors"}[kind]
    before = load_file(copy / kind / name)
    pickled = copy / kind / {"model": "pytorch_model.bin", "adapter": "adapter_model.bin"}[kind]
    torch.save(before, pickled)
    (copy / kind / name).unlink()
    if kind == "model":
        message = refusal(train.main, trained_on(copy / "model", trained, copy / "out"), capsys)
    else:
        message = refusal(evaluate.main, evaluated(copy, trained), capsys)
    code = re.search(r'python -c "(.*)"', message)
    assert code is not None
    exec(code[1], {})
    after = load_file(copy / kind / name)
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    reset_accelerate()
    assert evaluate.main(evaluated(copy, trained)) == 0


# ---------------------------------------------------------------------------------------------------------- adapters


def evaluated(copy: Path, trained: Path) -> list[str]:
    return ["--adapter", str(copy / "adapter"), "--store_dir", str(trained / "stores")]


@pytest.mark.parametrize("format", ["pickle", "torch"])
def test_an_adapter_in_a_pickle_is_refused(copy: Path, trained: Path, trap: Any, format: str, capsys: Capture) -> None:
    (copy / "adapter" / "adapter_model.safetensors").unlink()
    trap(copy / "adapter" / "adapter_model.bin", format=format)
    message = refusal(evaluate.main, evaluated(copy, trained), capsys)
    assert "has its weights only in adapter_model.bin, a pickle" in message
    # Without the options of our own run, as peft leaves an adapter.
    (copy / "adapter" / "config.yaml").unlink()
    assert "a pickle" in refusal(evaluate.main, evaluated(copy, trained), capsys)


def test_pickles_beside_an_adapter_are_not_looked_at(copy: Path, trained: Path, trap: Any, capsys: Capture) -> None:
    assert evaluate.main(evaluated(copy, trained)) == 0
    expected = capsys.readouterr().out
    names = "adapter_model.bin pytorch_model.bin training_args.bin optimizer.pt rng_state.pth best/adapter_model.bin"
    trap(*(copy / "adapter" / name for name in names.split()), format="torch")
    trap(copy / "results" / "logits.npy", copy / "adapter" / "logits.npy")
    reset_accelerate()
    argv = [*evaluated(copy, trained), "--results_dir", str(copy / "results"), "--gather", "logits"]
    assert evaluate.main(argv) == 0
    assert capsys.readouterr().out == expected


# --------------------------------------------------------------------------------------- stores, data and checkpoints


def test_pickles_in_a_store_are_not_looked_at(trap: Any, tmp_path: Path) -> None:
    from qa_dist.common.errors import StoreError
    from qa_dist.features.store import FeatureStore

    config = run_config(save_tokenizer(tmp_path / "tokenizer"), tmp_path / "stores")
    path = prepared(config, "train").path
    trap(path / "examples.pkl", path / "state.pt", path / ".metadata")
    assert prepared(config, "train").num_examples
    for name in ("examples.arrow", "features.arrow", "manifest.json"):
        whole = (path / name).read_bytes()
        trap(path / name)
        with pytest.raises(StoreError, match="is damaged"):
            FeatureStore(path, verify=False)
        (path / name).write_bytes(whole)


@pytest.mark.parametrize("format", ["pickle", "torch"])
@pytest.mark.parametrize("name", sorted((*REQUIRED, BEST)))
def test_a_pickle_in_a_checkpoint_is_refused(trap: Any, tmp_path: Path, name: str, format: str) -> None:
    path = write_checkpoint(CHECKPOINT, tmp_path)
    trap(path / name, format=format)
    data = (path / name).read_bytes()
    with pytest.raises(CheckpointError, match="it is damaged"):
        read_checkpoint(path)
    # And where whoever planted it has put the manifest right.
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_json(path / "manifest.json", **manifest)
    with pytest.raises(CheckpointError, match=r"is not (a safetensors file|JSON); it is damaged"):
        read_checkpoint(path)


def test_pickles_beside_the_files_of_a_checkpoint_are_not_looked_at(trap: Any, tmp_path: Path) -> None:
    path = write_checkpoint(CHECKPOINT, tmp_path)
    names = "optimizer.pt optimizer.bin scheduler.pt random_states_0.pkl pytorch_model.bin trained.pt .metadata"
    trap(*(path / name for name in names.split()), tmp_path / "latest.pkl")
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    assert torch.equal(found.weights["bias"], CHECKPOINT.weights["bias"])


def test_an_extension_type_in_parquet_is_not_unpickled(trap: Any, tmp_path: Path, capsys: Capture) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    payload = pickle.dumps(Trap(tmp_path / "mark"))
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}
    columns = {"context": "c c c", "question": "q", "answers": "[]"}
    fields = [pa.field("id", pa.string(), metadata=metadata), *(pa.field(name, pa.string()) for name in columns)]
    table = pa.table([["a"], *([value] for value in columns.values())], schema=pa.schema(fields))
    parquet.write_table(table, tmp_path / "a.parquet")
    argv = ["--train_file", str(tmp_path / "a.parquet"), "--store_dir", str(tmp_path / "stores")]
    code = prepare.main([*argv, "--model_name_or_path", save_tokenizer(tmp_path / "tokenizer")])
    assert code in (0, 2), "as data or as a sentence"


def test_code_in_the_folder_of_a_data_set_is_not_run(trap: Any, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "questions"
    folder.mkdir()
    (folder / "questions.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n", encoding="utf-8")
    flags = ["--model_name_or_path", save_tokenizer(tmp_path / "tokenizer"), "--store_dir", str(tmp_path / "stores")]
    argv = ["--dataset_name", str(folder), *flags]
    assert "cannot be loaded" in refusal(prepare.main, argv, capsys)
    # Nor are pickles, alone or beside data.
    (folder / "questions.py").unlink()
    trap(folder / "train.pkl", folder / "validation.pickle", folder / "train.pt")
    assert "cannot be loaded" in refusal(prepare.main, argv, capsys)
    # A file of questions is read by its name, and what lies beside it is not looked at.
    write_rows(folder / "train.jsonl", row("a"))
    assert prepare.main(argv) == 0


CALLS = (
    "__import__('os').mkdir({})",
    "array(__import__('os').mkdir({}))",
    "np.int64(open({}, 'w'))",
    "f'{{open({})}}'",
)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("answers", ["{call}", "[{call}]", "{{'text': [{call}], 'answer_start': [0]}}"])
def test_a_cell_of_text_is_parsed_and_not_executed(call: str, answers: str, tmp_path: Path, capsys: Capture) -> None:
    mark = tmp_path / "mark"
    cell = answers.format(call=call.format(repr(str(mark))))
    write_rows(tmp_path / "a.jsonl", row("a", answers=cell), row("b"))
    argv = ["--train_file", str(tmp_path / "a.jsonl"), "--store_dir", str(tmp_path / "stores")]
    message = refusal(prepare.main, [*argv, "--model_name_or_path", save_tokenizer(tmp_path / "tokenizer")], capsys)
    assert "(a)" in message
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pandas", "csv", "json", "text"])
def test_names_of_builders_do_not_read_the_current_folder(
    name: str, trap: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "here").mkdir()
    trap(tmp_path / "here" / "train.pkl")
    write_rows(tmp_path / "here" / "train.json", row("a"))
    monkeypatch.chdir(tmp_path / "here")
    flags = ["--model_name_or_path", save_tokenizer(tmp_path / "tokenizer"), "--store_dir", str(tmp_path / "stores")]
    assert "is the name of a file format" in refusal(prepare.main, ["--dataset_name", name, *flags], capsys)
    # A folder of that name is a folder.
    (tmp_path / "here" / name).mkdir()
    write_rows(tmp_path / "here" / name / "train.jsonl", row("b"))
    assert prepare.main(["--dataset_name", name, *flags]) == 0


# ------------------------------------------------------------------------------------------------ code with a model


def plant_code(model: Path, mark: Path) -> None:
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: ...\n", encoding="utf-8")
    names = ("AutoConfig", "AutoModel", "AutoModelForQuestionAnswering")
    edit_json(model / "config.json", auto_map=dict.fromkeys(names, "evil.Evil"))
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})


def test_code_of_a_known_architecture_is_not_run(copy: Path, trained: Path, trap: Any) -> None:
    plant_code(copy / "model", copy / "mark")
    assert train.main(trained_on(copy / "model", trained, copy / "out")) == 0


def test_code_of_an_unknown_architecture_is_refused(copy: Path, trained: Path, trap: Any, capsys: Capture) -> None:
    plant_code(copy / "model", copy / "mark")
    edit_json(copy / "model" / "config.json", model_type="evil")
    options = {**options_of(trained), "model_name_or_path": str(copy / "model"), "output_dir": str(copy / "out")}
    message = refusal(train.main, words({**options, "tokenizer_name": str(trained / "model")}), capsys)
    assert "brings code of its own, which is never run here" in message
    options |= {"model_name_or_path": str(trained / "model"), "model_config": str(copy / "model")}
    reset_accelerate()
    assert "brings code of its own" in refusal(train.main, words(options), capsys)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("padding", ["unpadded", "sorted"])
def test_a_kernel_that_a_configuration_names_is_not_fetched(key: str, padding: Any, tmp_path: Path) -> None:
    model = tiny_model("bert", tmp_path)
    edit_json(model / "config.json", **{key: "stranger/kernel"})
    config = ModelConfig(model_name_or_path=str(model), padding=padding)
    assert "stranger" not in str(model_configuration(config)._attn_implementation)
    built, _ = build_model(config, seed=1, max_seq_length=64)
    assert "stranger" not in str(built.model.config._attn_implementation)


# ----------------------------------------------------------------------------------------------------------- secrets


def test_tokens_are_in_nothing_that_a_run_writes_or_says(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard", reason="the tracking extra is not installed")
    other = "a-token-of-another-form"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", other)
    # Whoever calls `main` from a program of their own has another command line, with anything in it.
    monkeypatch.setattr(sys, "argv", ["program", "--token", TOKEN, f"--key={other}", "https://me:secret-word@host/x"])
    reset_accelerate()
    options = {**options_of(trained), "output_dir": str(tmp_path / "out"), "report_to": "tensorboard"}
    assert train.main(words(options)) == 0
    written = contents(tmp_path / "out")
    assert any("tfevents" in name for name in written)
    said = capfd.readouterr()
    for secret in (TOKEN, other, "secret-word"):
        assert not [name for name, content in written.items() if secret.encode() in content]
        assert secret not in said.out + said.err + caplog.text
    record = json.loads(written["run.json"])
    assert record["command"] == ["program", "--token", "***", "--key=***", "https://***@host/x"]


def test_a_traceback_that_quotes_a_token_is_masked(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def work() -> int:
        raise OSError(f"403 for https://me:secret-word@hub/x ({TOKEN})")

    def failing_rank() -> int:
        with failures_named():
            return work()

    def end(code: int) -> None:
        raise SystemExit(code)

    assert command.run_command("program", work) == 1
    one = capsys.readouterr().err
    of_a_launcher = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {"WORLD_SIZE": "2", **of_a_launcher}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit):
        command.run_command("program", failing_rank)
    for said in (one, capsys.readouterr().err):
        assert "OSError: 403 for https://***@hub/x (***)" in said
        assert "Traceback" in said
        assert TOKEN not in said
        assert "secret-word" not in said


def test_an_error_of_a_library_that_quotes_a_token_is_masked(capsys: Capture) -> None:
    def work() -> int:
        raise UserError(f"cannot reach https://me:{TOKEN}@hub/x?token=abc ({TOKEN})")

    assert command.run_command("program", work) == 2
    assert capsys.readouterr().err == "program: error: cannot reach https://***@hub/x?*** (***)\n"
