"""The soak sees what grows, and nothing else; a short one says that it does not know."""

from collections.abc import Callable

import pytest

pytest.importorskip("psutil", reason="the dev extra is not installed")

from tests.distributed.soak import ALLOWED_GROWTH, WORLD_SIZE, Life, across_lives, courses, within_lives

MIB = 1 << 20
STEADY: dict[str, Callable[[int, int], int]] = {
    # The heap breathes; a save has a file and a thread for a moment.
    "rss_bytes": lambda life, sample: 400 * MIB + (sample % 7) * MIB // 4,
    "handles": lambda life, sample: 21 + (sample % 3 == 0),
    "threads": lambda life, sample: 8 + (sample % 3 == 0),
    "children": lambda life, sample: 0,
}


def lives(num_samples: int = 200, num_lives: int = 8, **changed: Callable[[int, int], int]) -> list[Life]:
    found = []
    for number in range(num_lives):
        life = Life()
        for kind, figure in (STEADY | changed).items():
            life.samples[kind] = [[figure(number, sample) for sample in range(num_samples)] for _ in range(WORLD_SIZE)]
        found.append(life)
    return found


def growing(found: dict[str, dict[str, object]]) -> list[str]:
    assert set(found) == set(ALLOWED_GROWTH)
    return [kind for kind, figures in found.items() if figures["grows"]]


def test_what_goes_up_and_down_does_not_grow() -> None:
    for found in (within_lives(lives()), across_lives(lives())):
        assert all(figures["grows"] is False for figures in found.values())


@pytest.mark.parametrize(
    ("kind", "leak"),
    [
        ("rss_bytes", lambda life, sample: 400 * MIB + sample * MIB // 16),
        ("handles", lambda life, sample: 21 + sample // 50),
        ("threads", lambda life, sample: 8 + sample // 50),
        ("children", lambda life, sample: sample // 50),
    ],
)
def test_a_leak_within_lives_is_seen(kind: str, leak: Callable[[int, int], int]) -> None:
    assert growing(within_lives(lives(**{kind: leak}))) == [kind]
    assert growing(across_lives(lives(**{kind: leak}))) == []


def test_growth_from_life_to_life_is_seen() -> None:
    found = lives(rss_bytes=lambda life, sample: (400 + 2 * life) * MIB, handles=lambda life, sample: 21 + life // 4)
    assert growing(across_lives(found)) == ["rss_bytes", "handles"]
    assert growing(within_lives(found)) == []


def test_too_little_is_not_flat() -> None:
    assert all(figures["grows"] is None for figures in within_lives(lives(num_samples=30)).values())
    assert all(figures["grows"] is None for figures in across_lives(lives(num_lives=2)).values())


def test_the_course_of_a_leak_is_shown() -> None:
    (found,) = courses(lives(num_lives=1, num_samples=100, rss_bytes=lambda life, sample: sample * MIB))
    assert found["rss_bytes"] == [[pytest.approx((29.5 + 20 * part) * MIB) for part in range(4)]] * WORLD_SIZE
    assert courses(lives(num_samples=30)) == []
