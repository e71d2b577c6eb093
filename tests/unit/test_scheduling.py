"""Which tests one worker runs: files that are named exist, and what belongs together stays together."""

from pathlib import Path

from tests.support.scheduling import FIRST, TOGETHER, place, rotated, scope

ROOT = Path(__file__).parents[2]


def test_files_that_are_named_are_there() -> None:
    names = [*FIRST, *(name for names in TOGETHER.values() for name in names)]
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_tests_of_a_file_or_of_files_that_share_a_server_go_to_one_worker() -> None:
    (group, (one, other, *_)) = next(iter(TOGETHER.items()))
    assert scope(f"{one}::test_a[x::y]") == scope(f"{other}::test_b") == group
    assert scope("tests/unit/test_merge.py::test_a") == scope("tests/unit/test_merge.py::test_b")
    assert scope("tests/unit/test_merge.py::test_a") != scope("tests/unit/test_rooms.py::test_a")


def test_the_longest_come_first() -> None:
    names = ["tests/unit/test_merge.py::a", *(f"{file}::a" for file in reversed(FIRST)), "tests/unit/test_card.py::a"]
    assert sorted(names, key=place) == [*reversed(names[1:-1]), names[-1], names[0]]


def test_workers_begin_at_other_files_and_collect_all() -> None:
    folders = [str(ROOT / "tests" / name) for name in ("distributed", "unit")]
    collected = [rotated(folders, worker, 4) for worker in range(4)]
    assert len({files[0] for files in collected}) == 4
    assert len({frozenset(files) for files in collected}) == 1
    assert collected[0] == [str(file) for folder in folders for file in sorted(Path(folder).rglob("test_*.py"))]
    one = [f"{ROOT}/tests/unit/test_merge.py"]
    assert rotated(one, 1, 4) == one
