"""The machines of a run: their names, which of them are missing, and what is not the same on all of them.

Nothing here talks to other ranks: `rendezvous.py` and `agreement.py` carry the words.
"""

import itertools
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qa_dist.common.errors import ConfigError
from qa_dist.common.hosts import expected_hosts

COMMAND = "the command"
"""The fact of ranks that have no launcher: what they were started with, as words."""

_MAX_NAMES = 8
_POLL_SECONDS = 0.5
_NOTICE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Member:
    """What one rank says of itself.

    Attributes:
        rank: its number.
        host: name of its machine.
        facts: what must be the same on all ranks, by name; plain JSON values.
    """

    rank: int
    host: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Difference:
    """A fact that is not everywhere what it is on rank 0.

    Attributes:
        name: of the fact.
        found: its value on some ranks.
        expected: its value on rank 0.
        where: those ranks and their machines, in words.
        first: rank 0 and its machine, in words.
    """

    name: str
    found: Any
    expected: Any
    where: str
    first: str


def places(members: Sequence[Member]) -> str:
    """Machines and ranks in words: "node3, node4 (ranks 24-39)"."""
    hosts = list(dict.fromkeys(member.host for member in members))
    return f"{_some(hosts)} ({_rank_ranges([member.rank for member in members])})"


def differences(members: Sequence[Member]) -> list[Difference]:
    """Every fact that is not the same everywhere, compared with the first member's; ranks that agree stand together."""
    if not members:
        return []
    first, *others = members
    names = list(dict.fromkeys(name for member in members for name in member.facts))
    found = []
    for name in names:
        expected = first.facts.get(name)
        groups: dict[str, list[Member]] = {}
        for member in others:
            if member.facts.get(name) != expected:
                groups.setdefault(json.dumps(member.facts.get(name)), []).append(member)
        for group in groups.values():
            found.append(Difference(name, group[0].facts.get(name), expected, places(group), f"rank 0 ({first.host})"))
    return found


class Store(Protocol):
    """The part of torch's key-value stores that a roll call uses."""

    def set(self, key: str, value: str, /) -> Any:
        """Keep a value."""

    def get(self, key: str, /) -> bytes:
        """The value of a key that is there."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all of these are there."""


def call_the_roll(
    store: Store, own: Member, world_size: int, *, seconds: float, notice: Callable[[str], object]
) -> str:
    """Come back when every rank has started, and all say the same of themselves.

    This goes before the first collective operation, which would wait for whoever is missing without a name. A launcher
    that starts its ranks again keeps the store, so each call has a name that was never used before, and one that has
    its verdict is over.

    Args:
        store: Where ranks leave messages for each other.
        own: This rank.
        world_size: Number of ranks that must come.
        seconds: How long rank 0 waits for them.
        notice: Told by rank 0, once, who is awaited, if that takes long.

    Returns:
        The name of the call: the same on all ranks, and another one each time.

    Raises:
        ConfigError: On every rank that came, alike: ranks are missing, or differ in a fact.
    """
    answer = json.dumps({"host": own.host, "facts": dict(own.facts)})
    if own.rank:
        # Rank 0 counts its own seconds, and may have started later.
        call, problems = _answer(store, own.rank, answer, 2 * seconds)
    else:
        call = secrets.token_hex(8)
        store.set(f"{call}/rank/0", answer)
        store.set("call", call)
        problems = _await_ranks(store, call, world_size, seconds, notice)
        store.set(f"{call}/verdict", json.dumps(problems))
        if problems:
            # The store may live in this process: let the others read the verdict before it goes.
            time.sleep(3 * _POLL_SECONDS)
    if problems:
        raise ConfigError(problems, on_all_ranks=True)
    return call


def _answer(store: Store, rank: int, answer: str, seconds: float) -> tuple[str, list[str]]:
    """Answer rank 0's call; its name, and what is wrong with the ranks."""
    call = ""
    for _ in _polls(seconds):
        newest = store.get("call").decode() if store.check(["call"]) else ""
        if newest != call and not store.check([f"{newest}/verdict"]):
            call = newest
            store.set(f"{call}/rank/{rank}", answer)
        if call and store.check([f"{call}/verdict"]):
            return call, json.loads(store.get(f"{call}/verdict"))
    raise ConfigError([f"rank 0 has not called the others within {seconds:.0f} seconds; look at its log"])


def _await_ranks(
    store: Store, call: str, world_size: int, seconds: float, notice: Callable[[str], object]
) -> list[str]:
    """What is wrong with the ranks, once all have come or the time is up."""
    keys = [f"{call}/rank/{rank}" for rank in range(world_size)]
    noticed = False
    for waited in _polls(seconds):
        if store.check(keys):
            return _sentences(differences(_present(store, keys)))
        if waited >= _NOTICE_SECONDS and not noticed:
            noticed = True
            notice(f"waiting up to {seconds:.0f} seconds: {_absent(_present(store, keys), world_size)}")
    return [
        f"after {seconds:.0f} seconds {_absent(_present(store, keys), world_size)}; start the same command on every "
        "machine, look at the logs of those that are missing, and check that the number of machines and processes is "
        "right"
    ]


def _sentences(found: Sequence[Difference]) -> list[str]:
    """What differs between ranks that have come, a sentence each."""
    for difference in found:
        if difference.name == COMMAND:
            pairs = itertools.zip_longest(difference.found or (), difference.expected or ())
            word, expected = next((pair for pair in pairs if pair[0] != pair[1]), (None, None))
            return [
                f"the command has {shown(word)} on {difference.where} where it has {shown(expected)} on "
                f"{difference.first}, and the tasks of srun are one run of one command; for a run of its own, start "
                "each task with SLURM_STEP_NUM_TASKS=1 in its environment"
            ]
    return [
        f"{difference.name} is {shown(difference.found)} on {difference.where} but {shown(difference.expected)} on "
        f"{difference.first}; make these machines alike, or leave those out (`qa-dist doctor` shows what one has)"
        for difference in found
    ]


def _polls(seconds: float) -> Iterator[float]:
    """Seconds waited so far, at intervals that grow from short ones, as long as that is less than `seconds`."""
    started = time.monotonic()
    pause = 0.01
    while (waited := time.monotonic() - started) < seconds:
        yield waited
        time.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS)


def shown(value: Any) -> str:
    """A fact's value in a sentence."""
    return "missing" if value is None else str(value)


def _present(store: Store, keys: Sequence[str]) -> list[Member]:
    members = []
    for rank, key in enumerate(keys):
        if store.check([key]):
            members.append(Member(rank, **json.loads(store.get(key))))
    return members


def _absent(present: Sequence[Member], world_size: int) -> str:
    here = {member.rank for member in present}
    absent = [rank for rank in range(world_size) if rank not in here]
    # A scheduler's names are short, a machine's own name may be whole.
    answered = {member.host.partition(".")[0] for member in present}
    silent = [host for host in expected_hosts() if host.partition(".")[0] not in answered]
    names = f" (no process of {_some(silent)} has)" if silent else ""
    return (
        f"{_rank_ranges(absent)} of {world_size} {'has' if len(absent) == 1 else 'have'} not started{names}; "
        f"started: {places(present)}"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _rank_ranges(ranks: Sequence[int]) -> str:
    """Ranks in words: "rank 3", "ranks 0-7, 9"."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and ranges[-1][1] == rank - 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    words = [str(low) if low == high else f"{low}-{high}" for low, high in ranges]
    return f"rank{'' if len(ranks) == 1 else 's'} {_some(words)}"
