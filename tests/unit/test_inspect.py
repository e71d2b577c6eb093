"""`qa-dist inspect`: examples token by token, against the tokenizer itself and what is known of SQuAD's first one."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qa_dist import Reader, prepare
from qa_dist.evaluation.ceiling import ceiling
from qa_dist.evaluation.normalization import SQUAD
from qa_dist.inspect_command import main
from qa_dist.reporting.data_set import WHY_NOT, distribution
from qa_dist.reporting.suggestions import LENGTHS, TOLERANCE, suggestions
from tests.refusals import refusal
from tests.support.html import Page
from tests.tiny import tiny_tokenizer
from tests.unit.data_fixtures import prepared, row, run_config, save_tokenizer, write_rows

Capture = pytest.CaptureFixture[str]

WORDS = ("mora", "lies", "on", "a", "lake", "is", "deep", ".", "where", "does", "lie", "?")
TOKENIZER = tiny_tokenizer(words=WORDS)
LONG = "Mora lies on a lake. The lake is deep. " * 3
AT = LONG.rindex("deep")
ROWS = [
    row("first", title="A\x1b[2Jtown", context="Mora lies\non a lake.\x1b[31m\u202e The lake is deep."),
    row("windows", context=LONG, answers={"text": ["deep"], "answer_start": [AT]}),
    row("empty", answers={"text": [], "answer_start": []}),
    row("wide", context="日本 lake 日本", answers={"text": ["lake"], "answer_start": [3]}),
]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inspected")
    data = write_rows(folder / "train.jsonl", *ROWS)
    tokenizer = save_tokenizer(folder / "tokenizer", TOKENIZER)
    words = ["--train_file", data, "--model_name_or_path", tokenizer, "--store_dir", str(folder / "stores")]
    return [*words, "--max_seq_length", "24", "--doc_stride", "4"]


def inspected(capsys: Capture, *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def text_of(capsys: Capture, *words: str) -> str:
    assert main([*words]) == 0
    return capsys.readouterr().out


def test_the_page_of_a_data_set(capsys: Capture, flags: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    found = inspected(capsys, *flags)
    path = tmp_path / "pages" / "data.html"
    assert main([*flags, "--html", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    page = Page(path.read_text(encoding="utf-8"))
    assert list(page.parts) == ["", "ceiling", "lengths", "counts"]
    assert f"F1 {found['ceiling']['f1']:.2f}" in page.parts[""]
    for count, example in ((found["num_features"], ""), (found["num_tokens"], "")):
        assert f"{count:,}{example}" in page.parts[""]
    for reason, examples in found["ceiling"]["examples"].items():
        assert WHY_NOT[reason] in page.parts["ceiling"]
        for each in examples:
            assert each["question"] in page.parts["ceiling"]
            assert f"{each['best_f1']:.1f}" in page.parts["ceiling"]
    for each in found["lengths"].values():
        assert f"{each['p95']:,}" in page.parts["lengths"]
    assert page.elements["svg"] == 4
    # Lengths and their counts are whole numbers.
    ticks = re.findall(r"text-anchor: (?:middle|end)[^>]*>([^<]*)<", path.read_text(encoding="utf-8"))
    assert len(ticks) > 8
    assert all(tick.isdigit() for tick in ticks if tick != "tokens")
    assert page.elements["script"] == 0
    urls = [value for name, value in page.attributes if name in ("src", "href", "action")]
    assert all(str(url).startswith(("#", "data:")) for url in urls)
    written = path.read_bytes()
    assert main([*flags, "--html", str(path)]) == 0
    assert path.read_bytes() == written


def test_a_page_is_about_the_data_set(capsys: Capture, flags: list[str], tmp_path: Path) -> None:
    for more, other in ((["--id", "first"], "--id or --feature"), (["--suggest"], "--suggest"), (["--json"], "--json")):
        words = [*flags, "--html", str(tmp_path / "x"), *more]
        assert f"without {other}; keep one" in refusal(main, words, capsys)
    assert "is a folder; name a file" in refusal(main, [*flags, "--html", str(tmp_path)], capsys)
    data = Path(flags[flags.index("--train_file") + 1])
    before = data.read_bytes()
    assert "exists and is no page" in refusal(main, [*flags, "--html", str(data)], capsys)
    assert data.read_bytes() == before


def test_windows_are_those_of_the_tokenizer(capsys: Capture, flags: list[str]) -> None:
    found = inspected(capsys, *flags, "--id", "windows")
    expected = TOKENIZER(
        *(ROWS[1]["question"], LONG),
        **{"truncation": "only_second", "max_length": 24, "stride": 4},
        **{"return_overflowing_tokens": True, "return_offsets_mapping": True},
    )
    assert found["num_windows"] == len(found["features"]) == len(expected["input_ids"]) > 2
    for number, feature in enumerate(found["features"]):
        tokens = feature["tokens"]
        assert (feature["feature"], feature["window"]) == (number + 1, number), "the first example has one window"
        assert [token["id"] for token in tokens] == expected["input_ids"][number]
        assert [token["type"] for token in tokens] == expected["token_type_ids"][number]
        assert [token["piece"] for token in tokens] == expected[number].tokens
        parts = {None: "special", 0: "question", 1: "context"}
        assert [token["part"] for token in tokens] == [parts[part] for part in expected.sequence_ids(number)]
        assert [(token["start_char"], token["end_char"]) for token in tokens if token["part"] == "context"] == [
            place
            for place, part in zip(expected["offset_mapping"][number], expected.sequence_ids(number), strict=True)
            if part == 1
        ]
        held = [token["position"] for token in tokens if token["start_char"] == AT]
        assert feature["has_answer"] == bool(held)
        assert [feature["start_token"], feature["end_token"]] == [*(held or [0])] * 2
        assert feature["decoded"] == ("deep" if held else "[CLS]")
        assert feature["text"] == ("deep" if held else None)
        labels = {token["position"]: token["label"] for token in tokens if token["label"]}
        assert labels == {feature["start_token"]: "start end"}
    assert {feature["has_answer"] for feature in found["features"]} == {True, False}


def test_the_record_is_as_it_was_read(capsys: Capture, flags: list[str]) -> None:
    example = inspected(capsys, *flags, "--id", "empty")["example"]
    assert (example["index"], example["num_examples"], example["id"]) == (2, 4, "empty")
    assert (example["question"], example["context"]) == (ROWS[2]["question"], ROWS[2]["context"])
    assert (example["answers"], example["is_unanswerable"]) == ([], True)


def test_a_feature_by_its_number(capsys: Capture, flags: list[str]) -> None:
    windows = inspected(capsys, *flags, "--id", "windows")
    for feature in windows["features"]:
        found = inspected(capsys, *flags, "--feature", str(feature["feature"]))
        assert found == {**windows, "features": [feature]}


def test_what_a_person_sees(capsys: Capture, flags: list[str]) -> None:
    shown = text_of(capsys, *flags, "--id", "first")
    assert "[on a lake]" in shown
    assert 'label: start 9, end 11; these tokens decode to "on a lake", and stand for "on a lake"' in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("11 "))
    assert line.split() == ["11", str(TOKENIZER.convert_tokens_to_ids("lake")), "lake", "1", "context", "15-19", "end"]
    shown = text_of(capsys, *flags, "--id", "empty")
    assert "none: the text does not say" in shown
    assert "no answer in this window, so token 0 ([CLS]) is start and end" in shown


def test_nothing_in_the_data_is_obeyed_by_the_terminal(capsys: Capture, flags: list[str]) -> None:
    shown = text_of(capsys, *flags, "--id", "first")
    assert "A\ufffd[2Jtown" in shown
    assert not {"\x1b", "\u202e", "\x02", "\x03"} & set(shown)


def test_colours_are_for_terminals(capsys: Capture, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = text_of(capsys, *flags, "--id", "first").splitlines()
    assert any("\x1b[1;32mon a lake\x1b[0m" in line for line in lines)
    green = [line for line in lines if line.startswith("\x1b[1;32m") and line.endswith("\x1b[0m")]
    assert [line.removeprefix("\x1b[1;32m").split()[2] for line in green] == ["on", "a", "lake"]
    assert all(line.count("\x1b[1;32m") + line.count("\x1b[2m") == line.count("\x1b[0m") for line in lines)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in text_of(capsys, *flags, "--id", "first")


def test_an_answer_over_several_lines_is_coloured_on_each(capsys: Capture, flags: list[str], tmp_path: Path) -> None:
    from qa_dist.answering.terminal import Style
    from qa_dist.reporting.example_lines import example_lines

    data = write_rows(
        tmp_path / "a.jsonl", row("a", context=LONG, answers={"text": [LONG.strip()], "answer_start": [0]})
    )
    found = {"split": "train", **inspected(capsys, *flags, "--train_file", data, "--id", "a")}
    lines = list(example_lines(found, Style(is_terminal=True, has_colours=True, width=50)))
    context = lines[3:6]
    assert [line.strip().startswith("\x1b[1;32m") for line in context[1:]] == [True, True]
    assert all(line.endswith("\x1b[0m") for line in context)


def test_counts_and_lengths_are_those_of_the_records(capsys: Capture, flags: list[str]) -> None:
    found = inspected(capsys, *flags)
    whole = [TOKENIZER(each["question"], each["context"]).sequence_ids() for each in ROWS]
    windows = [
        len(
            TOKENIZER(
                *(each["question"], each["context"]),
                **{"truncation": "only_second", "max_length": 24, "stride": 4, "return_overflowing_tokens": True},
            )["input_ids"]
        )
        for each in ROWS
    ]
    assert (found["num_examples"], found["num_contexts"], found["num_features"]) == (4, 4, sum(windows))
    assert found["windows_per_example"] == {str(count): windows.count(count) for count in sorted(set(windows))}
    lengths = found["lengths"]
    for name, part in (("question", 0), ("context", 1)):
        expected = sorted(ids.count(part) for ids in whole)
        assert (lengths[name]["min"], lengths[name]["max"]) == (expected[0], expected[-1])
        assert lengths[name]["mean"] == sum(expected) / 4
        assert lengths[name]["p50"] == expected[1]
        assert sum(each["n"] for each in lengths[name]["histogram"]) == 4
    assert lengths["feature"]["max"] == 24
    assert (lengths["answer"]["n"], lengths["answer"]["mean"]) == (3, (3 + 1 + 1) / 3)
    assert (found["num_unanswerable"], found["unanswerable_share"]) == (1, 0.25)
    assert found["answers_per_question"] == {"0": 1, "1": 3}
    assert found["question_words"] == {"where": 4}
    contexts = [token for each in ROWS for token in TOKENIZER.tokenize(each["context"])]
    assert contexts.count("[UNK]") > 0, "the example above it"
    assert found["unknown_token_share"] > 0


def test_a_context_that_two_questions_share_is_measured_once(capsys: Capture, flags: list[str], tmp_path: Path) -> None:
    data = write_rows(
        tmp_path / "a.jsonl", row("a"), row("b", question="Where?"), row("c", context="Mora lies on a lake")
    )
    lengths = inspected(capsys, *flags, "--train_file", data)["lengths"]
    assert (lengths["question"]["n"], lengths["context"]["n"]) == (3, 2)
    assert (lengths["context"]["min"], lengths["context"]["max"]) == (5, 11)


def test_quantiles_and_bins_by_hand() -> None:
    found = distribution(np.array([3] * 90 + [7] * 9 + [25], np.int64))
    assert [found[name] for name in ("n", "mean", "min", "max")] == [100, 3.58, 3, 25]
    assert [found[name] for name in ("p5", "p50", "p95", "p99")] == [3, 3, 7, 7]
    assert [each["n"] for each in found["histogram"]] == [90, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert (found["histogram"][0]["first"], found["histogram"][-1]["last"]) == (2, 25)
    assert distribution(np.array([], np.int64)) == {"n": 0}


@pytest.fixture(scope="module")
def out_of_reach(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Validation data with a question for each reason, and one that can be answered."""
    cut = LONG + "where does Mora lie ? " * 2
    return write_rows(
        tmp_path_factory.mktemp("reach") / "dev.jsonl",
        row("fine"),
        row("inside", answers={"text": ["ora"], "answer_start": [1]}),
        row("long", context=LONG, answers={"text": [LONG[:32]], "answer_start": [0]}),
        row("cut", context=cut, answers={"text": [cut[30:110]], "answer_start": [30]}),
        row("gone", answers={"text": ["a sea"], "answer_start": [-1]}),
        row("article", answers={"text": ["a"], "answer_start": [13]}),
    )


