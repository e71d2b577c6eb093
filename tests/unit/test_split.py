"""`qa-dist split`: questions split off by article."""

import errno
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qa_dist import split
from qa_dist.data.checking import validate
from tests.refusals import refusal
from tests.unit.data_fixtures import read_file, row, write_rows

Capture = pytest.CaptureFixture[str]


def about(name: str, title: str) -> dict[str, Any]:
    """A question about a text that only this article has."""
    return row(name, title=title, context=f"{row()['context']} {title}")


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Five articles of 1, 2, 3, 4 and 5 questions, one behind the other in turns."""
    rows = [about(f"{title}-{number}", title) for number in range(5) for title in "abcde"[number:]]
    return write_rows(tmp_path / "in.jsonl", *rows)


def parts(source: str, folder: Path, *words: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    assert split.main([source, "--off", str(folder / "off.json"), "--rest", str(folder / "rest.json"), *words]) == 0
    both = [read_file(folder / name) for name in ("off.json", "rest.json")]
    off, rest = ([(each.title, each.id) for each in validate(part)[0]] for part in both)
    return off, rest


def test_no_article_is_on_both_sides_and_the_number_is_exact(source: str, tmp_path: Path, capsys: Capture) -> None:
    for seed in range(6):
        folder = tmp_path / str(seed)
        off, rest = parts(source, folder, "--questions", "4", "--seed", str(seed))
        assert len(off) == 4
        assert not {title for title, _ in off} & {title for title, _ in rest}
        counts = json.loads(capsys.readouterr().out)
        assert (counts["num_off"], counts["num_rest"]) == (4, len(rest))
        assert counts["num_off"] + counts["num_rest"] + counts["num_left_out"] == 15
        assert set(counts["articles_off"]) == {title for title, _ in off}
        again = tmp_path / f"{seed}-again"
        assert parts(source, again, "--questions", "4", "--seed", str(seed)) == (off, rest)
        capsys.readouterr()
    assert len({(tmp_path / str(seed) / "off.json").read_bytes() for seed in range(6)}) > 1


def test_what_is_mended_on_the_way_is_said(tmp_path: Path, capsys: Capture) -> None:
    rows = [about(f"q{number}", f"article {number}") for number in range(4)]
    for each in rows:
        del each["id"]
    parts(write_rows(tmp_path / "rows.jsonl", *rows), tmp_path, "--questions", "1")
    assert f"{split.PROG}: note: {tmp_path}/rows.jsonl: " in capsys.readouterr().err


def test_of_each_article_a_few(source: str, tmp_path: Path) -> None:
    off, rest = parts(source, tmp_path, "--questions", "4", "--per_article", "1")
    assert set(Counter(title for title, _ in off).values()) == {1}
    assert len({title for title, _ in rest}) == 1


def test_articles_with_a_text_in_common_are_on_one_side(tmp_path: Path) -> None:
    """a and b share a text, and so do b and c: all of them are drawn, or none."""
    texts = {"a": ["one", "two"], "b": ["two", "three"], "c": ["three"], "d": ["four"], "e": ["five"]}
    rows = [
        row(f"{title}-{text}", title=title, context=text, question="?", answers={"text": [text], "answer_start": [0]})
        for title, each in texts.items()
        for text in each
    ]
    file = write_rows(tmp_path / "shared.jsonl", *rows)
    drawn = []
    for seed in range(8):
        off, rest = parts(file, tmp_path / str(seed), "--questions", "1", "--seed", str(seed))
        drawn.append(off[0][0])
        used = {title for title, _ in rest}
        assert len(off) == 1
        assert used == set("de") if off[0][0] in "abc" else set("abc") < used
    assert set(drawn) & set("abc")
    assert set(drawn) & set("de")


def test_mistakes_are_sentences(source: str, tmp_path: Path, capsys: Capture) -> None:
    words = [source, "--off", str(tmp_path / "off.json"), "--rest", str(tmp_path / "rest.json")]
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path)
    for more, sentence in (
        (["--questions", "15"], "splitting 15 questions off would leave no article of 5; lower --questions"),
        (
            ["--questions", "9", "--per_article", "1"],
            "--per_article 1 leaves 5 questions to split off, and 9 are wanted",
        ),
        (["--questions", "0"], "'0' is not a whole number from 1"),
        (["--rest", words[2]], "are one file; name two"),
        (["--rest", str(linked / "off.json")], "are one file; name two"),
        (["--rest", f"{source}/rest.json"], "its folder .*in.jsonl cannot be used: Not a directory"),
        (["--rest", str(tmp_path / "rest.csv")], "is to hold SQuAD JSON; name a file that ends in .json or .json.gz"),
        (["--off", source], "exists already"),
    ):
        assert split.main([*words, *more]) == 2
        assert re.search(sentence, capsys.readouterr().err), sentence
        assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "linked"]
    untitled = write_rows(tmp_path / "untitled.jsonl", row("a"), row("b"))
    assert split.main([untitled, *words[1:]]) == 2
    assert "2 of 2 questions name no article and there are 0 titles" in capsys.readouterr().err
    assert not (tmp_path / "off.json").exists()


@pytest.mark.parametrize("refused", ["off.json", "rest.json"])
@pytest.mark.parametrize("call", ["write_bytes", "fsync", "replace"])
def test_of_two_files_there_are_both_or_none(
    source: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, refused: str, call: str
) -> None:
    """Whenever the disk is found to be full: with the content, when it is to be kept, or with the name."""
    owner = Path if call == "write_bytes" else os
    done = getattr(owner, call)

    def limited(target: Any, *rest: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
        if refused in os.path.basename(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return done(target, *rest)

    monkeypatch.setattr(owner, call, limited)
    words = [source, "--off", str(tmp_path / "off.json"), "--rest", str(tmp_path / "rest.json"), "--questions", "4"]
    assert re.search(f"{refused}.* cannot be written: No space left", refusal(split.main, words, capsys))
    assert os.listdir(tmp_path) == ["in.jsonl"]
