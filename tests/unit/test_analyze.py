"""`qa-dist analyze`: known scores, hand-computed cases, runs and their seeds, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qa_dist import score
from qa_dist.analyze import main
from qa_dist.config.options import RunConfig
from qa_dist.evaluation.score_files import load_null_odds, load_references
from qa_dist.evaluation.scoring import score_v2
from qa_dist.features.tokenizer import TokenizerSpec
from qa_dist.features.windows import FeatureBuilder, FeatureSpec
from qa_dist.reporting.analysis import Resampling
from qa_dist.reporting.mistakes import KINDS
from qa_dist.reporting.questions import read_questions
from qa_dist.reporting.report_scores import scored
from qa_dist.reporting.run_folders import read_runs
from qa_dist.reporting.systems import BESIDE_RESULTS
from tests.refusals import refusal
from tests.tiny import tiny_squad, tiny_tokenizer
from tests.unit.data_fixtures import FIXTURES, save_tokenizer

Capture = pytest.CaptureFixture[str]

FEW = ("--resamples", "200")
MILL = "Ada Kerrow built the mill in 1911. It burned."
FORD = "The ford is shallow. Nobody lives there."
QUESTIONS = {
    "a": (MILL, "Who built it?", "Ada Kerrow"),
    "b": (MILL, "When was it built?", "1911"),
    "c": (FORD, "What is shallow?", "The ford"),
    "d": (FORD, "Who lives there?", "Nobody"),
}
RIGHT = {key: answer for key, (_, _, answer) in QUESTIONS.items()}


def write(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def squad(*contexts: str) -> dict[str, Any]:
    """The questions above about these contexts; all of them without any."""
    paragraphs = [
        {
            "context": context,
            "qas": [
                {"id": key, "question": asked, "answers": [{"text": text, "answer_start": context.index(text)}]}
                for key, (about, asked, text) in QUESTIONS.items()
                if about == context
            ],
        }
        for context in contexts or (MILL, FORD)
    ]
    return {"version": "1.1", "data": [{"title": "A\x1b[2Jtitle", "paragraphs": paragraphs}]}


@pytest.fixture
def references(tmp_path: Path) -> str:
    return write(tmp_path / "dev.json", squad())


def analyzed(capsys: Capture, *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_scores_by_hand(references: str, tmp_path: Path, capsys: Capture) -> None:
    answers = write(tmp_path / "first.json", {**RIGHT, "b": "in 1911", "c": "Nobody lives"})
    found = analyzed(capsys, answers, "--references", references)
    assert found["num_questions"] == 4
    assert found["num_contexts"] == 2
    # EM: one of two in each context, whichever are drawn. F1: (1 + 2/3) / 2 and (0 + 1) / 2.
    assert found["exact_match"] == {
        **{"value": 50, "low": 50, "high": 50},
        "over_questions": {"low": 0, "high": 100},
    }
    f1 = found["f1"]
    assert (f1["value"], f1["low"], f1["high"]) == pytest.approx((100 * (8 / 3) / 4, 50, 250 / 3))
    mistakes = {each["kind"]: each for each in found["mistakes"]}
    assert list(mistakes) == list(KINDS)
    counts = {kind: each["n"] for kind, each in mistakes.items() if each["n"]}
    assert counts == {"too_long": 1, "wrong_sentence": 1}
    assert mistakes["too_long"]["first_ids"] == ["b"]
    assert mistakes["too_long"]["share"] == 25
    assert mistakes["too_long"]["f1"] == pytest.approx(200 / 3)
    who = next(each for each in found["slices"] if (each["by"], each["value"]) == ("question_word", "who"))
    assert (who["n"], who["num_contexts"], who["warning"]) == (2, 2, "under 30 questions")
    assert who["f1"] == {"value": 100, "low": 100, "high": 100}
    assert found["paired"] == found["seeds"] == []
    assert found["calibration"] is found["null_threshold"] is None
    assert found["warning"] == "under 30 questions"
    assert "windows" not in {each["by"] for each in found["slices"]}
    assert found["systems"][0]["notes"] == [
        "no slices by windows: only the output folder of a run says which tokenizer and lengths it had"
    ]
    assert analyzed(capsys, answers, "--references", references) == found
    assert analyzed(capsys, answers, "--references", references, "--seed", "1")["f1"] != {}


def test_differences_by_hand(references: str, tmp_path: Path, capsys: Capture) -> None:
    first = write(tmp_path / "first.json", RIGHT)
    second = write(tmp_path / "second.json", {**RIGHT, "b": "in 1911", "c": "Nobody"})
    found = analyzed(capsys, first, second, "--references", references, "--resamples", "1000")
    assert [system["name"] for system in found["systems"]] == ["first.json", "second.json"]
    assert found["f1"] == found["systems"][0]["f1"]
    (pair,) = found["paired"]
    assert (pair["first"], pair["second"]) == ("first.json", "second.json")
    exact = pair["exact_match"]
    assert (exact["value"], exact["low"], exact["high"]) == (50, 50, 50)
    # Two contexts with the same difference: two of four ways to choose the signs are as far from 0, and so are two of
    # the four that the two questions with a difference have.
    assert exact["p_randomization"] == exact["over_questions"]["p_randomization"] == 0.5
    assert exact["p_bootstrap"] == pytest.approx(2 / 1001)
    assert pair["f1"]["value"] == pytest.approx(100 * (1 / 3 + 1) / 4)


def test_a_table_for_people(references: str, tmp_path: Path, capsys: Capture) -> None:
    first = write(tmp_path / "first.json", RIGHT)
    second = write(tmp_path / "second.json", {**RIGHT, "b": "in 1911"})
    assert main([first, second, "--references", references, *FEW]) == 0
    table = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in table.splitlines()]
    assert rows[0] == "4 questions about 2 contexts"
    assert "first.json 100.00 100.00 to 100.00 100.00 to 100.00 100.00 100.00 to 100.00 100.00 to 100.00" in rows
    assert any(row.startswith("first.json second.json +25.00 0.00 to 50.00 1.0000 ") for row in rows)
    assert any(row.startswith("who 2 100.00 ") and row.endswith("under 30 questions") for row in rows)
    assert "boundary: holds a whole reference and more 1 25.0 % 66.67" in rows
    assert "no mistakes" in rows
    # Titles are other people's text.
    assert "\x1b" not in table
    assert any(row.startswith("A?[2Jtitle 4 ") for row in rows)


# ---------------------------------------------------------------------------------------------------------------- runs


def run_folder(folder: Path, answers: dict[str, str], **options: Any) -> str:
    """As training leaves it, as far as it is looked at."""
    folder.mkdir()
    write(folder / "predictions.json", answers)
    write(folder / "metrics.json", {"answer_normalization": "squad"})
    # JSON is YAML too.
    write(folder / "config.yaml", {**RunConfig().flat(), "output_dir": str(folder), **options})
    return str(folder)


def test_seeds_are_put_together(references: str, tmp_path: Path, capsys: Capture) -> None:
    wrong = dict.fromkeys(RIGHT, "wrong")
    runs = [
        run_folder(tmp_path / "one", RIGHT, seed=1, disable_tqdm=True, tune_on="no"),
        run_folder(tmp_path / "two", {**wrong, "a": RIGHT["a"]}, seed=2),
        run_folder(tmp_path / "other", wrong, seed=3, lora_r=4),
        run_folder(tmp_path / "again", wrong, seed=3, lora_r=16),
    ]
    found = analyzed(capsys, *runs, "--references", references, *FEW)
    # 100 and 25: their mean, and 75 divided by the square root of two.
    (group,) = found["seeds"]
    assert (group["systems"], group["seeds"]) == (["one", "two"], [1, 2])
    assert group["f1"] == group["exact_match"] == {"mean": 62.5, "std": pytest.approx(53.0330085889911)}
    assert len(found["paired"]) == 6
    assert found["notes"] == []
    assert main([*runs[:2], "--references", references, *FEW]) == 0
    assert "2 seeds (1, 2) of one, two, mean and standard deviation: EM 62.50 +- 53.03, F1" in capsys.readouterr().out


def test_a_seed_that_is_there_twice_is_said(references: str, tmp_path: Path, capsys: Capture) -> None:
    seeds = {"one": 1, "two": 2, "again": 2, "third": 3, "last": 3}
    runs = [run_folder(tmp_path / name, RIGHT, seed=seed) for name, seed in seeds.items()]
    found = analyzed(capsys, *runs, "--references", references, *FEW)
    assert found["seeds"] == []
    note = (
        "no mean over the seeds of one, two, again, third, last: two and again have seed 2, third and last have "
        "seed 3; name one run for each seed"
    )
    assert found["notes"] == [note]
    assert main([*runs, "--references", references, *FEW]) == 0
    assert f"\nnote: {note}\n" in capsys.readouterr().out
    # A page about these runs has the same notes.
    assert note in scored(read_runs(runs), references, None, Resampling(100)).notes


def test_options_beside_the_results_are_options() -> None:
    assert set(BESIDE_RESULTS) < set(RunConfig().flat())


def test_windows_of_a_run(tmp_path: Path, capsys: Capture) -> None:
    data = tiny_squad(tmp_path / "dev.json", 40, seed=3, longest=120)
    questions = read_questions(data)
    answers = {each.id: each.answers[0].text for each in questions.examples}
    run = run_folder(tmp_path / "run", answers, max_seq_length=48, doc_stride=12)
    without = analyzed(capsys, run, "--references", str(data), *FEW)
    assert "windows" not in {each["by"] for each in without["slices"]}
    assert without["systems"][0]["notes"] == [f"no slices by windows: {run} holds no tokenizer"]
    save_tokenizer(Path(run))
    (Path(run) / "config.yaml").rename(tmp_path / "config.yaml")
    unsaid = analyzed(capsys, run, "--references", str(data), *FEW)
    assert unsaid["systems"][0]["notes"] == [f"no slices by windows: {run} has no config.yaml that says the lengths"]
    (tmp_path / "config.yaml").rename(Path(run) / "config.yaml")
    found = analyzed(capsys, run, "--references", str(data), *FEW)
    assert found["systems"][0]["notes"] == []
    features, _ = FeatureBuilder(TokenizerSpec.of(tiny_tokenizer()), FeatureSpec(48, 12)).build(questions.examples)
    counts = [sum(each.example_index == row for each in features) for row in range(40)]
    expected = {str(count): counts.count(count) for count in (1, 2, 3) if count in counts}
    if beyond := sum(count > 3 for count in counts):
        expected["4 or more"] = beyond
    assert len(expected) > 2
    assert {each["value"]: each["n"] for each in found["slices"] if each["by"] == "windows"} == expected


def test_a_run_of_a_version_before(tmp_path: Path, capsys: Capture) -> None:
    earlier = FIXTURES / "earlier"
    run = tmp_path / "run"
    shutil.copytree(earlier / "run", run)
    found = analyzed(capsys, str(run), "--references", str(earlier / "dev.json"), *FEW)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert (found["exact_match"]["value"], found["f1"]["value"]) == (metrics["exact_match"], metrics["f1"])
    assert sum(each["n"] for each in found["mistakes"]) == metrics["num_examples"]
    lists = json.loads((run / "nbest.json").read_text(encoding="utf-8"))
    texts = json.loads((run / "predictions.json").read_text(encoding="utf-8"))
    # Confidences are the probabilities that the run wrote.
    bins = found["calibration"]["before"]["bins"]
    written = [next(entry["probability"] for entry in lists[key] if entry["text"] == texts[key]) for key in texts]
    assert sum(each["n"] for each in bins) == found["calibration"]["num_questions"] == len(texts)
    assert sum(each["n"] * each["confidence"] for each in bins) == pytest.approx(100 * sum(written))
    # Deciding by the threshold gives the score that it promises, which is no less than the run's.
    odds, best = load_null_odds(run / "null_odds.json"), found["null_threshold"]
    decided = {
        key: "" if odds[key] > best["best_f1_thresh"] else next(entry["text"] for entry in lists[key] if entry["text"])
        for key in texts
    }
    references = load_references(earlier / "dev.json").answers
    assert score_v2(references, decided)["f1"] == pytest.approx(best["best_f1"])
    assert best["best_f1"] >= max(metrics["f1"], metrics["best_f1"])
    assert {each["by"] for each in found["slices"]} >= {"has_answer", "windows"}


def test_places_of_a_run_are_used(references: str, tmp_path: Path, capsys: Capture) -> None:
    run = Path(run_folder(tmp_path / "run", {**RIGHT, "c": "The", "d": "there"}))
    entries = [
        {"text": "other", "score": 2.5, "start_char": 0, "end_char": 5},
        {"text": "Nobody", "score": 1, "start_char": -1, "end_char": -1},
    ]
    write(run / "nbest.json", {"a": entries, "c": [{"text": "The", "score": 0.5, "start_char": 0, "end_char": 3}]})
    found = analyzed(capsys, str(run), "--references", references, *FEW)
    assert {each["kind"]: each["n"] for each in found["mistakes"] if each["n"]} == {"unanswered": 1, "wrong_words": 1}


def test_other_questions_with_the_same_ids_are_said(references: str, tmp_path: Path, capsys: Capture) -> None:
    run = run_folder(tmp_path / "run", RIGHT)
    for f1, rules, is_said in ((100.0, "squad", False), (40.0, "squad", True), (40.0, "none", False)):
        write(tmp_path / "run" / "metrics.json", {"answer_normalization": "squad", "f1": f1})
        words = (run, "--references", references, "--answer_normalization", rules, *FEW)
        notes = analyzed(capsys, *words)["systems"][0]["notes"]
        note = "its metrics.json has an F1 of 40.00, and on these questions its answers have 100.00: they are not (all)"
        assert any(each.startswith(note) for each in notes) == is_said, (f1, rules)


def test_null_odds_are_left_to_another_command(references: str, tmp_path: Path, capsys: Capture) -> None:
    rows = [{"id": key, "prediction_text": text, "no_answer_probability": 0.1} for key, text in RIGHT.items()]
    found = analyzed(capsys, write(tmp_path / "rows.json", rows), "--references", references, *FEW)
    assert found["systems"][0]["notes"][0].startswith("no_answer_probability is not used; qa-dist score takes it")


def test_predictions_for_unknown_questions_are_said(references: str, tmp_path: Path, capsys: Capture) -> None:
    more = write(tmp_path / "more.json", {**RIGHT, "y": "x", "x": "x"})
    found = analyzed(capsys, more, "--references", references, *FEW)
    assert found["exact_match"]["value"] == 100
    note = "predictions for 2 unknown questions ('y', 'x') are ignored"
    assert found["systems"][0]["notes"][0] == note
    assert score.main(["--references", references, "--predictions", more]) == 0
    assert f"note: {note}\n" in capsys.readouterr().err
    assert main([more, "--references", references, *FEW]) == 0
    assert f"note: {note}\n" in capsys.readouterr().out
    # A question whose answers nobody knows is no unknown one.
    unlabelled = squad()
    del unlabelled["data"][0]["paragraphs"][1]["qas"][1]["answers"]
    some = write(tmp_path / "some.json", unlabelled)
    found = analyzed(capsys, write(tmp_path / "right.json", RIGHT), "--references", some, *FEW)
    assert found["num_questions"] == 3
    assert len(found["systems"][0]["notes"]) == 1


def test_a_run_on_some_questions_is_analyzed_on_these(references: str, tmp_path: Path, capsys: Capture) -> None:
    texts = {**RIGHT, "b": "in 1911"}
    some = run_folder(tmp_path / "some", {key: texts[key] for key in ("d", "a", "b")}, max_eval_samples=3)
    other = run_folder(tmp_path / "other", {key: texts[key] for key in ("b", "c")}, max_eval_samples=2)
    whole = write(tmp_path / "whole.json", RIGHT)
    for systems, count, said in (
        ([some], 3, ""),
        ([whole, some], 3, " by every run"),
        ([some, other], 1, " by every run"),
    ):
        assert main([*systems, "--references", references, "--json", *FEW]) == 0
        captured = capsys.readouterr()
        found = json.loads(captured.out)
        assert found["num_questions"] == count
        note = (
            f"{count} of the 4 questions of {references} are answered{said}; what is said about answers is about these"
        )
        assert captured.err == f"qa_dist.analyze: note: {note}\n"
        assert not any("unknown" in note for system in found["systems"] for note in system["notes"])
    assert analyzed(capsys, some, "--references", references, *FEW)["exact_match"]["value"] == pytest.approx(200 / 3)
    # What is missing is wrong where that is asked for; a run without the option has to answer all.
    found = analyzed(capsys, some, "--references", references, "--allow_missing", *FEW)
    assert (found["num_questions"], found["exact_match"]["value"]) == (4, 50)
    third = run_folder(tmp_path / "third", {"d": "x"}, max_eval_samples=1)
    without = run_folder(tmp_path / "without", {"a": "x"})
    foreign = run_folder(tmp_path / "foreign", {"z": "x"}, max_eval_samples=1)
    for systems, part in (
        ([other, third], f"{other}, {third}: no question of {references} is answered by each of these runs"),
        ([without], "without: 3 questions ('b', 'c', 'd') without predictions"),
        ([some, without], "without: 2 questions ('b', 'd') without predictions"),
        ([foreign], "foreign answers none of the 4 questions of"),
    ):
        assert part in refusal(main, [*systems, "--references", references, *FEW], capsys)


# --------------------------------------------------------------------------------------------------------- what is bad


def test_what_cannot_be_analyzed_is_one_sentence(references: str, tmp_path: Path, capsys: Capture) -> None:
    good = write(tmp_path / "good.json", RIGHT)
    empty, torn = tmp_path / "empty", tmp_path / "torn"
    empty.mkdir()
    run_folder(torn, RIGHT)
    write(torn / "nbest.json", {"a": [{"text": "x"}]})
    korean, chinese = run_folder(tmp_path / "korean", RIGHT), run_folder(tmp_path / "chinese", RIGHT)
    for folder, rules in ((korean, "korquad"), (chinese, "mlqa:zh")):
        write(Path(folder) / "metrics.json", {"answer_normalization": rules, "f1": 0.0})
    link = tmp_path / "link.json"
    link.symlink_to(good)
    no_context = squad()
    del no_context["data"][0]["paragraphs"][0]["context"]
    no_answers = squad()
    for paragraph in no_answers["data"][0]["paragraphs"]:
        for qa in paragraph["qas"]:
            del qa["answers"]
    others = {f"other {key}": text for key, text in RIGHT.items()}
    for words, part in (
        ([], "the following arguments are required: PREDICTIONS|RUN, --references"),
        ([good], "the following arguments are required: --references"),
        ([str(empty)], "empty holds no predictions.json; name the --output_dir of a run that has ended"),
        ([str(tmp_path / "none.json")], "none.json does not exist; check the path"),
        ([good, good], "good.json: the same predictions twice; name each system once"),
        ([good, str(link)], "link.json: the same predictions twice"),
        ([str(torn), str(torn / "predictions.json")], "the same predictions twice"),
        ([str(torn)], "does not for 1 id ('a'); mend or remove it"),
        ([korean, chinese], "scored by different rules (korean by korquad, chinese by mlqa:zh); choose with"),
        ([write(tmp_path / "nothing.json", {})], "nothing.json answers none of the 4 questions of"),
        ([write(tmp_path / "others.json", others)], "others.json answers none of the 4 questions of"),
        ([write(tmp_path / "a.json", {"a": "x"})], "a.json: 3 questions ('b', 'c', 'd') without predictions"),
        ([write(tmp_path / "list.json", [])], "holds a list without rows"),
        ([good, "--resamples", "99"], "'99' is not a whole number from 100 to 1,000,000"),
        ([good, "--seed", "-1"], "'-1' is not a whole number"),
        ([good, "--answer_normalization", "klingon"], "klingon is not one of squad"),
        ([good, "--references", write(tmp_path / "bare.json", no_context)], "4 questions"),
        ([good, "--references", write(tmp_path / "test.json", no_answers)], "holds no answers"),
        ([good, "--references", write(tmp_path / "void.json", {"data": []})], "holds no questions"),
    ):
        own = [] if "--references" in words or part.startswith("the following") else ["--references", references]
        if "bare.json" in " ".join(words):
            part = "2 questions ('a', 'b') cannot be told with a context"
        assert part in refusal(main, [*words, *own], capsys), words


def test_missing_predictions_are_wrong_where_that_is_allowed(references: str, tmp_path: Path, capsys: Capture) -> None:
    some = write(tmp_path / "some.json", {"a": "Ada Kerrow"})
    found = analyzed(capsys, some, "--references", references, "--allow_missing", *FEW)
    assert found["exact_match"]["value"] == 25
    assert {each["kind"]: each["n"] for each in found["mistakes"] if each["n"]} == {"no_prediction": 3}


def test_systems_of_one_name_are_told_apart(references: str, tmp_path: Path, capsys: Capture) -> None:
    paths = []
    for name, answer in (("x", "Ada"), ("y", "Kerrow")):
        (tmp_path / name).mkdir()
        paths.append(write(tmp_path / name / "answers.json", {**RIGHT, "a": answer}))
    found = analyzed(capsys, *paths, "--references", references, *FEW)
    assert [each["name"] for each in found["systems"]] == paths
    assert found["paired"][0]["f1"]["value"] == 0
    assert found["paired"][0]["f1"]["p_randomization"] == 1
