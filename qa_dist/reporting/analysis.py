"""Scores with intervals, by slice and kind of mistake; differences of systems; scatter over seeds: as plain data."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from qa_dist.common.arrays import Float64, Int32
from qa_dist.common.errors import ConfigError, DataError, ScoringError, UserError
from qa_dist.config.texts import shown
from qa_dist.evaluation.normalization import NORMALIZATIONS, Normalization, normalization
from qa_dist.evaluation.scoring import percent, question_scores
from qa_dist.reporting.calibration import best_null_threshold, calibration
from qa_dist.reporting.intervals import LEVEL, Difference, Groups, Interval, differences, intervals
from qa_dist.reporting.mistakes import KINDS, mistake
from qa_dist.reporting.questions import Questions
from qa_dist.reporting.slices import SLICINGS, Labels, few, labels, slice_scores, window_labels
from qa_dist.reporting.systems import Candidates, System, other_score_note, repetitions

SCORES = ("exact_match", "f1")
"""The columns of scores."""

_NUM_IDS = 10


FEWEST_RESAMPLES = 100
"""Fewer leave no percentiles."""


class Resampling(NamedTuple):
    """How intervals and p-values are found.

    Attributes:
        num_resamples: of each interval and each p-value.
        seed: of the random numbers; the same gives the same.
    """

    num_resamples: int = 2000
    seed: int = 0


_USUAL = Resampling()


def rules_for(systems: Sequence[System], name: str | None) -> Normalization:
    """The rules that answers are scored by: those asked for, else those of the runs, else SQuAD's.

    Raises:
        ConfigError: Nothing is asked for and runs were scored by different rules, or the rules cannot be used.
        DataError: Nothing is asked for and a run was scored by rules that this version does not know.
    """
    if name is not None:
        return normalization(name)
    of_runs = {system.rules: system for system in systems if system.rules is not None}
    if len(of_runs) > 1:
        listed = ", ".join(f"{system.name} by {rules}" for rules, system in of_runs.items())
        raise ConfigError([f"the runs were scored by different rules ({listed}); choose with --answer_normalization"])
    for rules, system in of_runs.items():
        if rules not in NORMALIZATIONS:
            raise DataError(
                f"{system.path}: its metrics.json has the scores by {shown(rules)}, and the rules known here are "
                f"{', '.join(NORMALIZATIONS)}; choose with --answer_normalization"
            )
    return normalization(next(iter(of_runs), "squad"))


def analyze(
    systems: Sequence[System],
    questions: Questions,
    rules: Normalization,
    *,
    allow_missing: bool = False,
    resampling: Resampling = _USUAL,
) -> dict[str, Any]:
    """What `qa-dist analyze --json` prints.

    The keys of the first system stand at the top; `systems` has those of each. docs/analysis.md describes them.

    Raises:
        UserError: Predictions are not of these questions.
    """
    scores = [_scores(system, questions, rules, allow_missing) for system in systems]
    common, windows = labels(questions, rules), Windows(questions)
    described = []
    for system, scores_EK in zip(systems, scores, strict=True):
        windows_E, note = windows.of(system)
        own = common if windows_E is None else {**common, "windows": window_labels(windows_E)}
        found = _described(system, questions, rules, scores_EK, own, resampling)
        more = (note, other_score_note(system, found["f1"]["value"], rules.name))
        own_notes = [*system.notes, *(each for each in more if each)]
        described.append({"name": system.name, "path": system.path, "notes": own_notes, **found})
    paired = [
        {
            "first": systems[first].name,
            "second": systems[second].name,
            **_paired(scores[first], scores[second], questions, resampling),
        }
        for first, second in itertools.combinations(range(len(systems)), 2)
    ]
    groups, notes = repetitions(systems)
    top = {name: described[0][name] for name in (*SCORES, "slices", "mistakes", "calibration", "null_threshold")}
    return {
        "answer_normalization": rules.name,
        "version_2": questions.references.version_2,
        "num_questions": len(questions),
        "num_contexts": questions.num_contexts,
        "level": LEVEL,
        "num_resamples": resampling.num_resamples,
        "seed": resampling.seed,
        "warning": few(len(questions), questions.num_contexts),
        **top,
        "systems": described,
        "paired": paired,
        "seeds": [_over_seeds(group, described) for group in groups],
        "notes": notes,
    }


def _scores(system: System, questions: Questions, rules: Normalization, allow_missing: bool) -> Float64:
    """EM and F1 of each question, from 0 to 1, float64 [E, 2]."""
    answers = questions.references.answers
    if not any(key in system.texts for key in answers):
        raise DataError(
            f"{system.path} answers none of the {len(answers):,} questions of {questions.name}: it is of another data "
            "set; give the --references that it was predicted on"
        )
    try:
        found = question_scores(
            answers,
            system.texts,
            version_2=questions.references.version_2,
            allow_missing=allow_missing,
            rules=rules,
        )
    except ScoringError as error:
        raise ScoringError(f"{system.path}: {error}") from error
    return np.array([[scores.get(key, 0) for scores in found] for key in answers], np.float64)


def _described(
    system: System,
    questions: Questions,
    rules: Normalization,
    scores_EK: Float64,
    found_labels: Mapping[str, Labels],
    resampling: Resampling,
) -> dict[str, Any]:
    by_context = intervals(Groups.of(scores_EK, questions.context_E), *resampling)
    by_question = intervals(Groups.single(scores_EK), *resampling)
    keys = list(questions.references.answers)
    found: dict[str, Any] = {}
    for name, column, over, single in zip(SCORES, scores_EK.T.tolist(), by_context, by_question, strict=True):
        # Added up as the official scripts do, to their last digit.
        value = percent(dict(zip(keys, column, strict=True)), keys)
        found[name] = {**asdict(over), "value": value, "over_questions": _ends(single)}
    ordered = {name: found_labels[name] for name in SLICINGS if name in found_labels}
    slices = slice_scores(ordered, scores_EK, questions.context_E, *resampling)
    found["slices"] = [each.to_json() for each in slices]
    candidates = system.candidates()
    found["mistakes"] = _mistakes(system, questions, rules, scores_EK, candidates)
    is_exact_E = scores_EK[:, 0] == 1
    found["calibration"] = calibration(keys, system.texts, is_exact_E, questions.context_E, candidates)
    found["null_threshold"] = _null_threshold(system, questions, rules, candidates)
    return found


def _ends(interval: Interval) -> dict[str, float | None]:
    return {"low": interval.low, "high": interval.high}


def _null_threshold(
    system: System, questions: Questions, rules: Normalization, candidates: Candidates
) -> dict[str, float | None] | None:
    """The threshold that would have been best; None where there are not all the null odds and n-best lists for it."""
    answers = questions.references.answers
    odds = system.null_odds() if questions.references.version_2 else {}
    if not all(key in odds and key in candidates for key in answers):
        return None
    return best_null_threshold(
        answers, {key: candidates[key] for key in answers}, {key: odds[key] for key in answers}, rules
    )


def _mistakes(
    system: System, questions: Questions, rules: Normalization, scores_EK: Float64, candidates: Candidates
) -> list[dict[str, Any]]:
    """How many answers are of each kind, in percent of the questions, with the F1 they get and the first few ids."""
    rows: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for row, (example, is_exact) in enumerate(zip(questions.examples, scores_EK[:, 0].tolist(), strict=True)):
        text = system.texts.get(example.id)
        noted = [
            (entry["start_char"], entry["end_char"])
            for entry in candidates.get(example.id, ())
            if text and entry["text"] == text and entry["start_char"] >= 0
        ]
        # The best of those with this text was chosen.
        kind = mistake(example, text, bool(is_exact), rules, noted[:1])
        if kind is not None:
            rows[kind].append(row)
    return [
        {
            "kind": kind,
            "n": len(members),
            "share": 100 * len(members) / len(questions),
            "f1": 100 * float(scores_EK[members, 1].mean()) if members else None,
            "first_ids": [questions.examples[row].id for row in members[:_NUM_IDS]],
        }
        for kind, members in rows.items()
    ]


def _paired(first_EK: Float64, second_EK: Float64, questions: Questions, resampling: Resampling) -> dict[str, Any]:
    over = differences(first_EK, second_EK, questions.context_E, *resampling)
    single = differences(first_EK, second_EK, np.arange(len(questions)), *resampling)
    return {
        name: {**_difference(contexts), "over_questions": _difference(alone)}
        for name, contexts, alone in zip(SCORES, over, single, strict=True)
    }


def _difference(found: Difference) -> dict[str, float | None]:
    return {
        **asdict(found.interval),
        "p_bootstrap": found.p_bootstrap,
        "p_randomization": found.p_randomization,
    }


def _over_seeds(group: Sequence[System], described: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of each score over runs with other seeds."""
    names = [system.name for system in group]
    members = [each for each in described if each["name"] in names]
    return {
        "systems": names,
        "seeds": [system.config["seed"] for system in group],
        **{
            name: {"mean": statistics.fmean(values), "std": statistics.stdev(values)}
            for name in SCORES
            for values in [[each[name]["value"] for each in members]]
        },
    }


