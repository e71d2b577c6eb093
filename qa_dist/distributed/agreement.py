"""Before the first step: whether all ranks would train the same model on the same data with the same program.

Ranks that differ would compute without an error, and average gradients of different runs.
"""

import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qa_dist import __version__
from qa_dist.common.errors import ConfigError
from qa_dist.common.hosts import host_name
from qa_dist.config.options import RunConfig
from qa_dist.distributed.ranks import Ranks
from qa_dist.distributed.roll_call import Difference, Member, differences, places, shown
from qa_dist.features.store import FeatureStore
from qa_dist.machine.environment import versions

# Where a machine keeps its copies is its own affair: what is in them is compared. Rank 0 alone writes results.
_OWN_PLACES = ("train_file", "validation_file", "store_dir", "cache_dir", "output_dir")


def require_agreement(
    config: RunConfig, ranks: Ranks, stores: Mapping[str, FeatureStore | None], output_dir: Path | None
) -> list[str]:
    """Notes for the user, as lines, once all ranks are found to train the same run; every rank must call this.

    Args:
        config: This rank's configuration.
        ranks: All ranks of the run.
        stores: This rank's features of each split.
        output_dir: Where rank 0 writes; None: nothing is written, and nobody needs to see the folder.

    Raises:
        ConfigError: On every rank alike: ranks differ in versions, program, configuration or data.
    """
    if ranks.world_size == 1:
        return []
    held = {"launcher strategy": ranks.launch_config.strategy, "launcher settings": ranks.launch_config.settings}
    require_same({**facts(config, stores), **held}, ranks)
    return [] if output_dir is None else without_folder(_sight(ranks, output_dir), output_dir)


def require_same(facts: Mapping[str, Any], ranks: Ranks) -> None:
    """Compare facts of all ranks, by name; the name's first word is a kind that `sentence` knows.

    Raises:
        ConfigError: On every rank alike: they differ.
    """
    own = Member(ranks.rank, host_name(), dict(facts))
    if problems := ranks.broadcast(sentences(ranks.gather(own))):
        raise ConfigError(problems, on_all_ranks=True)


def common_facts() -> dict[str, Any]:
    """What must be the same on all ranks, whatever they do: packages and program."""
    found = {f"package {name}": version for name, version in versions().items() if name != "qa-dist"}
    return {**found, "program": program()}


def facts(config: RunConfig, stores: Mapping[str, FeatureStore | None]) -> dict[str, Any]:
    """What must be the same on all ranks that train, by name."""
    found = common_facts()
    for name, value in config.flat().items():
        if name not in _OWN_PLACES:
            found[f"option --{name}"] = value
    for split, store in stores.items():
        if store is not None:
            found[f"bytes {split}"] = store.ingredients["content_sha256"]
            found[f"tokenizer {split}"] = store.ingredients["tokenizer_sha256"]
            found[f"features {split}"] = store.fingerprint
    return found


def program(package: Path = Path(__file__).parents[1]) -> str:
    """Version of qa_dist and a digest of its modules: a commit would not tell of changes on top of it."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{__version__} with digest {digest.hexdigest()[:12]}"


def sentences(members: Sequence[Member]) -> list[str]:
    """What differs between ranks, a sentence each."""
    found = differences(members)
    # Features differ with whatever they are made from; they are named only where that is the same.
    causes = [difference for difference in found if not difference.name.startswith("features ")]
    return [sentence(difference) for difference in causes or found]


def sentence(difference: Difference) -> str:
    """What differs, where, and what to do."""
    kind, _, name = difference.name.partition(" ")
    subject, remedy = {
        "package": (name, "install the same version on all machines: pip install -c constraints.txt ..."),
        "program": (
            "the code of qa_dist",
            "install the same version on all machines, or check out the same commit without changes",
        ),
        "option": (name, "start all machines with the same command and the same recipe"),
        "launcher": (f"the launcher's {name}", "start all machines with the same launch configuration"),
        "bytes": (f"the content of the {name} data", "copy the same files to all machines"),
        "tokenizer": (f"the tokenizer of the {name} data", "copy the same model folder to all machines"),
        "features": (f"the digest of the {name} features", "give all machines the same data and the same options"),
    }[kind]
    return (
        f"{subject} is {_short(difference.found)} on {difference.where} but {_short(difference.expected)} on "
        f"{difference.first}; {remedy}"
    )


def without_folder(sights: Sequence[tuple[Member, bool]], output_dir: Path) -> list[str]:
    """A line about the machines that do not see rank 0's output folder; none if all do."""
    blind = [member for member, sees in sights if not sees]
    if not blind:
        return []
    return [
        f"note: --output_dir {output_dir} of rank 0 ({sights[0][0].host}) is not seen from {places(blind)}: all "
        "results are written by rank 0, and a resumed run needs rank 0 there again; a shared folder avoids that"
    ]


def _sight(ranks: Ranks, output_dir: Path) -> list[tuple[Member, bool]]:
    """Which ranks see a file that rank 0 has just put into the output folder; on rank 0, empty elsewhere.

    Raises:
        ConfigError: On every rank alike: rank 0 cannot write there.
    """
    # A name that was never asked for is in no cache of a network file system.
    probe = output_dir / f".probe-{secrets.token_hex(8)}"
    problems: list[str] = []
    if ranks.is_main:
        try:
            probe.write_bytes(b"")
        except OSError as error:
            problems = [f"--output_dir {output_dir} cannot be used: {error.strerror}; choose another folder"]
    name, problems = ranks.broadcast((probe.name, problems))
    if problems:
        raise ConfigError(problems, on_all_ranks=True)
    try:
        return ranks.gather((Member(ranks.rank, host_name(), {}), os.path.exists(output_dir / name)))
    finally:
        if ranks.is_main:
            with suppress(OSError):
                probe.unlink()


def _short(value: Any) -> str:
    text = shown(value)
    return f"{text[:12]}..." if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
