"""`qa-dist convert`: questions in any layout as plain SQuAD JSON."""

import gzip
import json
from pathlib import Path

import pytest

from qa_dist.convert import build_parser, main
from qa_dist.data.checking import validate
from tests.unit.data_fixtures import TINY_SQUAD, read_file, row, tiny_examples, write_rows

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("name", ["out.json", "new/out.json.gz"])
def test_what_is_written_is_read_back_as_the_same(name: str, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / name
    assert main([str(TINY_SQUAD), str(output)]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["num_examples"] == len(tiny_examples())
    assert said.err == ""
    assert validate(read_file(output))[0] == tiny_examples()
    content = output.read_bytes()
    document = json.loads(gzip.decompress(content) if name.endswith(".gz") else content)
    assert document["version"] == "v2.0"
    assert all("is_impossible" in qa for a in document["data"] for p in a["paragraphs"] for qa in p["qas"])
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_questions_of_one_context_share_a_paragraph_and_a_version_1_stays_one(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", row("a", title="t"), row("b", title="t"), row("c", title="u"))
    assert main([path, str(tmp_path / "out.json")]) == 0
    document = json.loads((tmp_path / "out.json").read_bytes())
    assert document["version"] == "1.1"
    assert [[len(p["qas"]) for p in article["paragraphs"]] for article in document["data"]] == [[2], [1]]
    assert document["data"][0]["paragraphs"][0]["qas"][0] == {
        "id": "a",
        "question": "Where does Mora lie?",
        "answers": [{"text": "on a lake", "answer_start": 10}],
    }


def test_what_was_read_and_mended_is_said(tmp_path: Path, capsys: Capture) -> None:
    path = write_rows(
        tmp_path / "a.jsonl",
        row("a", answers={"text": ["on a lake", "the shore"], "answer_start": [-1, 3]}),
        row("b", answers=...),
        row("c", answers={"text": "the shore"}),
    )
    assert main([path, str(tmp_path / "out.json")]) == 0
    said = capsys.readouterr()
    assert "mended: 1" in said.err
    assert {name: count for name, count in json.loads(said.out).items() if name != "output" and count} == {
        "num_examples": 3,
        "num_mended": 1,
        "num_without_references": 1,
        "num_without_place": 1,
    }
    before, after = (validate(read_file(file), for_training=False)[0] for file in (Path(path), tmp_path / "out.json"))
    assert before == after
    qas = [
        qa for each in json.loads((tmp_path / "out.json").read_text())["data"][0]["paragraphs"] for qa in each["qas"]
    ]
    assert [qa.get("answers", ["none"])[-1] for qa in qas] == [
        {"text": "the shore", "answer_start": -1},
        "none",
        {"text": "the shore", "answer_start": -1},
    ]
    told = " ".join(build_parser().format_help().split())
    assert "One that was not found has answer_start -1; a question of whose answer nothing is known has no" in told


def test_a_file_that_is_there_is_not_replaced(tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "out.json"
    output.write_text("mine")
    assert main([str(TINY_SQUAD), str(output)]) == 2
    assert "out.json exists already; name a file that does not" in capsys.readouterr().err
    assert output.read_text() == "mine"


def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path: Path, capsys: Capture) -> None:
    path = write_rows(tmp_path / "a.jsonl", row("a"), row("b", question=" "))
    output = tmp_path / "out" / "out.json"
    for words, part in (
        ([path, str(output)], "question is empty or blank (b)"),
        ([str(tmp_path / "none.json"), str(output)], "does not exist"),
        ([path, str(output), "--split", "test"], "--split"),
        ([path], "OUT"),
        ([path, str(Path(path) / "below.json"), "--on_invalid", "drop"], "cannot be used: Not a directory"),
    ):
        assert main(words) == 2
        said = capsys.readouterr()
        assert part in said.err
        assert len(said.err.splitlines()) <= 2
        assert "Traceback" not in said.err
    assert not output.exists()
    assert main([path, str(output), "--on_invalid", "drop"]) == 0
    assert json.loads(capsys.readouterr().out)["num_dropped"] == 1
