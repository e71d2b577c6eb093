"""Models by their hub ids: what is downloaded of them, what comes from the cache, and that they are the same models."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from qa_dist import evaluate
from qa_dist.answering.exported import is_exported
from qa_dist.answering.opening import configuration_of
from qa_dist.answering.reader import Reader
from qa_dist.common.errors import UserError
from qa_dist.model.folder import model_sha256
from qa_dist.model.hub import local_copy
from tests.hub_server import TOKEN, Hub, hub
from tests.refusals import refusal
from tests.tiny import WORDS
from tests.unit.trained import edit_json, reset_accelerate, some_calibration

CONTEXT = " ".join(WORDS[:30])
QUESTION = "what follows amber ?"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process takes for the only one, and an empty cache."""
    with hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = "{endpoint}/{repo_id}/resolve/{revision}/{filename}".replace("{endpoint}", found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield found


def put(server: Hub, repo_id: str, folder: Path) -> None:
    """Publish all files of a folder."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    server.repositories[repo_id] = {"private": False, "commits": [files]}


def given_out(server: Hub) -> set[str]:
    """The files that somebody has asked for."""
    return {line.rpartition("/resolve/")[2].partition("/")[2] for line in server.requests if "/resolve/" in line}


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """An adapter with a temperature, and with files beside it that nobody needs."""
    folder = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    some_calibration(temperature=2.5).write(folder)
    (folder / "README.md").write_text("# x")
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    return folder


def test_an_adapter_answers_by_its_hub_id_and_then_without_the_hub(
    server: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(server, "me/x", adapter)
    expected = Reader(adapter, device="cpu").answer(QUESTION, CONTEXT, top_k=3)
    reader = Reader("me/x", device="cpu")
    assert reader.answer(QUESTION, CONTEXT, top_k=3) == expected
    assert (reader.model, reader.temperature, reader.settings["max_seq_length"]) == ("me/x", 2.5, 64)
    assert {"adapter_model.safetensors", "calibration.json", "config.yaml", "tokenizer.json"} <= given_out(server)
    assert not {"README.md", "optimizer.pt", "predictions.json"} & given_out(server)
    assert model_sha256(local_copy("me/x")) == model_sha256(str(adapter))
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Reader("me/x", device="cpu").answer(QUESTION, CONTEXT, top_k=3) == expected
    assert server.requests == []
    with pytest.raises(
        UserError, match=r"the model me/y cannot be loaded .* a hub id needs its exact spelling"
    ) as caught:
        Reader("me/y")
    assert "\n" not in str(caught.value)


def test_an_adapter_is_evaluated_by_its_hub_id(
    server: Hub, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Whoever wrote the options does not say where files go on this machine.
    config, theirs = adapter / "config.yaml", tmp_path / "theirs"
    options = yaml.safe_load(config.read_text(encoding="utf-8")) | {"store_dir": str(theirs), "cache_dir": str(theirs)}
    config.write_text(yaml.safe_dump(options), encoding="utf-8")
    put(server, "me/x", adapter)
    metrics = json.loads((adapter / "metrics.json").read_text(encoding="utf-8"))
    reset_accelerate()
    words = ["--adapter", "me/x", "--store_dir", str(tmp_path / "store"), "--results_dir", str(tmp_path / "results")]
    assert evaluate.main(words) == 0
    assert not theirs.exists()
    assert json.loads(capsys.readouterr().out) == metrics
    assert (tmp_path / "results" / "predictions.json").read_bytes() == (adapter / "predictions.json").read_bytes()
    assert configuration_of(local_copy("me/x"), {}).data.store_dir is None
    assert configuration_of(str(adapter), {}).data.store_dir == str(theirs)
    told = refusal(evaluate.main, ["--adapter", "me/y"], capsys)
    assert "the model me/y cannot be loaded" in told


def test_of_a_model_that_others_made_nothing_is_downloaded_ahead(server: Hub, trained: Path) -> None:
    put(server, "them/plain", trained / "model")
    assert local_copy("them/plain") == "them/plain"
    assert given_out(server) == set()


def test_an_exported_model_comes_with_its_graphs(server: Hub, tmp_path: Path) -> None:
    for name in ("reader.json", "onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/model_fp16.onnx", "config.json"):
        (tmp_path / "exported" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "exported" / name).write_text("{}")
    put(server, "me/exported", tmp_path / "exported")
    folder = Path(local_copy("me/exported"))
    assert is_exported(folder)
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model.onnx", "model_quantized.onnx"]


def test_an_adapter_in_a_package(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_package_with_adapters").mkdir()
    shutil.copytree(adapter, tmp_path / "a_package_with_adapters" / "one")
    (tmp_path / "a_package_with_adapters" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    reader = Reader("package:a_package_with_adapters/one", device="cpu")
    assert reader.answer(QUESTION, CONTEXT) == Reader(adapter, device="cpu").answer(QUESTION, CONTEXT)


def test_a_refusal_of_the_hub_is_one_sentence(server: Hub, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(server, "me/x", adapter)
    edit_json(adapter / "adapter_config.json", peft_type="IA3")
    put(server, "me/other", adapter)
    with pytest.raises(UserError, match="describes an adapter of type IA3, and only LORA is read"):
        Reader("me/other", device="cpu")
    server.status_at["me/x"] = 403
    with pytest.raises(UserError, match=r"the model me/x cannot be loaded \(.*403") as caught:
        Reader("me/x", device="cpu")
    assert "\n" not in str(caught.value)