class Windows:
    """Counts windows of questions as the tokenizers and lengths of runs make them, each way once."""

    def __init__(self, questions: Questions) -> None:
        self._questions = questions
        self._known: dict[str, Int32] = {}

    def of(self, system: System) -> tuple[Int32 | None, str | None]:
        """How many windows each question has in a run, int32 [E], or None and a note on why nobody knows."""
        if system.run is None:
            return None, "no slices by windows: only the output folder of a run says which tokenizer and lengths it had"
        lengths = [system.config.get(name) for name in ("max_seq_length", "doc_stride", "max_question_length")]
        if not all(isinstance(length, int) for length in lengths[:2]):
            return None, f"no slices by windows: {system.path} has no config.yaml that says the lengths"
        # Looked for before the libraries are imported that would miss it.
        if not any((system.run / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return None, f"no slices by windows: {system.path} holds no tokenizer"
        from qa_dist.config.options import ModelConfig
        from qa_dist.features.tokenizer import TokenizerSpec
        from qa_dist.features.windows import FeatureBuilder, FeatureSpec
        from qa_dist.model.pretrained import load_tokenizer

        try:
            tokenizer = TokenizerSpec.of(load_tokenizer(ModelConfig(tokenizer_name=str(system.run))))
            key = f"{tokenizer.sha256()} {lengths}"
            if key not in self._known:
                builder = FeatureBuilder(tokenizer, FeatureSpec(*lengths))  # type: ignore[arg-type]
                self._known[key] = builder.num_windows(self._questions.examples)
        except UserError as error:
            return None, f"no slices by windows: {error}"
        return self._known[key], None
