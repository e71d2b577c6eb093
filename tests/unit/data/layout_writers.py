"""Questions in every layout, as other programs write them."""

import csv
import io
import json
from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]


def _qas(rows: Rows, **names: str) -> Rows:
    return [
        {
            "id": row["id"],
            "question": row["question"],
            names.get("answers", "answers"): [
                {"text": text, "answer_start": start} for text, start in zip(*row["answers"].values(), strict=True)
            ],
        }
        for row in rows
    ]


def squad(rows: Rows) -> str:
    paragraphs = [{"context": row["context"], "qas": _qas([row])} for row in rows]
    return json.dumps({"version": "1.1", "data": [{"title": 41, "paragraphs": paragraphs}]})


def paragraphs(rows: Rows) -> str:
    return json.dumps([{"context": row["context"], "qas": _qas([row])} for row in rows])


def lines(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def scalars(rows: Rows) -> str:
    """One object of a text and an offset, where there is one answer."""
    pairs = [(row, row["answers"]["text"], row["answers"]["answer_start"]) for row in rows]
    return lines(
        [
            {
                **row,
                "answers": {"text": texts[0], "answer_start": str(starts[0])} if len(texts) == 1 else row["answers"],
            }
            for row, texts, starts in pairs
        ]
    )


def columns(rows: Rows) -> str:
    return json.dumps({name: {str(i): row[name] for i, row in enumerate(rows)} for name in rows[0]})


def lists(rows: Rows) -> str:
    return json.dumps({name: [row[name] for row in rows] for name in rows[0]})


def split_orient(rows: Rows) -> str:
    return json.dumps({"columns": [*rows[0]], "index": [*range(len(rows))], "data": [[*row.values()] for row in rows]})


def by_index(rows: Rows) -> str:
    return json.dumps({str(number): row for number, row in enumerate(rows)})


def table(rows: Rows) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["", *rows[0]])
    writer.writeheader()
    writer.writerows({"": number, **row} for number, row in enumerate(rows))
    return text.getvalue()


def python_cells(rows: Rows) -> str:
    return table([{**row, "answers": repr(row["answers"])} for row in rows])


def numpy_cells(rows: Rows) -> str:
    def cell(answers: dict[str, Any]) -> str:
        starts = [float(start) for start in answers["answer_start"]]
        return f"{{'text': array({answers['text']!r}, dtype=object), 'answer_start': array({starts!r})}}"

    return table([{**row, "answers": cell(row["answers"])} for row in rows])


def json_cells(rows: Rows) -> str:
    return table([{**row, "answers": json.dumps(row["answers"])} for row in rows])


def flat_cells(rows: Rows) -> str:
    def cells(row: dict[str, Any]) -> dict[str, Any]:
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        return {
            **{name: value for name, value in row.items() if name != "answers"},
            "answer_text": json.dumps(texts) if len(texts) != 1 else texts[0],
            "answer_start": json.dumps(starts) if len(starts) != 1 else f"{starts[0]}.0",
        }

    return table([cells(row) for row in rows])


def mrqa(rows: Rows) -> str:
    def context(row: dict[str, Any]) -> dict[str, Any]:
        pairs = list(zip(*row["answers"].values(), strict=True))
        spans = [{"text": text, "char_spans": [[start, start + len(text) - 1]]} for text, start in pairs]
        qa = {"qid": row["id"], "id": "other", "question": row["question"], "answers": row["answers"]["text"]}
        return {"id": "", "context": row["context"], "qas": [{**qa, "detected_answers": spans}]}

    return lines([{"header": {"dataset": "Own"}}, *map(context, rows)])


def hub_mrqa(rows: Rows) -> str:
    def flat(row: dict[str, Any]) -> dict[str, Any]:
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        spans = [{"start": [start], "end": [start + len(text) - 1]} for text, start in zip(texts, starts, strict=True)]
        return {
            **{"subset": "Own", "qid": row["id"], "question": row["question"], "context": row["context"]},
            **{"answers": texts, "detected_answers": {"text": texts, "char_spans": spans}},
        }

    return lines([flat(row) for row in rows])


def _marks(row: dict[str, Any]) -> Rows:
    return [
        {"start": start, "end": start + len(text), "text": text, "labels": ["answer"]}
        for text, start in zip(*row["answers"].values(), strict=True)
    ]


def label_studio(rows: Rows) -> str:
    return json.dumps(
        [
            {
                "id": row["id"],
                "data": {"text": row["context"], "question": row["question"]},
                "annotations": [
                    {"was_cancelled": True, "result": [{"value": {"start": 0, "end": 1, "text": "no"}}]},
                    {"result": [{"type": "labels", "value": mark} for mark in _marks(row)]},
                    {"result": [{"type": "choices", "value": {"choices": ["good"]}}]},
                ],
            }
            for row in rows
        ]
    )


def json_min(rows: Rows) -> str:
    return json.dumps(
        [{"id": row["id"], "text": row["context"], "question": row["question"], "answer": _marks(row)} for row in rows]
    )


def korquad2(rows: Rows) -> str:
    return json.dumps(
        {
            "version": "KorQuAD_2.0",
            "data": [
                {
                    "title": "t",
                    "url": "",
                    "raw_html": "",
                    "context": row["context"],
                    "qas": _qas([row], answers="answer"),
                }
                for row in rows
            ],
        }
    )


WRITERS: dict[str, tuple[str, Callable[[Rows], str], bool]] = {
    "SQuAD": ("a.json", squad, True),
    "paragraphs": ("a.json", paragraphs, True),
    "JSONL": ("a.jsonl", lines, True),
    "scalars": ("a.jsonl", scalars, True),
    "by column": ("a.json", columns, True),
    "lists by column": ("a.json", lists, True),
    "pandas' split": ("a.json", split_orient, True),
    "by index": ("a.json", by_index, True),
    "Python in cells": ("a.csv", python_cells, True),
    "numpy in cells": ("a.csv", numpy_cells, True),
    "JSON in cells": ("a.csv", json_cells, True),
    "flat cells": ("a.csv", flat_cells, True),
    # These know no empty list of answers, or not in this way.
    "MRQA": ("a.jsonl", mrqa, False),
    "MRQA of the hub": ("a.jsonl", hub_mrqa, False),
    "Label Studio": ("a.json", label_studio, True),
    "JSON-MIN": ("a.json", json_min, False),
    "KorQuAD 2": ("a.json", korquad2, True),
}
