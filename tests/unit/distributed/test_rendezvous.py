"""What a library's error about the network comes down to."""

import pytest

from qa_dist.distributed.rendezvous import _first_words

FRAMES = "\nException raised from listen at socket.cpp:500\nframe #0: c10::Error::Error(...)\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[enforce fail at pair.cc:81] bad file descriptor" + FRAMES, "bad file descriptor"),
        ("NCCL error in: NCCLUtils.cpp:94\nLast error:\nDuplicate GPU detected\nsome more", "Duplicate GPU detected"),
        ("connect failed " * 13 + "to [host-a.example.org]:29500, try again", "connect failed " * 13 + "to ..."),
    ],
)
def test_the_cause_is_named_without_the_source_and_cut_between_words(text: str, words: str) -> None:
    assert _first_words(RuntimeError(text)) == words
