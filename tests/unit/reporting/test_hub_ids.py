"""Names on the hub: what its own library takes, and what it refuses."""

import itertools

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from qa_dist import card, publish
from qa_dist.reporting.hub_ids import HUB_ID
from tests.refusals import refusal

IMPOSSIBLE = ["me/x--y", "me/m\u00f6del", "me/x.git", "me/x.", "me/x-", "me/.x", "me/-x", "me/x..y", f"me/{'x' * 97}"]


def is_taken(name: str) -> bool:
    """Whether the hub's library takes a name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def test_ids_are_what_the_hubs_library_takes() -> None:
    pieces = ("", "a", "_", "-", ".", "/", "git", "\u00f6", "9" * 95, "\n")
    names = {"".join(parts) for count in range(1, 6) for parts in itertools.product(pieces, repeat=count)}
    different = [name for name in sorted(names) if (HUB_ID.fullmatch(name) is not None) != is_taken(name)]
    assert different == []
    assert sum(map(is_taken, names)) > 100
    assert not any(map(is_taken, IMPOSSIBLE))


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_names_that_cannot_exist_are_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for main, part in ((card.main, "is not a hub id"), (publish.main, "is not the name of a repository")):
        said = refusal(main, ["some/run", "--repo_id", name], capsys)
        assert f"--repo_id: {name!r} {part}, such as me/model: names have at most 96 characters of" in said
    said = refusal(publish.main, ["some/run", "--repo_id", "me/x", "--base_model", name, "--dry_run"], capsys)
    assert f"--base_model: {name!r} is not a hub id" in said
