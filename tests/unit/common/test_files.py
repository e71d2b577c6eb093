import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qa_dist.common.errors import ConfigError
from qa_dist.common.files import make_writable, staged, staged_files, write_json


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed and renamed, in order: ("flush", name) and ("rename", name)."""
    noted: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        noted.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        noted.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    return noted


def write_file(aside: Path) -> None:
    aside.write_text("new", encoding="utf-8")


def write_folder(aside: Path) -> None:
    (aside / "inner").mkdir(parents=True)
    (aside / "a").write_text("new", encoding="utf-8")
    (aside / "inner" / "b").write_text("new", encoding="utf-8")


def test_a_file_is_flushed_before_it_is_renamed_and_its_name_after(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    target = tmp_path / "target"
    target.write_text("old", encoding="utf-8")
    with staged(target) as aside:
        write_file(aside)
        assert target.read_text(encoding="utf-8") == "old"
    assert target.read_text(encoding="utf-8") == "new"
    assert calls == [("flush", ".target.qa_dist-unfinished"), ("rename", "target"), ("flush", tmp_path.name)]
    assert os.listdir(tmp_path) == ["target"]


def test_everything_in_a_folder_is_flushed_before_it_is_renamed(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    with staged(tmp_path / "target", aside=tmp_path / "aside") as aside:
        write_folder(aside)
    flushed = [("flush", name) for name in ("a", "b", "inner", "aside")]
    assert calls == [*flushed, ("rename", "target"), ("flush", tmp_path.name)]
    assert (tmp_path / "target" / "inner" / "b").read_text(encoding="utf-8") == "new"
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_block_that_fails_leaves_what_was_there_and_nothing_beside(
    tmp_path: Path, write: Callable[[Path], None], error: type[BaseException]
) -> None:
    def fail() -> None:
        with staged(tmp_path / "target") as aside:
            write(aside)
            raise error

    (tmp_path / "target").write_text("old", encoding="utf-8")
    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == ["target"]
    assert (tmp_path / "target").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_what_was_there_and_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "target").write_text("old", encoding="utf-8")
    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match="No space left"), staged(tmp_path / "target") as aside:
        write_file(aside)
    assert os.listdir(tmp_path) == ["target"]
    assert (tmp_path / "target").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("left", [write_file, write_folder])
@pytest.mark.parametrize("write", [write_file, write_folder])
def test_what_a_killed_process_left_is_not_part_of_the_result(
    tmp_path: Path, left: Callable[[Path], None], write: Callable[[Path], None]
) -> None:
    left(tmp_path / ".target.qa_dist-unfinished")
    with staged(tmp_path / "target") as aside:
        assert not aside.exists()
        write(aside)
    assert os.listdir(tmp_path) == ["target"]


def test_a_link_that_was_left_is_removed_and_what_it_points_to_is_not(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere")
    (tmp_path / ".target.qa_dist-unfinished").symlink_to(tmp_path / "elsewhere")
    with staged(tmp_path / "target") as aside:
        write_file(aside)
    assert (tmp_path / "elsewhere" / "a").exists()


def test_a_file_system_that_flushes_no_folders_will_do_and_one_that_flushes_no_files_will_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def of_files(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    def of_none(descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", of_files)
    write_json(tmp_path / "value.json", {"a": [1, None]})
    assert (tmp_path / "value.json").read_text(encoding="utf-8") == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'
    monkeypatch.setattr(os, "fsync", of_none)
    with pytest.raises(OSError, match="Invalid argument"):
        write_json(tmp_path / "value.json", {})
    assert (tmp_path / "value.json").stat().st_size > 3


def by_name_reversed(path: Path) -> Any:
    return -ord(path.name)


def test_files_move_in_their_order_when_all_are_flushed(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("a", "z"):
        (folder / name).write_text("old", encoding="utf-8")
    with staged_files(folder, order=by_name_reversed) as aside:
        for name in "abc":
            (aside / name).write_text("new", encoding="utf-8")
    names = [name for kind, name in calls if kind == "rename"]
    assert names == ["c", "b", "a"]
    assert [name for _, name in calls] == ["a", "b", "c", ".results.qa_dist-unfinished", *names, "results"]
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == {
        **dict.fromkeys("abc", "new"),
        "z": "old",
    }


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_rights_that_the_umask_gives_whatever_a_library_gave_them(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with staged(tmp_path / "model") as aside:
            write_folder(aside)
            (aside / "inner" / "b").chmod(0o600)
        with staged_files(tmp_path / "run", order=str) as aside:
            (aside / "weights").touch(0o600)
    finally:
        os.umask(before)
    for name in ("model/a", "model/inner/b", "run/weights"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_files_of_a_block_that_fails_do_not_move(tmp_path: Path) -> None:
    def fail() -> None:
        with staged_files(folder, order=by_name_reversed) as aside:
            assert list(aside.iterdir()) == []
            (aside / "a").write_text("new", encoding="utf-8")
            raise RuntimeError

    folder = tmp_path / "results"
    write_folder(folder / ".results.qa_dist-unfinished")
    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(folder) == []


def test_a_folder_that_cannot_be_made_is_named_with_its_option(tmp_path: Path) -> None:
    make_writable(tmp_path / "a" / "b", "--output_dir")
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--output_dir .*file/b cannot be used: Not a directory; choose another"):
        make_writable(tmp_path / "file" / "b", "--output_dir")


def test_what_lies_beside_a_file_under_a_likely_name_stays(tmp_path: Path) -> None:
    (tmp_path / ".model").mkdir()
    (tmp_path / ".model" / "weights").write_text("precious", encoding="utf-8")
    (tmp_path / ".staging").write_text("precious", encoding="utf-8")
    with staged(tmp_path / "model") as aside:
        write_folder(aside)
    with staged_files(tmp_path, order=by_name_reversed) as aside:
        (aside / "a").write_text("new", encoding="utf-8")
    assert (tmp_path / ".model" / "weights").read_text(encoding="utf-8") == "precious"
    assert (tmp_path / ".staging").read_text(encoding="utf-8") == "precious"
    assert sorted(os.listdir(tmp_path)) == [".model", ".staging", "a", "model"]
