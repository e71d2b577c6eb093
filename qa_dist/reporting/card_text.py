"""The sections of a model card: how to load it, its data, its results, its training; as lines of Markdown."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from qa_dist.common.parsers import is_number
from qa_dist.model.calibration import read_calibration
from qa_dist.reporting.run_record import RunRecord, Source
from qa_dist.reporting.slices import SLICINGS

_LEFT_OUT = ("title",)
"""Slicings that say more of the data than of the model."""

_TRAINING = {
    "tuning": "tuning",
    "quantization": "quantisation of the frozen layers",
    "lora_r": "rank of the adapters",
    "lora_alpha": "alpha of the adapters",
    "lora_target_modules": "layers with adapters",
    "learning_rate": "highest learning rate",
    "lr_scheduler_type": "schedule",
    "global_batch_size": "features per step",
    "num_train_epochs": "epochs",
    "optim": "optimiser",
    "mixed_precision": "mixed precision",
    "seed": "seed",
}
_ABOUT_LORA = ("lora_r", "lora_alpha", "lora_target_modules", "quantization")
_VERSIONS = ("qa-dist", "torch", "transformers", "peft")


def code(text: str) -> str:
    """Text of others as code in a line or a cell of Markdown."""
    shown = "".join(each if each.isprintable() and each not in "`|" else "?" for each in text)
    return f"`{shown}`"


def named(source: Source) -> str:
    """The name of a model or data set in Markdown."""
    return code(source.name)


def usage_lines(name: str, base: Source | None, *, is_adapter: bool, revision: str = "main") -> Iterator[str]:
    """How to load the model.

    Args:
        name: Its hub id, or the name of its folder.
        base: The model below an adapter.
        is_adapter: Whether it is one.
        revision: That of the base model.
    """
    here = json.dumps(name, ensure_ascii=False)
    yield from ("## How to use it", "", "```python", "import qa_dist")
    yield from ("", f"reader = qa_dist.Reader({here})")
    yield 'print(reader.answer("When was the mill built?", "Ada Kerrow built the mill in 1911.").text)'
    yield from ("```", "")
    yield "This takes texts of any length, and cuts long ones into windows."
    if is_adapter and (base is None or base.name.startswith("package:")):
        yield ""
        return
    yield from ("Without qa_dist, for texts that fit into one window:", "", "```python")
    of_base = json.dumps(base.name, ensure_ascii=False) if base else ""
    if base and base.hub_id is not None and revision != "main":
        of_base += f", revision={json.dumps(revision, ensure_ascii=False)}"
    if is_adapter:
        yield "from peft import PeftModel"
    yield from ("from transformers import AutoModelForQuestionAnswering, AutoTokenizer", "")
    if is_adapter:
        yield f"model = AutoModelForQuestionAnswering.from_pretrained({of_base})"
        yield f"model = PeftModel.from_pretrained(model, {here}).merge_and_unload()"
    else:
        yield f"model = AutoModelForQuestionAnswering.from_pretrained({here})"
    yield from (f"tokenizer = AutoTokenizer.from_pretrained({here})", "```", "")
    if is_adapter and base and base.hub_id is None:
        yield f"{named(base)} was a folder where this was trained: put the path of a copy there."
        yield ""


def data_lines(run: RunRecord) -> Iterator[str]:
    """What the model was trained and evaluated on; nothing where that is not known."""
    rows = [
        f"| {split} | {named(found)} | {_count(counts, 'num_examples')} | {_count(counts, 'num_unanswerable')} "
        f"| {_count(counts, 'num_features')} |"
        for split in _SPLITS
        for found, counts in [(run.data(split), run.counts(split))]
        if found is not None
    ]
    if not rows:
        return
    yield from ("## Data", "", "| split | name | questions | without an answer | windows |", "|---|---|---|---|---|")
    yield from (*rows, "")
    length, stride = run.config.get("max_seq_length"), run.config.get("doc_stride")
    if is_number(length) and is_number(stride):
        yield f"Windows have at most {length} tokens, of which consecutive ones share {stride}."
    best = run.ceiling()
    if best is not None:
        yield (
            f"With this tokenizer and these lengths no model can exceed exact match {best.exact_match:.2f} and "
            f"F1 {best.f1:.2f} on the validation data."
        )
    yield ""


_SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")


def result_lines(run: RunRecord, analysis: Mapping[str, Any] | None) -> Iterator[str]:
    """Scores; with an analysis also their intervals, and those of slices."""
    scores = run.scores or ({key: analysis[key]["value"] for key in ("exact_match", "f1")} if analysis else {})
    if not scores:
        return
    yield from ("## Results", "")
    rules = scores.get("answer_normalization")
    whose = f"the rules {code(rules)}" if isinstance(rules, str) and rules != "squad" else "SQuAD's official rules"
    yield f"Scores are in percent, by {whose}."
    if analysis is None:
        total = scores.get("num_examples")
        yield from ("", "| questions | exact match | F1 |", "|---|---|---|")
        shown = f"{total:,}" if is_number(total) else ""
        yield from (f"| {shown} | {scores['exact_match']:.2f} | {scores['f1']:.2f} |", "")
        return
    yield (
        f"Intervals hold {100 * analysis['level']:.0f} %: a bootstrap of {analysis['num_resamples']:,} resamples over "
        f"the {analysis['num_contexts']:,} contexts."
    )
    if analysis["warning"]:
        yield f"They are too narrow: {analysis['warning']}."
    yield from ("", "| questions | exact match | | F1 | |", "|---|---|---|---|---|")
    yield from (f"| {analysis['num_questions']:,} | {_cells(analysis)} |", "")
    slices = [each for each in analysis["slices"] if each["by"] not in _LEFT_OUT]
    for by in dict.fromkeys(each["by"] for each in slices):
        yield from (
            f"By {SLICINGS[by]}:",
            "",
            "| | questions | exact match | | F1 | | |",
            "|---|---|---|---|---|---|---|",
        )
        for each in slices:
            if each["by"] == by:
                yield f"| {_plain(each['value'])} | {each['n']:,} | {_cells(each)} | {each['warning'] or ''} |"
        yield ""


def calibration_lines(run: RunRecord) -> Iterator[str]:
    """The threshold and the temperature that were tuned for the model, and on what; nothing without any.

    Raises:
        UserError: calibration.json cannot be used.
    """
    found = read_calibration(run.folder)
    if found is None:
        return
    yield from (
        "## Confidence",
        "",
        "What suits the model is in `calibration.json`, where `qa_dist.Reader` finds it:",
        "",
    )
    yield from (f"- {_plain(line)}" for line in found.lines())
    yield ""


def training_lines(run: RunRecord) -> Iterator[str]:
    """How it was trained; nothing where that is not known."""
    not_used = _ABOUT_LORA if run.config.get("tuning") == "full" else ()
    if run.config.get("max_train_steps") is not None:
        # The steps decided, whatever the epochs.
        not_used = (*not_used, "num_train_epochs")
    rows = [
        f"| {label} | {_plain(', '.join(map(str, value)) if isinstance(value, list) else str(value))} |"
        for key, label in _TRAINING.items()
        for value in [run.config.get(key)]
        if value is not None and key not in not_used
    ]
    steps, size, parameters = (run.run.get(key) for key in ("weights_of_step", "world_size", "parameters"))
    if is_number(steps):
        rows.append(f"| optimiser steps | {steps:,} |")
    if is_number(size):
        rows.append(f"| processes | {size:,} |")
    if isinstance(parameters, dict) and all(is_number(parameters.get(key)) for key in ("trainable", "total")):
        rows.append(f"| trained parameters | {parameters['trainable']:,} of {parameters['total']:,} |")
    if not rows:
        return
    yield from ("## Training", "", "| | |", "|---|---|", *rows, "")
    versions = run.run.get("versions")
    found = versions if isinstance(versions, dict) else {}
    listed = [f"{name} {_plain(str(found[name]))}" for name in _VERSIONS if isinstance(found.get(name), str)]
    if listed:
        yield f"Made with {', '.join(listed)}."
        yield ""


def _cells(scored: Mapping[str, Any]) -> str:
    cells = []
    for key in ("exact_match", "f1"):
        score = scored[key]
        low, high = score["low"], score["high"]
        ends = "one context" if low is None or high is None else f"{low:.2f} to {high:.2f}"
        cells += [f"{score['value']:.2f}", ends]
    return " | ".join(cells)


def _count(counts: Mapping[str, Any], key: str) -> str:
    value = counts.get(key)
    return f"{value:,}" if is_number(value) else ""


def _plain(text: str) -> str:
    """Text of others for a cell of Markdown that is shown as it is."""
    shown = "".join(each if each.isprintable() else "?" for each in text)
    return "".join(f"\\{each}" if each in "\\`*_[]<>|#" else each for each in shown)
