"""The model card of a run: the hub's metadata, and a text on what the model is, how to load it and how good it is.

Everything in it is measured, or an option of the run; what is not known is left out. Paths are reduced to names, and
what looks like a secret is masked.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_dist.common.errors import ConfigError, DataError
from qa_dist.common.files import staged
from qa_dist.common.reading import decoded, read_bytes
from qa_dist.common.secrets import masked
from qa_dist.reporting.card_text import calibration_lines, data_lines, named, result_lines, training_lines, usage_lines
from qa_dist.reporting.run_record import RunRecord, Source

FILE = "README.md"

_SCORES = {"exact_match": "Exact match", "f1": "F1"}
_MARK = re.compile(r"<!-- qa-dist card ([0-9a-f]{64}) -->\n\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardOptions:
    """What only the user knows.

    Attributes:
        folder_name: name of the model's folder, for the title and the code.
        repo_id: where the model will be on the hub; None: the code names the folder.
        base_model: hub id of the base model; None: as the run names it.
        license: a licence by the hub's name; None: none is stated.
        languages: codes of the languages of the data; empty: none is stated.
        is_merged: whether the card is for the run's adapter folded into its base model.
    """

    folder_name: str
    repo_id: str | None = None
    base_model: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()
    is_merged: bool = False


def card(run: RunRecord, options: CardOptions, analysis: Mapping[str, Any] | None = None) -> str:
    """The card as Markdown with the hub's metadata before it.

    Args:
        run: What the model's folder says.
        options: What the user says.
        analysis: What `analysis.analyze` found on the run's predictions; None: no intervals and no slices.

    Raises:
        DataError: The predictions are not those of the scores.
    """
    if analysis is not None:
        _require_same_scores(run, analysis)
    base = Source(options.base_model, options.base_model) if options.base_model else run.base
    is_adapter = run.is_adapter and not options.is_merged
    name = options.repo_id or options.folder_name or "model"
    title = name.rpartition("/")[2]
    lines = [
        f"# {title}",
        "",
        *_summary(run, base, is_adapter=is_adapter),
        *usage_lines(name, base, is_adapter=is_adapter, revision=_revision(run, options)),
        *data_lines(run),
        *result_lines(run, analysis),
        *calibration_lines(run),
        *training_lines(run),
    ]
    text = masked(
        f"---\n{_metadata(run, options, base, title, is_adapter, analysis)}\n---\n\n" + "\n".join(lines) + "\n"
    )
    return f"{text}<!-- qa-dist card {_digest(text)} -->\n"


def _revision(run: RunRecord, options: CardOptions) -> str:
    """The revision of the base model that was trained on; "main" where that was the newest, or another one is named."""
    revision = run.config.get("model_revision")
    return revision if isinstance(revision, str) and not options.base_model else "main"


def write_card(text: str, path: Path, *, overwrite: bool) -> None:
    """Write a card into a file, which is as it was if that fails.

    Raises:
        UserError: The file is not one that was written here and left as it was, or cannot be written.
    """
    if path.is_dir():
        raise ConfigError([f"--output {path} is a folder; name the file in it"])
    if path.exists() and not overwrite and not is_card(decoded(read_bytes(path), path)):
        raise ConfigError(
            [f"{path} was written or edited by hand; name another file with --output, or replace it with --overwrite"]
        )
    try:
        with staged(path) as aside:
            aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{path} cannot be written: {error.strerror}; name another with --output"]) from error


def is_card(text: str) -> bool:
    """Whether `card` made this text and nobody changed it."""
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _require_same_scores(run: RunRecord, analysis: Mapping[str, Any]) -> None:
    """Make sure that an analysis is of what the run was scored on.

    Raises:
        DataError: It is not.
    """
    for key in _SCORES if run.scores else ():
        if abs(run.scores[key] - analysis[key]["value"]) > 1e-6:
            raise DataError(
                f"{run.folder} was evaluated with {_SCORES[key]} {run.scores[key]:.2f}, but its predictions have "
                f"{analysis[key]['value']:.2f} on the {analysis['num_questions']:,} questions of --references; give "
                "the file that it was evaluated on"
            )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _metadata(
    run: RunRecord,
    options: CardOptions,
    base: Source | None,
    title: str,
    is_adapter: bool,
    analysis: Mapping[str, Any] | None,
) -> str:
    """The YAML that the hub reads, as huggingface_hub writes it."""
    from huggingface_hub import ModelCardData

    data_sets = [found.hub_id for found in [run.data("train")] if found and found.hub_id]
    results = _results(run, analysis)
    known: dict[str, Any] = {
        "language": list(options.languages) or None,
        "license": options.license,
        "base_model": base.hub_id if base else None,
        "base_model_relation": ("adapter" if is_adapter else "finetune") if base and base.hub_id else None,
        "datasets": data_sets or None,
        "metrics": [*_SCORES] if results else None,
    }
    data = ModelCardData(
        **known,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="question-answering",
        tags=["question-answering", "qa-dist", *(["lora"] if run.config.get("tuning") == "lora" else [])],
        model_name=title if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _results(run: RunRecord, analysis: Mapping[str, Any] | None) -> list[Any]:
    """The measured scores as the hub's model-index has them; none without scores or where nothing names the data.

    With an analysis, the arguments of each metric have its interval, by the names of the `evaluate` library.
    """
    from huggingface_hub import EvalResult

    found = run.data("validation") if run.scores else None
    if found is None:
        return []
    config = run.config.get("dataset_config_name")
    return [
        EvalResult(
            task_type="question-answering",
            task_name="Extractive question answering",
            dataset_type=found.hub_id or found.name,
            dataset_name=found.name,
            dataset_config=config if isinstance(config, str) else None,
            dataset_split="validation",
            metric_type=key,
            metric_name=name,
            metric_value=round(float(run.scores[key]), 4),
            metric_args=_interval(analysis, key),
        )
        for key, name in _SCORES.items()
    ]


def _interval(analysis: Mapping[str, Any] | None, key: str) -> dict[str, Any] | None:
    """The interval of a score, and how it was found; None without an analysis, and about a single context."""
    if analysis is None or analysis[key]["low"] is None:
        return None
    return {
        "confidence_interval": [round(float(analysis[key][end]), 4) for end in ("low", "high")],
        "confidence_level": analysis["level"],
        "n_resamples": analysis["num_resamples"],
        "resampled": "contexts",
    }


def _summary(run: RunRecord, base: Source | None, *, is_adapter: bool) -> Iterator[str]:
    what = "A LoRA adapter" if is_adapter else "A model"
    origin = f" on {named(base)}" if base and is_adapter else f", fine-tuned from {named(base)}" if base else ""
    yield f"{what} for extractive question answering{origin}."
    if run.scores:
        exact, f1 = (f"{run.scores[key]:.2f}" for key in _SCORES)
        yield f"It reaches exact match {exact} and F1 {f1} on its validation data."
    nothing = ", or none, where the text does not answer it" if run.may_lack_answers else ""
    yield f"An answer is a piece of the text that is given with the question{nothing}."
    yield ""
