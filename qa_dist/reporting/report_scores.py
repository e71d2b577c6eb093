"""What a report says of answers: an analysis of the runs that have some, on the questions that all of these answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qa_dist.common.errors import UserError
from qa_dist.config.options import DataConfig
from qa_dist.data.sources import open_source
from qa_dist.evaluation.normalization import unfit_note
from qa_dist.reporting.analysis import Resampling, analyze, rules_for
from qa_dist.reporting.questions import Questions, questions_in, read_questions
from qa_dist.reporting.run_folders import Run
from qa_dist.reporting.shown_answers import Shown, shown_answers
from qa_dist.reporting.systems import System

_SOURCE = ("dataset_name", "dataset_config_name", "train_file", "validation_file")
"""Options that say where questions come from."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What was found out about answers.

    Attributes:
        analysis: as `analysis.analyze` gives it; None where there is nothing to analyse.
        runs: the numbers of the runs that it has, in its order.
        source: what the questions were read from.
        worst: the questions that were answered worst.
        random: questions drawn by chance.
        notes: what is missing, in sentences.
    """

    analysis: Mapping[str, Any] | None = None
    runs: tuple[int, ...] = ()
    source: str = ""
    worst: Sequence[Shown] = ()
    random: Sequence[Shown] = ()
    notes: Sequence[str] = field(default_factory=list)


def scored(runs: Sequence[Run], references: str | None, rules_name: str | None, resampling: Resampling) -> Scored:
    """Analyse the answers of runs.

    Args:
        runs: the runs, with predictions or without.
        references: a file of questions; None: the validation data that a run names in its config.yaml.
        rules_name: whose rules score; None: those of the runs.
        resampling: how intervals are found; its seed also draws the questions by chance.

    Raises:
        UserError: `references` cannot be used, or the rules cannot.
    """
    systems = {number: run.system for number, run in enumerate(runs) if run.system is not None}
    if not systems:
        # A mistake in what was asked for is said all the same.
        return Scored() if references is None else Scored(source=read_questions(references).name)
    rules = rules_for(list(systems.values()), rules_name)
    notes: list[str] = []
    questions = _questions(runs, systems, references, notes)
    if questions is None:
        return Scored(notes=notes)
    systems, questions = _common(systems, questions, notes)
    if not systems:
        return Scored(source=questions.name, notes=notes)
    notes += questions.references.notes
    if unfit := unfit_note(questions.references.answers.values(), rules):
        notes.append(unfit)
    found = analyze(list(systems.values()), questions, rules, resampling=resampling)
    notes += found["notes"]
    for each in found["systems"]:
        notes += [f"{each['name']}: {note}" for note in each["notes"]]
    worst, random = shown_answers(systems, questions, rules, seed=resampling.seed)
    return Scored(found, tuple(systems), questions.name, worst, random, notes)


def _questions(
    runs: Sequence[Run], systems: Mapping[int, System], references: str | None, notes: list[str]
) -> Questions | None:
    """The questions that are asked for, or those of the first run that has answers and still finds its data."""
    if references is not None:
        return read_questions(references)
    reasons = []
    for number in systems:
        config = runs[number].config
        named: dict[str, Any] = {name: config[name] for name in _SOURCE if isinstance(config.get(name), str)}
        if not config:
            continue
        try:
            source = open_source(DataConfig(**named), "validation")
            return questions_in(source.records(), source.name)
        except UserError as error:
            reasons.append(f"{runs[number].name}: {str(error).rstrip('.')}")
    why = f" ({'; '.join(reasons)})" if reasons else ""
    notes.append(
        f"The questions that were answered are not at hand{why}: no intervals, slices, calibration or answers; "
        "--references FILE names them"
    )
    return None


def _common(
    systems: Mapping[int, System], questions: Questions, notes: list[str]
) -> tuple[dict[int, System], Questions]:
    """The runs that answer some of the questions, and the questions that all of these answer."""
    kept: dict[int, System] = {}
    ids = set(questions.references.answers)
    for number, system in systems.items():
        common = ids & system.texts.keys()
        if common:
            ids, kept[number] = common, system
        else:
            among = "the questions of" if not kept else "what the runs before it answered in"
            notes.append(
                f"{system.name} answers none of {among} {questions.name}: it is of another data set, and is left "
                "out of what is said about answers"
            )
    if kept and len(ids) < len(questions):
        questions, note = questions.answered(ids, len(kept))
        notes.append(note)
    return kept, questions
