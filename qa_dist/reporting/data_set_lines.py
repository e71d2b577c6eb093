"""A data set and its ceiling as lines for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from qa_dist.answering.sentences import printable
from qa_dist.answering.terminal import Style
from qa_dist.evaluation.limits import unsearched_note
from qa_dist.reporting.columns import aligned, bright, dim
from qa_dist.reporting.data_set import LENGTHS, QUANTILES, WHY_NOT

_LONGEST_BAR = 40
_LONGEST_TEXT = 70


def data_set_lines(summary: Mapping[str, Any], style: Style) -> Iterator[str]:
    """The lines of what `data_set.data_set_view` gives, with the `split`."""
    yield (
        f"{summary['split']}: {summary['num_examples']:,} questions about {summary['num_contexts']:,} contexts, "
        f"{summary['num_features']:,} features of at most {summary['max_seq_length']} tokens that share "
        f"{summary['doc_stride']}, {summary['num_tokens']:,} tokens"
    )
    yield f"without an answer: {summary['num_unanswerable']:,} ({_percent(summary['unanswerable_share'])})"
    for name, what in (
        ("num_without_references", "whose answers are not known"),
        ("num_truncated_questions", "cut to fit a window"),
        ("num_unlabelled_examples", "with answers that no window holds as a whole"),
    ):
        if summary[name]:
            yield f"questions {what}: {summary[name]:,}"
    unknown = _percent(summary["unknown_token_share"])
    yield f"unknown tokens ({summary['unknown_token']}): {unknown} of the context tokens"
    yield from _shares("answers per question", summary["answers_per_question"], summary["num_examples"], style)
    yield from _shares("windows per question", summary["windows_per_example"], summary["num_examples"], style)
    yield from _shares("question words (English)", summary["question_words"], summary["num_examples"], style)
    yield from _lengths(summary["lengths"], style)
    yield from _ceiling(summary["ceiling"], style)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _shares(heading: str, counts: Mapping[str, int], total: int, style: Style) -> Iterator[str]:
    yield ""
    yield bright(heading, has_colours=style.has_colours)
    rows = [(name, f"{count:,}", _percent(count / max(1, total))) for name, count in counts.items()]
    yield from aligned(rows, left=(0,), indent=2) if rows else ()


def _lengths(lengths: Mapping[str, Mapping[str, Any]], style: Style) -> Iterator[str]:
    names = ("min", *QUANTILES, "max")
    rows = [("", "n", "mean", *names)]
    rows += [
        (LENGTHS[name], f"{each['n']:,}", f"{each['mean']:.1f}", *(f"{each[end]:,}" for end in names))
        for name, each in lengths.items()
        if each["n"]
    ]
    yield ""
    yield bright("lengths in tokens", has_colours=style.has_colours)
    yield from aligned(rows, left=(0,), indent=2)
    for name, each in lengths.items():
        if each["n"]:
            yield dim(f"  {LENGTHS[name]}", has_colours=style.has_colours)
            yield from _histogram(each["histogram"])


def _histogram(bins: list[Mapping[str, int]]) -> Iterator[str]:
    most = max(each["n"] for each in bins)
    rows = []
    for each in bins:
        span = f"{each['first']}" if each["first"] == each["last"] else f"{each['first']}-{each['last']}"
        # What occurs at all is seen.
        rows.append((span, f"{each['n']:,}", "#" * -(-each["n"] * _LONGEST_BAR // most)))
    yield from aligned(rows, left=(0, 2), indent=4)


def _ceiling(best: Mapping[str, Any] | None, style: Style) -> Iterator[str]:
    yield ""
    yield bright("ceiling", has_colours=style.has_colours)
    if best is None:
        yield "  no answers are known"
        return
    yield (
        f"  at best EM {best['exact_match']:.2f}, F1 {best['f1']:.2f} with this tokenizer, these windows and answers "
        f"of at most {best['max_answer_length']} tokens, scored by {best['answer_normalization']}"
    )
    if best["num_unsearched"]:
        yield f"  {unsearched_note(best['num_unsearched'], best['num_examples'])}"
    for reason, count in best["reasons"].items():
        yield f"  {count:,} of {best['num_examples']:,} questions have answers that {WHY_NOT[reason]}"
        for each in best["examples"][reason]:
            answers = " | ".join(_cut(text) for text in each["answers"]) or "no answer"
            yield f"    {_cut(each['id'])}: {_cut(each['question'])}"
            yield dim(f"      {answers} (best F1 {each['best_f1']:.1f})", has_colours=style.has_colours)


def _cut(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 3]}..."
