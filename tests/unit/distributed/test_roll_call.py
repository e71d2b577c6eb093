"""Names of machines, and the roll call of a run's ranks."""

import json
from collections.abc import Iterator

import pytest

from qa_dist.common.errors import ConfigError
from qa_dist.common.hosts import expand_hosts, expected_hosts, host_name
from qa_dist.distributed import roll_call
from qa_dist.distributed.roll_call import COMMAND, Member, call_the_roll, differences, places


class DictStore:
    """A store in this process; `on_check` stands for what other processes do meanwhile."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


class Clock:
    """Time that passes only while somebody sleeps; what happens at which second is in `events`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple[float, object]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        while self.events and self.events[0][0] <= self.now:
            self.events.pop(0)[1]()  # type: ignore[operator]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(roll_call, "time", clock)
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    return clock


def member(rank: int, host: str = "node0", **facts: object) -> Member:
    return Member(rank, host, facts)


def arrive(store: DictStore, rank: int, host: str, **facts: object) -> None:
    """Answer the newest call."""
    store.set(f"{store.get('call').decode()}/rank/{rank}", json.dumps({"host": host, "facts": facts}))


def roll(store: DictStore, own: Member, world_size: int, seconds: float = 60) -> str:
    return call_the_roll(store, own, world_size, seconds=seconds, notice=lambda text: None)


def test_places_name_machines_once_and_ranks_as_ranges() -> None:
    assert places([member(3, "b")]) == "b (rank 3)"
    assert places([member(3, "b"), member(4, "b"), member(6, "c")]) == "b, c (ranks 3-4, 6)"
    many = places([member(2 * rank, f"node{rank}") for rank in range(20)])
    assert many.startswith("node0, node1, ")
    assert "node7 and 12 more (ranks 0, 2, " in many


def test_differences_are_grouped_by_value() -> None:
    members = [
        member(0, "a", torch="2.13", numpy="2.4"),
        member(1, "a", torch="2.13", numpy="2.4"),
        member(2, "b", torch="2.12", numpy="2.4"),
        member(3, "c", torch="2.12", numpy="2.4"),
        member(4, "d", torch=None, numpy="2.4", extra=[1]),
    ]
    found = differences(members)
    assert [(item.name, item.found, item.expected, item.where) for item in found] == [
        ("torch", "2.12", "2.13", "b, c (ranks 2-3)"),
        ("torch", None, "2.13", "d (rank 4)"),
        ("extra", [1], None, "d (rank 4)"),
    ]
    assert found[0].first == "rank 0 (a)"
    assert differences(members[:2]) == []
    assert differences([]) == []