def test_the_ceiling_with_the_reasons_and_their_examples(capsys: Capture, flags: list[str], out_of_reach: str) -> None:
    words = [*flags[2:], "--validation_file", out_of_reach, "--max_answer_length", "5"]
    found = inspected(capsys, *words)
    best = found["ceiling"]
    reasons = ("off_token_boundaries", "too_long", "in_no_window", "not_in_context", "lost_to_normalization")
    assert best["reasons"] == dict.fromkeys(reasons, 1)
    ids = {reason: [each["id"] for each in examples] for reason, examples in best["examples"].items()}
    assert ids == dict(zip(reasons, (["inside"], ["long"], ["cut"], ["gone"], ["article"]), strict=True))
    assert best["exact_match"] == pytest.approx(100 * 2 / 6)
    assert prepare.main(words) == 0
    prepared = json.loads(capsys.readouterr().out)
    assert prepared["ceiling"] == {name: best[name] for name in ("exact_match", "f1")}
    assert prepared["unknown_token_share"] == pytest.approx(found["unknown_token_share"], abs=1e-6)
    shown = text_of(capsys, *words)
    assert f"at best EM {best['exact_match']:.2f}, F1 {best['f1']:.2f}" in shown
    assert "1 of 6 questions have answers that are in no window as a whole\n    cut: Where does Mora lie?\n" in shown
    assert "a sea (best F1" in shown


