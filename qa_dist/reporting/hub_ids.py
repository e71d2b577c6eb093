"""Names on the Hugging Face hub, and how command lines give them.

The rules are those of `huggingface_hub.utils.validate_repo_id`; a mistake in a flag does not wait for that library.
"""

import argparse
import re

_PART = r"\w(?:[\w.-]{0,94}\w)?"
HUB_ID = re.compile(rf"(?!.*(?:--|\.\.))(?!.*\.git\Z)(?:{_PART}/)?{_PART}", re.ASCII)
"""An id: a name, or two with a slash between them."""

_RULE = (
    "names have at most 96 characters of A-Z a-z 0-9 _ - . and neither - nor . at an end, -- or .. inside, or .git last"
)


def hub_id(text: str) -> str:
    """The id of a model or data set.

    Raises:
        ArgumentTypeError: It is none.
    """
    if not HUB_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a hub id, such as me/model: {_RULE}")
    return text


def repository(text: str) -> str:
    """The id of a repository that belongs to somebody.

    Raises:
        ArgumentTypeError: It is none.
    """
    if "/" not in text or not HUB_ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a repository, such as me/model: {_RULE}")
    return text