@pytest.mark.parametrize(
    ("node_list", "hosts"),
    [
        ("", []),
        ("solo", ["solo"]),
        ("a,b", ["a", "b"]),
        ("node[01-03,10],gpu7", ["node01", "node02", "node03", "node10", "gpu7"]),
        ("r[1-2]n[08-09]-ib", ["r1n08-ib", "r1n09-ib", "r2n08-ib", "r2n09-ib"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
    ],
)
def test_slurm_host_lists(node_list: str, hosts: list[str]) -> None:
    assert expand_hosts(node_list) == hosts


def test_the_step_counts_before_the_job() -> None:
    assert expected_hosts({"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_STEP_NODELIST": "n[1-2]"}) == ["n1", "n2"]
    assert expected_hosts({"SLURM_JOB_NODELIST": "n[1-2]"}) == ["n1", "n2"]
    assert expected_hosts({}) == []


def test_the_name_that_slurm_gives_comes_first() -> None:
    assert host_name({"SLURMD_NODENAME": "n7"}) == "n7"
    assert host_name({})


def test_tasks_with_files_of_their_own_are_no_ranks_of_one_run(clock: Clock) -> None:
    store = DictStore()
    words = ["--input_file", "part0.jsonl"]
    clock.events = [
        (1.0, lambda: [arrive(store, rank, "b", **{COMMAND: [words[0], f"part{rank}.jsonl"]}) for rank in (1, 2)])
    ]
    with pytest.raises(ConfigError) as raised:
        call_the_roll(store, member(0, "a", **{COMMAND: words}), 3, seconds=600, notice=lambda text: None)
    (told,) = raised.value.problems
    assert told.startswith("the command has part1.jsonl on b (rank 1) where it has part0.jsonl on rank 0 (a)")
    assert "start each task with SLURM_STEP_NUM_TASKS=1" in told


def test_the_roll_call_passes_when_all_are_there(clock: Clock) -> None:
    store, said = DictStore(), []
    clock.events = [(40.0, lambda: arrive(store, 1, "b", torch="2.13"))]
    call = call_the_roll(store, member(0, "a", torch="2.13"), 2, seconds=600, notice=said.append)
    assert said == ["waiting up to 600 seconds: rank 1 of 2 has not started; started: a (rank 0)"], (
        "told once, and only because it took long"
    )
    assert call == store.get("call").decode()


def test_the_others_answer_each_call_and_leave_those_that_are_over(clock: Clock) -> None:
    store, own = DictStore(), member(1, "b")
    store.set("call", "over")
    store.set("over/verdict", json.dumps(["node7 is missing"]))
    clock.events = [
        (3.0, lambda: store.set("call", "cut short")),
        (6.0, lambda: store.set("call", "new")),
        (9.0, lambda: store.set("new/verdict", "[]")),
    ]
    assert roll(store, own, 3) == "new"
    assert not store.check(["over/rank/1"])
    assert store.check(["cut short/rank/1", "new/rank/1"])


def test_ranks_that_start_again_do_not_find_those_before_them(clock: Clock) -> None:
    store = DictStore()
    clock.events = [(1.0, lambda: arrive(store, 1, "b"))]
    first = roll(store, member(0, "a"), 2)
    clock.events = [(clock.now + 20.0, lambda: arrive(store, 1, "c"))]
    assert roll(store, member(0, "a"), 2) != first
    assert clock.now > 20
    with pytest.raises(ConfigError, match="rank 1 of 2 has not started"):
        roll(store, member(0, "a"), 2)


def test_missing_ranks_are_named_on_all_that_came(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DictStore()
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    verdicts = []
    clock.events = [
        (1.0, lambda: arrive(store, 1, "n1.cluster")),
        (1.0, lambda: arrive(store, 2, "n2.cluster")),
        (1.0, lambda: arrive(store, 3, "n2.cluster")),
        (601.0, lambda: verdicts.append(json.loads(store.get(f"{store.get('call').decode()}/verdict")))),
    ]
    with pytest.raises(ConfigError) as raised:
        roll(store, member(0, "n1.cluster"), 6, seconds=600)
    text = str(raised.value)
    assert "after 600 seconds ranks 4-5 of 6 have not started (no process of n3 has)" in text
    assert "started: n1.cluster, n2.cluster (ranks 0-3)" in text
    assert "start the same command on every machine" in text
    assert verdicts == [[text]], "the others must have had the time to read it"


def test_the_others_raise_what_rank_0_found(clock: Clock) -> None:
    store = DictStore()
    store.set("call", "new")
    clock.events = [(3.0, lambda: store.set("new/verdict", json.dumps(["node7 is missing"])))]
    with pytest.raises(ConfigError, match="node7 is missing"):
        roll(store, member(1, "b"), 3)


def test_a_silent_rank_0_is_an_error_too(clock: Clock) -> None:
    with pytest.raises(ConfigError, match="rank 0 has not called the others within 120 seconds"):
        roll(DictStore(), member(1, "b"), 3)


def test_ranks_that_cannot_run_together_are_named(clock: Clock) -> None:
    store = DictStore()
    clock.events = [
        (1.0, lambda: arrive(store, 1, "b", device="a GPU")),
        (1.0, lambda: arrive(store, 2, "c", device="the CPU")),
    ]
    with pytest.raises(ConfigError, match=r"device is the CPU on c \(rank 2\) but a GPU on rank 0 \(a\); make"):
        roll(store, member(0, "a", device="a GPU"), 3)