@pytest.mark.parametrize("num_tokens", [1, 60])
def test_where_the_ceiling_was_not_searched_to_the_end_is_said(
    num_tokens: int,
    capsys: Capture,
    flags: list[str],
    out_of_reach: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    words = [*flags[2:], "--validation_file", out_of_reach, "--max_answer_length", "5"]
    words[words.index("--store_dir") + 1] = str(tmp_path / "stores")
    whole = inspected(capsys, *words)["ceiling"]
    monkeypatch.setattr("qa_dist.evaluation.ceiling.MAX_TOKENS", num_tokens)
    best = inspected(capsys, *words)["ceiling"]
    assert (whole["num_unsearched"], best["num_unsearched"] > 0) == (0, True)
    assert sum(best["reasons"].values()) == sum(whole["reasons"].values()) - best["num_unsearched"]
    assert best["f1"] > whole["f1"]
    assert prepare.main(words) == 0
    assert json.loads(capsys.readouterr().out)["num_unsearched"] == best["num_unsearched"]
    note = f"{best['num_unsearched']} of 6 questions were not searched for their best answer, which would take long"
    assert note in text_of(capsys, *words)
    assert main([*words, "--html", str(tmp_path / "data.html")]) == 0
    assert note in Page((tmp_path / "data.html").read_text(encoding="utf-8")).parts["ceiling"]
    capsys.readouterr()
    found = inspected(capsys, *words, "--suggest")["suggestions"]
    (configured,) = (each for each in found if each["is_configured"])
    assert (configured["num_unsearched"], configured["f1"]) == (best["num_unsearched"], best["f1"])
    bounded = [each["num_unsearched"] for each in found if each["num_unsearched"]]
    assert 0 < len(bounded) < len(found)
    said = f"in {len(bounded)} of these rows up to {max(bounded)} questions were not searched for their best answer"
    assert said in text_of(capsys, *words, "--suggest")
    # No row takes the bound of another one for what was found.
    monkeypatch.undo()
    exact = inspected(capsys, *words, "--suggest")["suggestions"]
    pairs = [(one["f1"], other["f1"]) for one, other in zip(found, exact, strict=True) if not one["num_unsearched"]]
    assert all(one == other for one, other in pairs)


def test_unlabelled_data_have_no_ceiling(capsys: Capture, flags: list[str], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "dev.jsonl", row("a", answers=...))
    words = [*flags[2:], "--validation_file", data]
    found = inspected(capsys, *words)
    assert (found["ceiling"], found["num_without_references"], found["lengths"]["answer"]) == (None, 1, {"n": 0})
    assert "no answers are known" in text_of(capsys, *words)


def test_suggestions_are_what_preparing_each_would_give(tmp_path: Path) -> None:
    asked = "where does Mora lie ? " * 5
    data = write_rows(
        tmp_path / "dev.jsonl",
        *(row("a"), row("b", context=LONG * 3, answers={"text": ["deep"], "answer_start": [AT]})),
        row("c", context=LONG, question=asked, answers={"text": [LONG[:37], "mora"], "answer_start": [0, -1]}),
        row("d", context=LONG + "lake", question="is a", answers={"text": [LONG[30:110]], "answer_start": [30]}),
        row("e", context=LONG, answers={"text": [], "answer_start": []}),
    )
    options = {"validation_file": data, "max_seq_length": 30, "doc_stride": 9}
    folder = save_tokenizer(tmp_path / "tokenizer", TOKENIZER)
    config = run_config(folder, tmp_path / "stores", **options)
    store = prepared(config, "validation")
    assert store.stats.num_truncated_questions == 1, "the length of a question that was cut is found again"
    found = suggestions(store, TOKENIZER, config, lengths=(24, 32, 64, 200))
    assert len(found) == 13
    for each in found:
        lengths = {name: each[name] for name in ("max_seq_length", "doc_stride")}
        other = prepared(run_config(folder, tmp_path / "stores", **{**options, **lengths}), "validation")
        assert (each["num_features"], each["num_tokens"]) == (other.num_features, int(other.lengths.sum()))
        best = ceiling(other, SQUAD, max_answer_length=30, version_2=True)
        assert best is not None
        assert (each["exact_match"], each["f1"]) == (best.exact_match, best.f1)
        assert each["is_configured"] == (lengths == {"max_seq_length": 30, "doc_stride": 9})
    assert len({each["exact_match"] for each in found}) > 1
    (chosen,) = (each for each in found if each["is_suggested"])
    best_f1, best_em = (max(each[name] for each in found) for name in ("f1", "exact_match"))
    good = [each for each in found if min(each["f1"] - best_f1, each["exact_match"] - best_em) >= -TOLERANCE]
    assert 1 < len(good) < len(found)
    assert chosen["num_tokens"] == min(each["num_tokens"] for each in good)


def test_suggestions_as_a_table_and_as_json(capsys: Capture, flags: list[str]) -> None:
    rows = inspected(capsys, *flags, "--suggest")["suggestions"]
    assert [each["max_seq_length"] for each in rows if each["is_configured"]] == [24]
    assert {each["max_seq_length"] for each in rows} == {24, *LENGTHS}
    shown = text_of(capsys, *flags, "--suggest").splitlines()
    assert len(shown) == len(rows) + 3
    (line,) = (line for line in shown if line.endswith("as configured"))
    assert line.split()[:4] == ["24", "4", str(rows[0]["num_features"]), str(rows[0]["num_tokens"])]
    assert sum(line.endswith(" suggested") for line in shown) == 1


def test_an_example_may_be_called_none(capsys: Capture, flags: list[str], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", row("a"), row("none"))
    assert inspected(capsys, *flags, "--train_file", data, "--id", "none")["example"]["index"] == 1


def test_what_a_model_says_is_what_its_evaluation_said(capsys: Capture, trained: Path) -> None:
    n_best = json.loads((trained / "adapter" / "nbest.json").read_text(encoding="utf-8"))
    texts = json.loads((trained / "adapter" / "predictions.json").read_text(encoding="utf-8"))
    adapter = ["--adapter", str(trained / "adapter"), "--split", "validation"]
    found = inspected(capsys, *adapter, "--id", "q3")
    answers = found["answers"]
    assert [each["text"] for each in answers] == [each["text"] for each in n_best["q3"]]
    assert [each["probability"] for each in answers] == pytest.approx([each["probability"] for each in n_best["q3"]])
    assert [each["text"] for each in answers if each["is_chosen"]] == [texts["q3"]]
    best = answers[0]
    scores = [
        first["start_logit"] + last["end_logit"]
        for feature in found["features"]
        for first in feature["tokens"]
        for last in feature["tokens"]
        if (first["start_char"], last["end_char"]) == (best["start_char"], best["end_char"])
    ]
    assert max(scores) == pytest.approx(best["score"], abs=1e-5)
    shown = text_of(capsys, *adapter, "--id", "q3").splitlines()
    assert "name it with --id or --feature" in refusal(main, adapter, capsys)
    told = refusal(main, [*adapter, "--id", "q3", "--lora_r", "4"], capsys)
    assert "--lora_r: the model is trained, with values of its own that stay; leave it out here" in told
    token = max(found["features"][0]["tokens"], key=lambda each: each["start_logit"])
    (line,) = (line for line in shown if line.split()[:2] == [str(token["position"]), str(token["id"])])
    assert f"{token['start_logit']:.2f}  {'#' * 16}  " in line
    assert sum('  "' in line for line in shown[-len(answers) :]) == len(answers)


def test_a_model_answers_from_all_windows_whichever_is_shown(capsys: Capture, trained: Path) -> None:
    words = ["--adapter", str(trained / "adapter"), "--max_seq_length", "20", "--doc_stride", "2"]
    found = inspected(capsys, *words, "--id", "q3")
    assert found["num_windows"] > 1
    last = found["features"][-1]
    alone = inspected(capsys, *words, "--feature", str(last["feature"]))
    assert (alone["features"], alone["answers"]) == ([last], found["answers"])
    answer = Reader(trained / "adapter", max_seq_length=20, doc_stride=2).answer(
        found["example"]["question"], found["example"]["context"]
    )
    (chosen,) = (each for each in found["answers"] if each["is_chosen"])
    assert (answer.text, answer.start_char) == (chosen["text"], chosen["start_char"])


def test_wide_characters_take_two_columns() -> None:
    from qa_dist.reporting.columns import aligned

    rows = [("piece", "x"), ("日本", "1"), ("e\u0301", "22")]
    assert list(aligned(rows, left=(0,))) == ["piece   x", "日本    1", "e\u0301      22"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--id", "fifth"], ("no example with the id fifth among the 4", "first, windows, empty")),
        (["--feature", "1000"], ("there is no feature 1000", "a number from 0 to")),
        (["--feature", "-1"], ("--feature -1 is out of range",)),
        (["--feature", "1", "--id", "first"], ("each name what to show",)),
        (["--adapter", "/no/such", "--id", "first"], ("--adapter /no/such is not a folder",)),
        (["--adapter", str(Path(__file__).parent), "--id", "first"], ("holds no adapter",)),
        (["--suggest", "--id", "none"], ("--suggest is about all examples",)),
        (["--split", "validation", "--feature", "1"], ("--split validation: the data has train only",)),
        (["--feature", "0", "--train_file", "/no/such.json"], ("/no/such.json does not exist",)),
    ],
)
def test_mistakes_are_one_sentence(capsys: Capture, flags: list[str], words: list[str], parts: tuple[str, ...]) -> None:
    said = refusal(main, [*flags, *words], capsys)
    assert all(part in said for part in parts), said


def test_python_s_own_inspect_stays_reachable() -> None:
    package = Path(main.__code__.co_filename).parent
    assert not (package / "inspect.py").exists(), "a file run by its path has its folder before the library"
