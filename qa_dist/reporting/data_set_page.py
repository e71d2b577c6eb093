"""A data set and its ceiling as a page, in the style of the report about runs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qa_dist.evaluation.limits import unsearched_note
from qa_dist.reporting.data_set import LENGTHS, QUANTILES, WHY_NOT
from qa_dist.reporting.drawings import histogram
from qa_dist.reporting.pages import rendered


class Share(NamedTuple):
    """How many of something there are: its name, the number, and the share from 0 to 1."""

    name: str
    number: int
    share: float


class Length(NamedTuple):
    """Lengths of one kind: their name, the numbers of a table, and their histogram as an element."""

    name: str
    numbers: Mapping[str, Any]
    svg: str


def data_set_page(summary: Mapping[str, Any]) -> str:
    """The page about what `data_set.data_set_view` gives, with the `split` and the `source`: the same for the same."""
    total = max(1, summary["num_examples"])
    best = summary["ceiling"]

    def shares(counts: Mapping[str, int]) -> list[Share]:
        return [Share(name, count, count / total) for name, count in counts.items()]

    return rendered(
        "data_set.html",
        {
            "found": summary,
            "figures": _figures(summary),
            "counts": {
                "Answers of a question": shares(summary["answers_per_question"]),
                "Windows of a question": shares(summary["windows_per_example"]),
                "Question words (English)": shares(summary["question_words"]),
            },
            "quantiles": ("min", *QUANTILES, "max"),
            "lengths": [
                Length(LENGTHS[name], each, histogram(each["histogram"], f"lengths of {LENGTHS[name]} in tokens"))
                for name, each in summary["lengths"].items()
                if each["n"]
            ],
            "reasons": WHY_NOT,
            "unsearched": unsearched_note(best["num_unsearched"], best["num_examples"]) if best else "",
        },
        {"share": lambda value: f"{100 * value:.2f} %"},
    )


def _figures(summary: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    """What stands at the top: name, figure, and what is to be said of it."""
    best = summary["ceiling"]
    without = f"{100 * summary['unanswerable_share']:.2f} %"
    rows = [
        ("Questions", f"{summary['num_examples']:,}", f"about {summary['num_contexts']:,} contexts"),
        ("Features", f"{summary['num_features']:,}", f"of at most {summary['max_seq_length']} tokens"),
        ("Tokens", f"{summary['num_tokens']:,}", "without padding"),
        ("Without an answer", f"{summary['num_unanswerable']:,}", without),
        ("Unknown tokens", f"{100 * summary['unknown_token_share']:.2f} %", "of the context tokens"),
    ]
    if best is not None:
        rows.append(("At best", f"F1 {best['f1']:.2f}", f"exact match {best['exact_match']:.2f}"))
    return rows
