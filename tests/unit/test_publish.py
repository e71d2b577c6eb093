"""`qa-dist publish`: what is sent to a hub of this machine, in one commit or not at all, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from safetensors.numpy import save_file

from qa_dist import card
from qa_dist.publish import main
from tests.hub_server import READ_TOKEN, TOKEN, Hub, hub
from tests.refusals import refusal
from tests.unit.data_fixtures import FIXTURES
from tests.unit.trained import edit_json, some_calibration

# The hub's library sends files in a way that its own library for HTTP will give up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Capture = pytest.CaptureFixture[str]

BASE = ("--base_model", "them/base")
WORDS = ("--repo_id", "me/x", *BASE)
NAMES = [
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "config.yaml", "run.json", "tokenizer.json"),
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with its card, and with all that is not to be published; for reading only."""
    folder = tmp_path_factory.mktemp("secret-place") / "mine"
    shutil.copytree(FIXTURES / "earlier" / "run", folder)
    (folder / "best").mkdir()
    (folder / "best" / "adapter_model.safetensors").write_bytes(b"best")
    for name in ("train.log", "events.out.tfevents.1", ".launchers", "logits.npy", "notes.txt"):
        (folder / name).write_text("private", encoding="utf-8")
    edit_json(folder / "run.json", command=["train", "--train_file", "/home/me/secret/train.json"], noted=TOKEN)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="/home/me/secret/bert")
    edit_json(folder / "tokenizer_config.json", name_or_path="/home/me/secret/bert")
    options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    options |= {"train_file": "/home/me/secret/train.json", "validation_file": "secret/dev.json"}
    options |= {"model_name_or_path": "/home/me/secret/bert", "store_dir": "/home/me/secret"}
    (folder / "config.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    assert card.main([str(folder), *WORDS]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "mine"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process takes for the only one, and the token of somebody who may write there."""
    with hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield found


def test_a_program_of_its_own_publishes_to_the_hub_that_the_environment_names(finished: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    with hub() as server:
        done = subprocess.run(
            [sys.executable, "-m", "qa_dist.publish", str(finished), *WORDS, "--private"],
            env={
                **environment,
                **{"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"},
                "HF_HOME": str(tmp_path),
            },
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{server.url}/me/x/commit/{1:040x}\n"
    assert TOKEN not in done.stdout + done.stderr
    assert list(server.repositories) == ["me/x"]
    assert server.repositories["me/x"]["private"] is True
    (commit,) = server.repositories["me/x"]["commits"]
    assert sorted(commit) == NAMES
    assert server.tokens == {TOKEN}
    for name in ("adapter_model.safetensors", "tokenizer.json", "README.md"):
        assert commit[name] == (finished / name).read_bytes()
    texts = b"".join(content for name, content in commit.items() if not name.endswith(".safetensors"))
    for part in ("secret", "/home", TOKEN, str(finished.parent), "private"):
        assert part.encode() not in texts, part
    assert json.loads(commit["adapter_config.json"])["base_model_name_or_path"] == "them/base"
    record = json.loads(commit["run.json"])
    assert record["noted"] == "***"
    kept = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert "command" not in record
    assert (record["final"], record["versions"], record["data"]) == (kept["final"], kept["versions"], kept["data"])
    options = yaml.safe_load(commit["config.yaml"])
    assert (options["train_file"], options["validation_file"]) == ("train.json", "dev.json")
    assert options["model_name_or_path"] == "them/base"
    assert (options["max_seq_length"], options["doc_stride"]) == (64, 16)
    assert not {"output_dir", "store_dir"} & set(options)


def test_what_is_published_opens(run: Path, server: Hub, tmp_path: Path, capsys: Capture) -> None:
    from qa_dist.answering.opening import allows_no_answer, configuration_of

    assert main([str(run), *WORDS]) == 0
    there = tmp_path / "there"
    there.mkdir()
    for name, content in server.files("me/x").items():
        (there / name).write_bytes(content)
    config, before = (configuration_of(str(folder), {}) for folder in (there, run))
    assert config.evaluation == before.evaluation
    assert config.model == replace(before.model, model_name_or_path="them/base")
    # What a reader saw in null_odds.json, which is not published.
    assert allows_no_answer(str(there), config) is allows_no_answer(str(run), before) is True
    names = {"train_file": "train.json", "validation_file": "dev.json", "store_dir": None}
    assert config.data == replace(before.data, version_2_with_negative=True, **names)


def test_a_dry_run_lists_and_sends_nothing(finished: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("socket.socket.connect", None)
    assert main([str(finished), *WORDS, "--dry_run"]) == 0
    *rows, total = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for _, name in rows] == NAMES
    sizes = {name: int(size.replace(",", "")) for size, name in rows}
    assert sizes["adapter_model.safetensors"] == (finished / "adapter_model.safetensors").stat().st_size
    assert total == [f"{sum(sizes.values()):,}", "bytes in 7 files for me/x"]


def test_a_second_time_replaces_what_has_changed_in_one_commit(run: Path, server: Hub, capsys: Capture) -> None:
    assert main([str(run), *WORDS]) == 0
    assert card.main([str(run), *WORDS, "--license", "mit"]) == 0
    assert main([str(run), *WORDS]) == 0
    first, second = server.repositories["me/x"]["commits"]
    assert sorted(first) == NAMES
    assert sorted(second) == ["README.md"]
    assert sum(request.startswith("PUT") for request in server.requests) == 1
    assert server.repositories["me/x"]["private"] is False


def test_a_refused_token(finished: Path, server: Hub, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "hf_" + "x" * 34
    monkeypatch.setenv("HF_TOKEN", wrong)
    said = refusal(main, [str(finished), *WORDS], capsys)
    assert f"{server.url} refused the access token, so nothing was published; make a new one" in said
    assert wrong not in said
    assert server.repositories == {}
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert "has no right to write to me/x (403), so nothing" in refusal(main, [str(finished), *WORDS], capsys)
    assert server.repositories == {}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main([str(finished), *WORDS]) == 0
    assert sorted(server.files("me/x")) == NAMES


def test_a_right_that_is_missing_in_a_repository_of_others(finished: Path, server: Hub, capsys: Capture) -> None:
    server.repositories["me/x"] = {"private": False, "commits": [{"README.md": b"theirs"}]}
    server.status_at["/preupload/"] = 403
    assert "no right to write to me/x" in refusal(main, [str(finished), *WORDS], capsys)
    assert server.files("me/x") == {"README.md": b"theirs"}


@pytest.mark.parametrize("place", ["/repos/create", "/validate-yaml", "/commit/"])
def test_a_broken_connection_and_a_second_try(finished: Path, server: Hub, capsys: Capture, place: str) -> None:
    server.breaks_at = place
    said = refusal(main, [str(finished), *WORDS], capsys)
    assert f"publishing to {server.url} failed (" in said
    assert "try again" in said
    assert [each["commits"] for each in server.repositories.values()] in ([], [[]])
    server.breaks_at = None
    assert main([str(finished), *WORDS]) == 0
    (commit,) = server.repositories["me/x"]["commits"]
    assert sorted(commit) == NAMES
    assert sum(request.startswith("PUT") for request in server.requests) == 1


def test_a_commit_whose_answer_is_lost_is_not_made_twice(finished: Path, server: Hub, capsys: Capture) -> None:
    server.breaks_at, server.answers_late = "/commit/", True
    said = refusal(main, [str(finished), *WORDS], capsys)
    assert f"either all files were published or none: look at {server.url}/me/x; try again" in said
    server.breaks_at = None
    assert main([str(finished), *WORDS]) == 0
    assert len(server.repositories["me/x"]["commits"]) == 1
    assert capsys.readouterr().out == f"{server.url}/me/x/commit/{1:040x}\n"


def test_a_hub_that_fails(finished: Path, server: Hub, capsys: Capture) -> None:
    server.status_at["/commit/"] = 500
    assert f"{server.url} answered 500 (" in refusal(main, [str(finished), *WORDS], capsys)
    server.status_at = {"/repos/create": 400}
    assert "answered 400 (" in refusal(main, [str(finished), *WORDS], capsys)
    assert server.repositories["me/x"]["commits"] == []


def test_a_public_repository_is_not_taken_for_a_private_one(finished: Path, server: Hub, capsys: Capture) -> None:
    server.repositories["me/x"] = {"private": False, "commits": []}
    said = refusal(main, [str(finished), *WORDS, "--private"], capsys)
    assert "me/x is there already and is not private; make it so" in said
    assert server.repositories["me/x"]["commits"] == []
    assert not server.objects


def test_without_a_token_or_a_network(
    finished: Path, server: Hub, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE keeps this from the hub" in refusal(main, [str(finished), *WORDS], capsys)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "there is no access token for the hub; set HF_TOKEN" in refusal(main, [str(finished), *WORDS], capsys)
    assert server.requests == []


def test_a_whole_model_in_several_files(run: Path, tmp_path: Path, capsys: Capture) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / name, whole)
    (whole / "config.json").write_text('{"model_type": "bert", "_name_or_path": "/home/me/bert"}', encoding="utf-8")
    (whole / "README.md").write_text("# By hand\n", encoding="utf-8")
    parts = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    (whole / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}), encoding="utf-8")
    save_file({"a.weight": np.zeros(2, np.float32)}, whole / "model-1.safetensors")
    words = [str(whole), "--repo_id", "me/whole", "--dry_run"]
    assert "index.json names model-2.safetensors, which is no" in refusal(main, words, capsys)
    (whole / "model-2.safetensors").write_bytes((whole / "model-1.safetensors").read_bytes()[:-1])
    said = refusal(main, words, capsys)
    assert f"{whole / 'model-2.safetensors'} cannot be read" in said
    assert "copy the folder again" in said
    save_file({"b.weight": np.zeros(2, np.float32)}, whole / "model-2.safetensors")
    assert main(words) == 0
    rows = re.findall(r"^ +[\d,]+  (\S+)$", capsys.readouterr().out, re.MULTILINE)
    expected = {"README.md", "config.json", "model.safetensors.index.json", *parts.values()}
    assert set(rows) == expected | {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer_config.json", "calibration.json", "run.json"])
def test_a_file_that_holds_something_else_is_not_sent(run: Path, server: Hub, capsys: Capture, name: str) -> None:
    (run / name).write_text("[]", encoding="utf-8")
    said = refusal(main, [str(run), *WORDS], capsys)
    assert f"{run / name} must hold a JSON object, not a list; mend or remove it" in said
    assert server.requests == []


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"], ids=["empty", "pointer"])
def test_weights_that_are_not_whole_are_not_sent(run: Path, server: Hub, capsys: Capture, content: bytes) -> None:
    (run / "adapter_model.safetensors").write_bytes(content)
    said = refusal(main, [str(run), *WORDS], capsys)
    assert f"{run / 'adapter_model.safetensors'} cannot be read" in said
    assert server.requests == []


def test_a_calibration_that_readers_refuse_is_not_sent(run: Path, server: Hub, capsys: Capture) -> None:
    some_calibration().write(run)
    edit_json(run / "calibration.json", temperature=-1)
    said = refusal(main, [str(run), *WORDS], capsys)
    assert "calibration.json is not as it was written (temperature -1, threshold None); remove it" in said
    edit_json(run / "calibration.json", temperature=2.0, format_version=9)
    assert "calibration.json has format 9 but" in refusal(main, [str(run), *WORDS], capsys)
    assert server.requests == []
    some_calibration().write(run)
    assert main([str(run), *WORDS]) == 0
    assert sorted(server.files("me/x")) == sorted([*NAMES, "calibration.json"])


def test_what_cannot_be_published_is_one_sentence(run: Path, tmp_path: Path, capsys: Capture) -> None:
    words = [str(run), "--repo_id", "me/x"]
    text = (run / "README.md").read_text(encoding="utf-8")
    for own, part in (
        (words[:1], "the following arguments are required: --repo_id"),
        ([str(run), "--repo_id", "x"], "'x' is not the name of a repository, such as me/model"),
        ([*words, "--base_model", "/models/bert"], "'/models/bert' is not a hub id"),
        ([str(tmp_path), *WORDS], "holds no whole adapter and no whole model"),
        (words, "is bert, which is on no hub; name its hub id with --base_model, or publish a merged model"),
        ([str(run), "--repo_id", "me/y", *BASE], "README.md does not name me/y; write it anew: qa-dist card"),
        ([*words, "--base_model", "you/base"], "README.md does not name you/base; write it anew: qa-dist card"),
    ):
        assert part in refusal(main, [*own, "--dry_run"], capsys), own
    (run / "README.md").write_text(f"# Mine\n{TOKEN}\n", encoding="utf-8")
    said = refusal(main, [*words, *BASE, "--dry_run"], capsys)
    assert "README.md holds what looks like an access token" in said
    (run / "README.md").unlink()
    said = refusal(main, [*words, *BASE, "--dry_run"], capsys)
    assert f"holds no README.md; write it first: qa-dist card {run} --repo_id me/x --base_model them/base" in said
    (run / "README.md").write_text(text, encoding="utf-8")
    (run / "tokenizer.json").unlink()
    assert "holds no tokenizer; copy its files there" in refusal(main, [*words, *BASE, "--dry_run"], capsys)
