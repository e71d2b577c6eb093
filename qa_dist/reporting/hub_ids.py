"""Names on the Hugging Face hub, and how command lines give them."""

import argparse
import re

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
HUB_ID = re.compile(f"{_PART}(/{_PART})?")


def hub_id(text: str) -> str:
    """The id of a model or data set.

    Raises:
        ArgumentTypeError: It is none.
    """
    if not HUB_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a hub id, such as me/model")
    return text


def repository(text: str) -> str:
    """The id of a repository that belongs to somebody.

    Raises:
        ArgumentTypeError: It is none.
    """
    if "/" not in text or not HUB_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a repository, such as me/model")
    return text
