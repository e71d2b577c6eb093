"""Thresholds and temperatures against brute force, on answers made up here."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from qa_dist.common.errors import DataError
from qa_dist.config.options import DataConfig, EvaluationConfig
from qa_dist.evaluation.answers import Answers, softmax
from qa_dist.evaluation.calibration import Choices, fitted_temperature
from qa_dist.evaluation.loop import best_scores
from qa_dist.evaluation.scoring import score_v1, score_v2
from qa_dist.evaluation.tuning import FEWEST_OF_A_KIND, FEWEST_QUESTIONS, in_tuned_half, require_enough, tuned
from qa_dist.features.store import FeatureStore
from qa_dist.model.calibration import FILE, read_calibration

WORDS = "amber basin cedar delta ember fjord grove haven inlet jetty".split()
LARGEST = float(np.finfo(np.float32).max)
DATA = DataConfig(validation_file="some/where/dev.json")


def made(num_questions: int, *, version_2: bool, seed: int = 0, threshold: float = 0.0) -> tuple[FeatureStore, Answers]:
    """Questions with five spans each, and answers that know a little: chosen by a threshold, as decoding does it.

    Every tenth has no candidate at all, where it may have no answer; every seventeenth has no known reference.
    """
    random = np.random.default_rng(seed)
    contexts = [" ".join(random.permutation(WORDS)) + f" {number // 3}" for number in range(num_questions)]
    starts = np.full((num_questions, 6), -1, np.int32)
    ends, scores = starts.copy(), np.full((num_questions, 6), -np.inf, np.float32)
    odds, counts, texts, chosen, references = [], [], [], [], []
    for row, context in enumerate(contexts):
        is_unanswerable = version_2 and bool(random.random() < 0.4)
        begins = random.permutation([0, *(at + 1 for at, mark in enumerate(context) if mark == " ")])[:5]
        is_bare = version_2 and row % 10 == 9
        spans = (
            []
            if is_bare
            else [(int(at), context.index(" ", at) if " " in context[at:] else len(context)) for at in begins]
        )
        values = np.sort(random.normal(0, 4, len(spans))).astype(np.float32)[::-1]
        entries = [(float(value), start, end) for value, (start, end) in zip(values, spans, strict=True)]
        null = np.float32(random.normal(2.0 if is_unanswerable else -2.0, 4) + (values[0] if len(values) else 0))
        if version_2:
            entries = sorted([*entries, (float(null), -1, -1)], key=lambda entry: -entry[0])
        for column, (score, start, end) in enumerate(entries):
            scores[row, column], starts[row, column], ends[row, column] = score, start, end
        odds.append(np.float32(LARGEST) if is_bare else null - (values[0] if len(values) else np.float32(0)))
        counts.append(len(entries))
        wanted = next((context[start:end] for _, start, end in entries if start >= 0), "")
        is_right = bool(random.random() < 0.6)
        references.append([] if is_unanswerable else [wanted if is_right and wanted else f"{wanted} more {row}"])
        is_null = version_2 and bool(odds[-1] > threshold)
        place = next((place for place, entry in enumerate(entries) if (entry[1] < 0) == is_null), 0)
        chosen.append(place)
        texts.append("" if entries[place][1] < 0 else context[entries[place][1] : entries[place][2]])
    num_entries = np.array(counts, np.int64)
    keys = [f"q{row}" for row in range(num_questions)]
    answers = Answers(
        **{"example_ids": keys, "contexts": contexts, "texts": texts, "chosen_E": np.array(chosen, np.int64)},
        **{"num_entries_E": num_entries, "start_char_EW": starts, "end_char_EW": ends, "score_EW": scores},
        probability_EW=softmax(scores, num_entries),
        null_odds_E=np.array(odds, np.float32) if version_2 else None,
    )
    store = SimpleNamespace(
        example_ids=keys,
        contexts=contexts,
        has_references=np.array([row % 17 != 16 for row in range(num_questions)]),
        answer_texts=lambda index: references[index],
        fingerprint="f" * 32,
    )
    return cast(FeatureStore, store), answers


def known(store: FeatureStore) -> dict[str, list[str]]:
    return {key: store.answer_texts(row) for row, key in enumerate(store.example_ids) if store.has_references[row]}


def texts_at(store: FeatureStore, answers: Answers, threshold: float) -> dict[str, str]:
    """The answers at a threshold, from the lists alone."""
    found = {}
    for answer in answers:
        best = next((entry.text for entry in answer.nbest if entry.text), "")
        found[answer.id] = "" if answer.null_odds is not None and answer.null_odds > threshold else best
    return {key: found[key] for key in known(store)}


def part_of(store: FeatureStore, *, is_tuned: bool) -> dict[str, list[str]]:
    contexts = dict(zip(store.example_ids, store.contexts, strict=True))
    return {key: each for key, each in known(store).items() if in_tuned_half(contexts[key]) == is_tuned}


def test_the_threshold_is_the_best_of_all_that_there_are() -> None:
    store, answers = made(160, version_2=True)
    found = tuned(answers, store, DATA, EvaluationConfig(), part="all", version_2=True)
    odds, references = answers.null_odds() or {}, known(store)
    let_in = {
        key: score_v2({key: references[key]}, {key: text})["f1"]
        for key, text in texts_at(store, answers, LARGEST).items()
    }
    left_out = {key: 0.0 if texts else 100.0 for key, texts in references.items()}
    f1 = {
        threshold: float(np.mean([(left_out if odds[key] > threshold else let_in)[key] for key in references]))
        for threshold in {odds[key] for key in references}
    }
    best = max(f1.values())
    assert best > score_v2(references, texts_at(store, answers, 0.0))["f1"] + 0.2
    last = min(each for each, value in f1.items() if value > best - 1e-9)
    first = min(each for each in f1 if each > last)
    assert last == best_scores(references, answers)["best_f1_thresh"]
    assert found.null_score_diff_threshold == pytest.approx((last + first) / 2)
    after = found.report["null_threshold"]["after"]
    assert after["f1"] == pytest.approx(best)
    assert (found.tuned_on["num_questions"], found.tuned_on["data"]) == (len(known(store)), "dev.json")
    assert found.tuned_on["num_unanswerable"] == sum(not each for each in known(store).values())
    assert found.report["null_threshold"]["before"]["f1"] == score_v2(known(store), texts_at(store, answers, 0.0))["f1"]


@pytest.mark.parametrize("threshold", [-LARGEST, -1.0, 2.0])
def test_best_f1_does_not_depend_on_the_threshold_of_the_answers(threshold: float) -> None:
    store, answers = made(200, version_2=True)
    _, others = made(200, version_2=True, threshold=threshold)
    assert answers.texts != others.texts
    assert best_scores(known(store), answers) == best_scores(known(store), others)
    found = [tuned(each, store, DATA, EvaluationConfig(), part="all", version_2=True) for each in (answers, others)]
    assert found[0] == found[1]


def test_half_tunes_on_one_half_and_reports_on_the_other() -> None:
    store, answers = made(500, version_2=True, seed=3)
    found = tuned(answers, store, DATA, EvaluationConfig(), part="half", version_2=True)
    mine, others = (part_of(store, is_tuned=each) for each in (True, False))
    assert not mine.keys() & others.keys()
    assert (found.tuned_on["num_questions"], found.reported_on["num_questions"]) == (len(mine), len(others))
    threshold = found.null_score_diff_threshold
    assert threshold is not None
    texts = texts_at(store, answers, threshold)
    held_out = score_v2(others, {key: texts[key] for key in others})
    assert found.report["null_threshold"]["after"]["f1"] == pytest.approx(held_out["f1"], abs=1e-12)
    # What is said of the other half changes nothing of what is found on this one.
    other_answers = {key: ["nothing like it"] for key in others}
    spoilt = cast(Any, SimpleNamespace(**vars(cast(Any, store))))
    places = dict(enumerate(store.example_ids))
    spoilt.answer_texts = lambda row: (
        other_answers.get(places[row], store.answer_texts(row)) if store.answer_texts(row) else []
    )
    again = tuned(answers, spoilt, DATA, EvaluationConfig(), part="half", version_2=True)
    assert (again.temperature, again.null_score_diff_threshold) == (found.temperature, threshold)
    assert again.report != found.report


def test_the_temperature_is_that_of_the_answers_that_the_threshold_leaves() -> None:
    store, answers = made(300, version_2=True, seed=1)
    found = tuned(answers, store, DATA, EvaluationConfig(), part="all", version_2=True)
    assert found.null_score_diff_threshold is not None
    texts = texts_at(store, answers, found.null_score_diff_threshold)
    exact = {key: score_v2({key: each}, {key: texts[key]})["exact"] == 100 for key, each in known(store).items()}
    lists = {answer.id: answer.nbest for answer in answers}
    choices = Choices.of(
        [[entry.score for entry in lists[key]] for key in exact],
        [next(place for place, entry in enumerate(lists[key]) if entry.text == texts[key]) for key in exact],
        list(exact.values()),
    )
    assert found.temperature == pytest.approx(fitted_temperature(choices), rel=1e-6)
    before, after = (found.report["calibration"][when] for when in ("before", "after"))
    assert after["ece"] < before["ece"]
    assert sum(each["n"] for each in after["bins"]) == len(known(store))


def test_without_unanswerable_questions_there_is_no_threshold() -> None:
    store, answers = made(300, version_2=False)
    found = tuned(answers, store, DATA, EvaluationConfig(), part="all", version_2=False)
    assert (found.null_score_diff_threshold, found.report["null_threshold"]) == (None, None)
    assert found.temperature != 1
    exact = score_v1(known(store), {key: answers.predictions()[key] for key in known(store)})["exact_match"]
    bins = found.report["calibration"]["before"]["bins"]
    assert sum(each["n"] * each["exact_match"] for each in bins) / len(known(store)) == pytest.approx(exact)


@pytest.mark.parametrize("threshold", [1.5, 0.0])
def test_a_threshold_that_was_chosen_stays(threshold: float) -> None:
    store, answers = made(300, version_2=True, threshold=threshold)
    options = EvaluationConfig(null_score_diff_threshold=threshold)
    found = tuned(answers, store, DATA, options, part="all", version_2=True, keeps_threshold=True)
    assert found.null_score_diff_threshold is None
    assert found.report["null_threshold"]["before"] == found.report["null_threshold"]["after"]
    assert found.report["null_threshold"]["before"]["threshold"] == threshold
    assert not any("null threshold" in line for line in found.lines())


def test_where_silence_is_best_no_threshold_is_kept() -> None:
    store, answers = made(300, version_2=True)
    wrong = cast(Any, SimpleNamespace(**vars(cast(Any, store))))
    wrong.answer_texts = lambda row: ["unheard"] if store.answer_texts(row) else []
    found = tuned(answers, wrong, DATA, EvaluationConfig(), part="all", version_2=True)
    # The script's answer would be 0, which is not silent.
    assert best_scores(known(wrong), answers)["best_f1_thresh"] == 0
    assert found.null_score_diff_threshold is None
    assert "none is better than never to answer" in list(found.lines())[1]


def unevenly_sure(num_questions: int, *, version_2: bool) -> tuple[FeatureStore, Answers]:
    """Answers of which most are a little too unsure and some far too sure: the likeliest temperature makes most worse.

    With `version_2` every fourth question has no answer, and its null odds say so.
    """
    store, answers = made(num_questions, version_2=False)
    starts, ends = np.full((num_questions, 6), -1, np.int32), np.full((num_questions, 6), -1, np.int32)
    scores, references = np.full((num_questions, 6), -np.inf, np.float32), []
    for row, context in enumerate(answers.contexts):
        end, is_unanswerable = context.index(" "), version_2 and row % 4 == 3
        confidence, share = (0.99, 0.9) if row % 5 == 0 else (0.62, 0.66)
        scores[row, :2] = (10, 0) if is_unanswerable else (np.log(confidence / (1 - confidence)), 0)
        # The other entry is "no answer", or a span of one letter.
        span, other = (1, 0) if is_unanswerable else (0, 1)
        starts[row, span], ends[row, span] = 0, end
        if not version_2:
            starts[row, other], ends[row, other] = 0, 1
        references.append([] if is_unanswerable else [context[:end] if row * 37 % 100 < 100 * share else "unheard"])
    odds_E = np.where([bool(each) for each in references], scores[:, 1] - scores[:, 0], 10).astype(np.float32)
    changed = dataclasses.replace(
        answers,
        **{
            "texts": [context[: context.index(" ")] for context in answers.contexts],
            "num_entries_E": starts[:, 0] * 0 + 2,
        },
        **{"chosen_E": np.zeros(num_questions, np.int64), "start_char_EW": starts, "end_char_EW": ends},
        **{"score_EW": scores, "null_odds_E": odds_E if version_2 else None},
    )
    cast(Any, store).answer_texts = lambda index: references[index]
    return store, changed


@pytest.mark.parametrize("part", ["all", "half"])
@pytest.mark.parametrize("version_2", [False, True])
def test_a_temperature_that_makes_probabilities_worse_is_not_kept(part: Any, version_2: bool, tmp_path: Path) -> None:
    store, answers = unevenly_sure(800, version_2=version_2)
    found = tuned(answers, store, DATA, EvaluationConfig(), part=part, version_2=version_2)
    assert found.temperature == 1
    errors = found.report["calibration"]
    assert errors["before"] == errors["after"]
    not_kept = errors["not_kept"]
    assert not_kept["temperature"] > 1.2
    assert not_kept["after"] > not_kept["before"]
    said, *others = found.lines()
    assert said.startswith(
        f"no temperature is kept: the one fitted on {found.origin}, {not_kept['temperature']:.3f}, does"
    )
    assert f"which is {not_kept['before']:.2f} without and {not_kept['after']:.2f} with it" in said
    assert said.endswith("on the other half without it") == (part == "half")
    if part == "all":
        assert not_kept["before"] == errors["before"]["ece"]
    # The threshold is another thing, and is kept.
    assert (found.null_score_diff_threshold is not None) == version_2 == (len(others) == 1)
    found.write(tmp_path)
    assert read_calibration(tmp_path) == found
    assert Path(tmp_path, FILE).read_text().startswith('{\n  "format_version": 1,\n  "temperature": 1.0,\n')


@pytest.mark.parametrize(
    ("count", "version_2", "part", "message"),
    [
        (100, False, "all", f"the data has 95 questions whose answers are known, and at least {FEWEST_QUESTIONS} are"),
        (180, False, "half", "the other half has 69 questions whose answers are known"),
        (
            110,
            "none",
            "all",
            f"the data has 0 questions without an answer among 104, .* at least {FEWEST_OF_A_KIND} of",
        ),
    ],
)
def test_too_little_to_tune_on_is_one_sentence(count: int, version_2: Any, part: Any, message: str) -> None:
    store, _ = made(count, version_2=False)
    with pytest.raises(DataError, match=f"^{message}.*[^.]$"):
        require_enough(store, part, version_2=version_2 == "none")
