"""A config.yaml in a run's folder that cannot be read: `report` shows the rest, and others name the file alone."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from qa_dist import analyze, card, publish, report
from qa_dist.reporting.run_folders import read_runs
from tests.refusals import refusal
from tests.unit.data_fixtures import FIXTURES

Capture = pytest.CaptureFixture[str]

EARLIER = FIXTURES / "earlier"
DAMAGED = {
    "is empty; mend or remove it": b" \n",
    "holds a list; mend or remove it": b"[]",
    "holds only 3; mend or remove it": b"3",
    "cannot be used as YAML": b"seed: [",
    "is not UTF-8 (byte 6); convert the file": b"seed: \xff",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The output folder of a run, to spoil."""
    return Path(shutil.copytree(EARLIER / "run", tmp_path / "mine"))


@pytest.mark.parametrize("message", DAMAGED)
def test_the_file_alone_is_named(run: Path, capsys: Capture, message: str) -> None:
    (run / "config.yaml").write_bytes(DAMAGED[message])
    (run / "README.md").write_text("# By hand\n", encoding="utf-8")
    hub = ["--repo_id", "me/x", "--base_model", "them/base", "--dry_run"]
    for main, words in (
        (analyze.main, ["--references", str(EARLIER / "dev.json")]),
        (card.main, []),
        (publish.main, hub),
    ):
        said = refusal(main, [str(run), *words], capsys)
        assert said.startswith(f"{run / 'config.yaml'} {message}"), said
        assert "--config" not in said


@pytest.mark.parametrize("message", DAMAGED)
def test_a_report_shows_the_rest(run: Path, message: str) -> None:
    (run / "config.yaml").write_bytes(DAMAGED[message])
    (found,) = read_runs([run])
    assert found.notes[0].startswith(f"{run / 'config.yaml'} {message}")
    assert found.notes[0].endswith(": which options the run had is not known.")
    assert not any("There is no config.yaml" in note for note in found.notes)
    assert found.config == {}
    assert found.system is not None
    assert found.system.texts == json.loads((run / "predictions.json").read_text(encoding="utf-8"))
    (run / "config.yaml").write_text("# nothing\n", encoding="utf-8")
    assert read_runs([run])[0].notes[0] == "config.yaml holds no options: which options the run had is not known."


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="the bench extra is not installed")
def test_the_page_has_a_note(run: Path, tmp_path: Path, capsys: Capture) -> None:
    (run / "config.yaml").write_bytes(b"")
    output = tmp_path / "report.html"
    words = [str(run), "--output", str(output), "--references", str(EARLIER / "dev.json"), "--resamples", "100"]
    assert report.main(words) == 0
    note = f"{run / 'config.yaml'} is empty; mend or remove it: which options the run had is not known."
    assert f"qa_dist.report: note: mine: {note}\n" in capsys.readouterr().err
    text = output.read_text(encoding="utf-8")
    assert note in text
    assert "Has answer" in text
