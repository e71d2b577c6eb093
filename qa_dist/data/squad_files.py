"""Questions written as plain SQuAD JSON."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qa_dist.common.errors import ConfigError
from qa_dist.common.files import staged
from qa_dist.data.records import Example


def write_squad(examples: Sequence[Example], path: Path, *, version_2: bool) -> None:
    """Write examples as SQuAD JSON, compressed if the name ends in .gz; equal examples give equal bytes.

    Raises:
        ConfigError: The file cannot be written.
    """
    content = (json.dumps(squad_json(examples, version_2=version_2), ensure_ascii=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as aside:
            # Without a time, so that equal data give equal bytes.
            aside.write_bytes(gzip.compress(content, mtime=0) if path.suffix.lower() == ".gz" else content)
    except OSError as error:
        raise ConfigError([f"{path} cannot be written: {error.strerror or error}; choose another place"]) from error


def squad_json(examples: Sequence[Example], *, version_2: bool) -> dict[str, Any]:
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
