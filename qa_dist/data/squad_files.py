"""Questions written as plain SQuAD JSON."""

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qa_dist.common.errors import ConfigError
from qa_dist.common.files import require_writable, staged, staged_together

if TYPE_CHECKING:
    from qa_dist.data.records import Example


def new_squad_file(name: str) -> Path:
    """The path of a file of SQuAD JSON that a command is to write, with `~` as shells read it.

    Raises:
        ConfigError: There is something under that name, none can be written there, or it would not be read as JSON.
    """
    path = Path(os.path.expanduser(name))
    if os.path.lexists(path):
        raise ConfigError([f"{path} exists already; name a file that does not"])
    if name.endswith(os.sep) or not path.name.lower().endswith((".json", ".json.gz")):
        raise ConfigError([f"{name} is to hold SQuAD JSON; name a file that ends in .json or .json.gz"])
    require_writable(path.parent, f"{path}: its folder")
    return path


def write_squad(examples: "Sequence[Example]", path: Path, *, version_2: bool) -> None:
    """Write examples as SQuAD JSON, compressed if the name ends in .gz; equal examples give equal bytes.

    Raises:
        ConfigError: The file cannot be written.
    """
    with _refusals_named(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as aside:
            aside.write_bytes(_content(examples, path, version_2=version_2))


def write_squad_parts(parts: "Mapping[Path, Sequence[Example]]", *, version_2: bool) -> None:
    """Write examples by the file that they go to, as `write_squad` does: all files, none of which exists, or none.

    Raises:
        ConfigError: One of the files cannot be written.
    """
    paths = list(parts)
    with _refusals_named(" and ".join(map(str, paths))):
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        with staged_together(paths) as asides:
            for path, aside in zip(paths, asides, strict=True):
                with _refusals_named(str(path)):
                    aside.write_bytes(_content(parts[path], path, version_2=version_2))


def _content(examples: "Sequence[Example]", path: Path, *, version_2: bool) -> bytes:
    content = (json.dumps(squad_json(examples, version_2=version_2), ensure_ascii=False) + "\n").encode()
    # Without a time, so that equal data give equal bytes.
    return gzip.compress(content, mtime=0) if path.suffix.lower() == ".gz" else content


@contextmanager
def _refusals_named(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError([f"{name} cannot be written: {error.strerror or error}; choose another place"]) from error


def squad_json(examples: "Sequence[Example]", *, version_2: bool) -> dict[str, Any]:
    """The examples in the layout of SQuAD v1.1, or of v2.0 with `is_impossible`.

    Neighbours of one title share an article and neighbours of one context a paragraph. A reference without a place has
    `answer_start` -1; a question whose answers are not known has no `answers`.
    """
    articles: list[dict[str, Any]] = []
    for example in examples:
        if not articles or articles[-1]["title"] != example.title:
            articles.append({"title": example.title, "paragraphs": []})
        paragraphs = articles[-1]["paragraphs"]
        if not paragraphs or paragraphs[-1]["context"] != example.context:
            paragraphs.append({"context": example.context, "qas": []})
        qa: dict[str, Any] = {"id": example.id, "question": example.question}
        if example.has_references:
            qa["answers"] = [
                *({"text": answer.text, "answer_start": answer.start_char} for answer in example.answers),
                *({"text": text, "answer_start": -1} for text in example.other_texts),
            ]
            if version_2:
                qa["is_impossible"] = example.is_unanswerable
        paragraphs[-1]["qas"].append(qa)
    return {"version": "v2.0" if version_2 else "1.1", "data": articles}
