"""An example and its tokens as lines for a terminal."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qa_dist.answering.sentences import printable
from qa_dist.answering.terminal import Style
from qa_dist.reporting.columns import aligned, bright, dim

_BEGIN, _END = "\x02", "\x03"
"""Stand for the colours of an answer until lines are cut; printable text holds neither."""

_INDENT = " " * 10
_LONGEST_BAR = 16


def example_lines(described: Mapping[str, Any], style: Style) -> Iterator[str]:
    """The lines of what `examples.example_view` gives, with the `split`; answers in colour where there are colours."""
    example = described["example"]
    yield f"example {example['index']:,} of {example['num_examples']:,} ({described['split']})"
    yield from _field("id", printable(example["id"]), style)
    if example["title"]:
        yield from _field("title", printable(example["title"]), style)
    yield from _field("question", printable(example["question"]), style)
    yield from _field("context", _marked(example), style)
    for answer in example["answers"]:
        place = f"characters {answer['start_char']} to {answer['end_char']}"
        yield from _field("answer", f"{_quoted(answer['text'])} at {place}", style)
    for text in example["other_texts"]:
        yield from _field("answer", f"{_quoted(text)}, at no known place", style)
    if example["is_unanswerable"]:
        yield from _field("answer", "none: the text does not say", style)
    elif not example["has_references"]:
        yield from _field("answer", "nothing is known of it", style)
    number = described["num_windows"]
    yield (
        f"{number:,} window{'s' if number > 1 else ''} of at most {described['max_seq_length']} tokens, of which "
        f"consecutive ones share {described['doc_stride']}; nothing is padded, so the mask is 1 for every token"
    )
    for feature in described["features"]:
        yield ""
        yield from _feature(feature, number, style)
    if "answers" in described:
        yield ""
        yield from _answers(described, style)


def _field(name: str, text: str, style: Style) -> list[str]:
    """A printable text, in which marks may be, as lines behind its name."""
    lines = textwrap.wrap(
        text,
        style.width,
        initial_indent=f"{name:<{len(_INDENT)}}",
        subsequent_indent=_INDENT,
        break_on_hyphens=False,
    )
    begin, end = bright("|", has_colours=True).split("|") if style.has_colours else ("[", "]")
    coloured = []
    is_open = False
    for line in lines:
        # A colour would go on in the indentation of the next line.
        text = f"{_INDENT}{_BEGIN}{line[len(_INDENT) :]}" if is_open and style.has_colours else line
        is_open = text.rfind(_BEGIN) > text.rfind(_END)
        text += _END if is_open and style.has_colours else ""
        coloured.append(text.replace(_BEGIN, begin).replace(_END, end))
    return coloured


def _marked(example: Mapping[str, Any]) -> str:
    """The context, printable, with the first place of an answer between marks."""
    context = example["context"]
    if not example["answers"]:
        return printable(context)
    start, end = example["answers"][0]["start_char"], example["answers"][0]["end_char"]
    before, answer, after = map(printable, (context[:start], context[start:end], context[end:]))
    return f"{before}{_BEGIN}{answer}{_END}{after}"


def _feature(feature: Mapping[str, Any], num_windows: int, style: Style) -> Iterator[str]:
    yield (
        f"feature {feature['feature']:,}: window {feature['window'] + 1} of {num_windows}, "
        f"{feature['num_tokens']} tokens"
    )
    first, last = feature["start_token"], feature["end_token"]
    if first is None:
        yield "label: nothing is known"
    elif not feature["has_answer"]:
        yield f"label: no answer in this window, so token {first} ({printable(feature['decoded'])}) is start and end"
    else:
        yield (
            f"label: start {first}, end {last}; these tokens decode to {_quoted(feature['decoded'])}, and stand for "
            f"{_quoted(feature['text'])}"
        )
    rows: list[tuple[str, ...]] = [("#", "id", "piece", "type", "part", "characters", "label")]
    rows += [
        (
            f"{token['position']}",
            f"{token['id']}",
            token["piece"],
            f"{token['type']}",
            token["part"],
            "" if token["start_char"] is None else f"{token['start_char']}-{token['end_char']}",
            token["label"] or "",
        )
        for token in feature["tokens"]
    ]
    if "start_logit" in feature["tokens"][0]:
        rows = [(*row, *more) for row, more in zip(rows, _logits(feature["tokens"]), strict=True)]
    heading, *lines = aligned(rows, left=(2, 4, 6, 8, 10))
    yield dim(heading, has_colours=style.has_colours)
    for token, line in zip(feature["tokens"], lines, strict=True):
        is_answer = first is not None and first <= token["position"] <= last
        if is_answer:
            yield bright(line, has_colours=style.has_colours)
        else:
            yield line if token["part"] == "context" else dim(line, has_colours=style.has_colours)


def _logits(tokens: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells for a heading and each token: both logits with bars, as long as the logit is above the window's lowest."""
    columns: list[list[str]] = []
    for name in ("start", "end"):
        logits = [token[f"{name}_logit"] for token in tokens]
        lowest, highest = min(logits), max(logits)
        scale = _LONGEST_BAR / (highest - lowest) if highest > lowest else 0.0
        columns.append([name, *(f"{logit:.2f}" for logit in logits)])
        columns.append(["", *("#" * round((logit - lowest) * scale) for logit in logits)])
    return list(zip(*columns, strict=True))


def _answers(described: Mapping[str, Any], style: Style) -> Iterator[str]:
    answers = described["answers"]
    yield f"the {len(answers)} best answers of {printable(described['adapter'])} from all windows"
    rows = [("", "probability", "score", "characters", "text")]
    for number, each in enumerate(answers, 1):
        is_none = each["start_char"] < 0
        rows.append(
            (
                f"{number}",
                f"{each['probability']:.4f}",
                f"{each['score']:.3f}",
                "" if is_none else f"{each['start_char']}-{each['end_char']}",
                "no answer" if is_none else _quoted(each["text"]),
            )
        )
    for number, line in enumerate(aligned(rows, left=(3, 4))):
        is_chosen = number and answers[number - 1]["is_chosen"]
        yield bright(line, has_colours=style.has_colours) if is_chosen else line


def _quoted(text: str) -> str:
    return f'"{printable(text)}"'
