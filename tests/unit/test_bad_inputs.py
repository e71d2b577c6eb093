"""Malformed recipes, flags and prediction files: each is refused in one sentence, and nothing is lost.

Malformed data files are in fixtures/malformed and have their table in fixtures/malformed_expected.json; test_squad.py
and test_prepare.py go through them. Models and adapters are spoilt in test_bad_models.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qa_dist import bench, documentation, evaluate, prepare, score, train
from tests.refusals import contents, finished_run, refusal, sentence
from tests.unit.data_fixtures import FIXTURES, MALFORMED

ROOT = Path(__file__).resolve().parents[2]
RECIPES = FIXTURES / "bad_recipes"
SCORES = FIXTURES / "bad_scores"
ENTRIES = {"bench": bench.main, "evaluate": evaluate.main, "prepare": prepare.main, "score": score.main}
ENTRIES |= {"train": train.main, "documentation": documentation.main}

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "finished")


# ----------------------------------------------------------------------------------------------------------- recipes

IN_RECIPES = {
    "alias": "the alias of what stands at line 1 is not allowed",
    "binary_tag": "the tag !!binary at line 1 is not allowed",
    "blank": "is empty; write a line `name: value`",
    "bomb": "the alias of what stands at line 1 is not allowed",
    "choice": "--tuning qlora is not one of lora, full",
    "choice_case": "--tuning LoRA is not one of lora, full",
    "choice_list": "is not one of best, last",
    "config_without_name": "--dataset_config_name needs --dataset_name",
    "control_character": "special characters are not allowed at place 13",
    "dashed_key": "did you mean --learning_rate?",
    "deep": "it is nested too deeply",
    "duplicate_key": "the key 'learning_rate' is there more than once",
    "duplicate_quoted_key": "the key 'seed' is there more than once",
    "empty": "is empty; write a line `name: value`",
    "entry_option": "--adapter is no option here",
    "eval_steps_5000_digits": "is not a number of 1 or more, `epoch` or `no`",
    "eval_steps_word": "is not a number of 1 or more, `epoch` or `no`",
    "four_problems": "4 problems in the configuration",
    "full_with_lora": "--lora_r sets up LoRA but --tuning is full",
    "hub_token": "looks like an access token",
    "indented": "at line 2, column 16",
    "latin1": "is not UTF-8 (byte 15); convert the file",
    "list": "holds a list; write a line",
    "list_key": "the key at line 1 is not text",
    "lone_surrogate": "is not UTF-8",
    "merge_key": "--<< is no option here",
    "names_empty": "--lora_target_modules is empty",
    "names_mapping": "is not a list of names",
    "names_mixed": "mixes a keyword with names",
    "names_nested": "is not a list of names",
    "names_null": "is not a list of names",
    "nested_groups": "--training is no option here",
    "no_space": "at line 2, column 14",
    "nul": "holds the character NUL",
    "number": "holds only 5; write a line",
    "number_key": "--1 is no option here",
    "open_bracket": "expected ',' or ']', but got ':' at line 2",
    "open_quote": "unexpected end of stream",
    "own_tag": "the tag !env at line 1 is not allowed",
    "path_empty": "--train_file '' is empty; give a value or leave the option out",
    "path_false": "--output_dir false is not text; put it in quotes",
    "path_list": "is not text",
    "path_number": "--output_dir 1.1 is not text; put it in quotes",
    "path_tilde": "home folder of a user who does not exist",
    "python_module": "the tag !!python/module:os at line 1 is not allowed",
    "python_name": "the tag !!python/name:os.system at line 1 is not allowed",
    "python_object": "the tag !!python/object/apply:os.system at line 1 is not allowed",
    "question_too_long": "at most 251 fits",
    "rate_comma": "--learning_rate 0,001 is not a number",
    "rate_inf": "--learning_rate inf is out of range; it must be above 0 and finite",
    "rate_nan": "--learning_rate nan is out of range; it must be above 0",
    "rate_percent": "--warmup_ratio 10% is not a number",
    "rate_zero": "--learning_rate 0 is out of range; it must be above 0",
    "recursive_alias": "the alias of what stands at line 1 is not allowed",
    "seed_400_digits": "has too many digits",
    "seed_5000_digits": "has too many digits",
    "seed_beyond_64_bits": "it must be at least 0 and at most 9223372036854775807",
    "seed_date": "--seed 2026-01-01 is not an integer",
    "seed_fraction": "--seed 1.5 is not an integer",
    "seed_list": "--seed [1] is not an integer",
    "seed_mapping": "is not an integer",
    "seed_negative": "--seed -1 is out of range; it must be at least 0",
    "seed_null": "--seed null is not an integer",
    "seed_true": "--seed true is not an integer",
    "seed_without_subset": "--subset_seed draws a subset but",
    "seed_word": "--seed forty-two is not an integer",
    "set_tag": "the tag !!set at line 1 is not allowed",
    "stopping_without_evaluation": "needs evaluations but --eval_steps is no",
    "stride_too_long": "the stride may be at most 122 here",
    "switch_number": "--use_dora 2 is not true or false",
    "switch_word": "--eval_on_start maybe is not true or false",
    "synthetic_huge": "synthetic:N with N from 1 to 10,000,000",
    "synthetic_words": "synthetic:N with N from 1 to 10,000,000",
    "tabs": "at line 2, column 1",
    "text": "holds only 'learning rate of 0.001'",
    "token": "https://***@hub.example/squad holds what looks like an access token or password",
    "two_documents": "expected a single document in the stream, but found another document at line 2",
    "two_sources": "name two sources; keep one of them",
    "undefined_alias": "found undefined alias 'nothing' at line 1",
    "unknown_key": "did you mean --learning_rate?",
    "upper_key": "did you mean --seed?",
    "utf16": "is not UTF-8 (byte 0); convert the file",
}
"""What the message about each recipe must say."""


def test_the_table_of_recipes_is_complete() -> None:
    assert sorted(IN_RECIPES) == sorted(path.stem for path in RECIPES.iterdir())


@pytest.mark.parametrize("name", sorted(IN_RECIPES))
def test_a_bad_recipe_is_refused(name: str, finished: Path, capsys: Capture) -> None:
    before = contents(finished)
    # Recipes that are about the output folder name it themselves; a flag would override them.
    flags = [] if "output_dir" in (RECIPES / f"{name}.yaml").read_bytes().decode("latin-1") else ["--output_dir"]
    argv = ["--config", str(RECIPES / f"{name}.yaml"), *flags, *[str(finished)][: len(flags)], "--overwrite_output_dir"]
    message = refusal(train.main, argv, capsys)
    assert IN_RECIPES[name] in message
    assert ("problems" in message) == (name == "four_problems")
    assert contents(finished) == before


@pytest.mark.parametrize("entry", ["prepare", "evaluate"])
def test_other_entries_refuse_bad_recipes_too(entry: str, finished: Path, capsys: Capture) -> None:
    message = refusal(ENTRIES[entry], ["--config", str(RECIPES / "duplicate_key.yaml")], capsys)
    assert IN_RECIPES["duplicate_key"] in message


# ------------------------------------------------------------------------------------------------------------- flags

LONG = "x" * 5000
TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"

FLAGS: list[tuple[str, list[str], str]] = [
    ("train", [], "--output_dir is missing"),
    ("train", ["--output_dir"], "--output_dir has no value"),
    ("train", ["--output_dir", ""], "--output_dir '' is empty"),
    ("train", ["--output_dir="], "--output_dir '' is empty"),
    ("train", ["OUT", "--train_file", ""], "--train_file '' is empty"),
    ("train", ["OUT", "--dataset_name", ""], "--dataset_name '' is empty"),
    ("train", ["OUT", "--config", ""], "--config '' is neither a file nor a recipe"),
    ("train", ["OUT", "--config", LONG], "is neither a file nor a recipe"),
    ("train", ["OUT", "--config", "/"], "is neither a file nor a recipe"),
    ("train", ["OUT", "--config", "quickstart", "--config", "tutorial"], "--config is given more than once"),
    ("train", ["OUT", "--config", "quickstart", "--config=tutorial"], "--config is given more than once"),
    ("train", ["OUT", "--learning_rat", "1"], "did you mean --learning_rate?"),
    ("train", ["OUT", "--LEARNING_RATE", "1"], "is no option here"),
    ("train", ["OUT", "--learning-rate", "1"], "did you mean --learning_rate?"),
    ("train", ["OUT", "-seed", "1"], "-seed is not an option"),
    ("train", ["OUT", "stray"], "stray is not an option"),
    ("train", ["OUT", "--learning_rate", "-1e-3"], "as --learning_rate=VALUE if it begins with a dash"),
    ("train", ["OUT", "--learning_rate=-1e-3"], "--learning_rate -1e-3 is out of range; it must be above 0"),
    ("train", ["OUT", "--learning_rate", "1,5"], "is not a number"),
    ("train", ["OUT", "--learning_rate", "nan"], "it must be above 0"),
    ("train", ["OUT", "--learning_rate", "1e999"], "it must be above 0"),
    ("train", ["OUT", "--seed", "9" * 5000], "has too many digits"),
    ("train", ["OUT", "--seed", str(2**63)], "at most 9223372036854775807"),
    ("train", ["OUT", "--seed", "1e300"], "at most 9223372036854775807"),
    ("train", ["OUT", "--seed", "½"], "--seed ½ is not an integer"),
    ("train", ["OUT", "--lora_target_modules", ""], "--lora_target_modules is empty"),
    ("train", ["OUT", "--eval_steps", "9" * 5000], "is not a number of 1 or more"),
    ("train", ["OUT", "--dataset_name", "synthetic:" + "9" * 5000], "synthetic:N"),
    ("train", ["OUT", "--dataset_name", "synthetic:0"], "synthetic:N"),
    ("train", ["OUT", "--model_name_or_path", "a\0b"], "holds the character NUL"),
    ("train", ["OUT", "--train_file", "\udcff.json"], "is not UTF-8"),
    ("train", ["OUT", "--model_name_or_path", "~no-such-user-here/model"], "of a user who does not exist"),
    ("train", ["OUT", "--cache_dir", "~no-such-user-here"], "of a user who does not exist"),
    ("train", ["OUT", "--model_revision", TOKEN], "--model_revision *** holds what looks like an access token"),
    ("train", ["OUT", "--dataset_name", f"https://{TOKEN}@hub/x"], "https://***@hub/x holds what looks like"),
    ("train", ["OUT", TOKEN], "*** is not an option"),
    ("train", ["OUT", "--hub_token", TOKEN], "--hub_token is no option here"),
    ("prepare", ["--config", LONG], "is neither a file nor a recipe"),
    ("prepare", ["--model_name_or_path", LONG], "does not exist"),
    ("prepare", ["--model_name_or_path", "/dev/null"], "does not exist"),
    ("prepare", ["--train_file", LONG], "cannot be read (File name too long)"),
    ("prepare", ["--train_file", "https://hub/train.json"], "does not exist"),
    ("prepare", ["--seed", "1"], "--seed is no option here"),
    ("prepare", ["--max_seq_length", "1e3", "--doc_stride", "995"], "--doc_stride 995"),
    ("evaluate", [], "--adapter is missing"),
    ("evaluate", ["--adapter"], "--adapter has no value"),
    ("evaluate", ["--adapter", ""], "--adapter '' is empty"),
    ("evaluate", ["--adapter", LONG], "is not a folder"),
    ("evaluate", ["--adapter", "a\0b"], "holds the character NUL"),
    ("evaluate", ["--adapter", "OUT"], "is not a folder"),
    ("evaluate", ["--adapter", str(FIXTURES)], "holds no adapter and no model"),
    ("bench", [], "nothing cannot be measured; use trainer"),
    ("bench", ["everything"], "'everything' cannot be measured"),
    ("bench", ["paths"], "--output_dir is missing"),
    ("bench", ["paths", "OUT", "--num_features", "5"], "is no multiple of --global_batch_size 16"),
    ("bench", ["scaling", "OUT", "--num_processes", "0"], "--num_processes 0 is not a number of 1 or more"),
    ("bench", ["scaling", "OUT", "--num_processes", "9" * 5000], "is not a number of 1 or more"),
    ("bench", ["paths", "OUT", "--precisions", "fp8"], "--precisions fp8 is not one of no, bf16"),
    ("bench", ["paths", "OUT", "--validation_file", "none.json"], "--validation_file none.json is no file"),
    ("bench", ["paths", "OUT"], "bench.json is no bench.json"),
    ("bench", ["report"], "the following arguments are required: --output"),
    ("bench", ["report", "none.json", "--output", "x.md"], "none.json is no bench.json"),
    (
        "bench",
        ["report", str(SCORES / "references.json"), "--output", "x.md"],
        "is no bench.json ('format' is missing)",
    ),
    ("bench", ["report", str(SCORES / "list.json"), "--output", "x.md"], "is no bench.json"),
    ("bench", ["report", "--output", "/"], "--output / cannot be written"),
    ("documentation", ["none.md"], "none.md cannot be rewritten"),
    ("documentation", [str(MALFORMED / "latin1.json")], "cannot be rewritten"),
    ("score", [], "the following arguments are required: --references, --predictions"),
    ("score", ["--reference", "x"], "the following arguments are required"),
    ("score", ["--references", "a", "--predictions", "b", "--na_prob_thresh", "half"], "'half' is not a number"),
    ("score", ["--references", "a", "--predictions", "b", "--na_prob_thresh", "nan"], "'nan' is not a number"),
    ("score", ["--references", str(ROOT / "launch"), "--predictions", "b"], "is a folder; name one file"),
    ("score", ["--references", LONG, "--predictions", "b"], "File name too long"),
    ("score", ["--references", str(SCORES / "references.json"), "--predictions", "/"], "/ is a folder; name one file"),
]
"""An entry, flags (OUT stands for an --output_dir that holds results and may be overwritten), part of the message."""


@pytest.mark.parametrize(("entry", "words", "part"), FLAGS)
def test_bad_flags_are_refused(entry: str, words: list[str], part: str, finished: Path, capsys: Capture) -> None:
    before = contents(finished)
    argv = []
    for word in words:
        overwrite = ["--overwrite_output_dir=true"] if entry == "train" else []
        argv += ["--output_dir", str(finished), *overwrite] if word == "OUT" and entry != "evaluate" else [word]
    message = refusal(ENTRIES[entry], argv, capsys)
    assert part in message
    assert TOKEN not in message
    assert contents(finished) == before


def test_a_bench_json_of_another_program_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: Capture
) -> None:
    for text in (
        "{}",
        '{"format": 1}',
        '{"format": 1, "sections": [], "headline": {}}',
        '{"format": 99, "sections": {}}',
    ):
        (tmp_path / "bench.json").write_text(text, encoding="utf-8")
        refusal(bench.main, ["paths", "--output_dir", str(tmp_path)], capsys)
        assert (tmp_path / "bench.json").read_text(encoding="utf-8") == text
    sections = {"paths": {"machine": {}, "headline": {}}}
    (tmp_path / "bench.json").write_text(json.dumps({"format": 1, "sections": sections, "headline": {}}))
    assert "'settings' is missing" in refusal(bench.main, ["paths", "--output_dir", str(tmp_path)], capsys)


# ------------------------------------------------------------------------------------------------- files to be scored

IN_SCORES = {
    "blank.json": "is empty",
    "deep.json": "it is nested too deeply",
    "duplicate_id.json": "one object holds the key 'a' more than once",
    "empty.json": "is empty",
    "html.json": "Expecting value at line 1, column 1",
    "hub_layout.json": "row 1 has no prediction_text that is text",
    "huge_number.json": "a number of thousands of digits",
    "jsonl.json": "holds 1 id ('a') more than once",
    "latin1.json": "is not UTF-8: byte 10 is 0xe9",
    "list.json": "holds a list without rows; predictions are an object from question ids to texts",
    "nbest.json": "must map question ids to texts, but does not for 2 ids ('a', 'b')",
    "not_gzip.json.gz": "is damaged gzip",
    "null.json": "holds null; predictions are",
    "number.json": "holds a number; predictions are",
    "odds_400_digits.json": "the null odds of 1 question ('a') are not finite numbers",
    "odds_infinite.json": "the null odds of 1 question ('a') are not finite numbers",
    "odds_list.json": "must hold a JSON object from question ids to numbers, not a list",
    "odds_missing.json": "1 predicted question ('b') without null odds",
    "odds_nan.json": "the null odds of 1 question ('a') are not finite numbers",
    "odds_null.json": "must map question ids to numbers, but does not for 1 id ('a')",
    "odds_text.json": "must map question ids to numbers, but does not for 1 id ('a')",
    "odds_true.json": "the null odds of 1 question ('a') are not finite numbers",
    "prediction_list.json": "must map question ids to texts, but does not for 1 id ('a')",
    "prediction_missing.json": "1 question ('b') without predictions",
    "prediction_null.json": "must map question ids to texts, but does not for 1 id ('a')",
    "prediction_fraction.json": "must map question ids to texts, but does not for 1 id ('a')",
    "prediction_of_others.json": "2 questions ('a', 'b') without predictions",
    "references_answer_fraction.json": "1 where answers is neither",
    "references_article_text.json": "its list holds a string",
    "references_data_object.json": "is in no layout that is known",
    "references_duplicate_id.json": "holds 1 id ('a') more than once",
    "references_empty.json": "holds no questions",
    "references_hub_answers.json": "1 where answers is neither",
    "references_id_number.json": "1 where id is not a string",
    "references_qas_object.json": "1 where qas is not a list",
    "references_rows.json": "lacks question",
    "references_unanswerable_v1.json": "1 question ('b') without an answer cannot be scored as SQuAD v1.1",
    "references_without_answers.json": "answers is missing",
    "references_without_data.json": "is an object with the keys version",
    "references_without_paragraphs.json": "lacks context, question: it has title",
    "single_quotes.json": "property name enclosed in double quotes",
    "text.json": "holds a string; predictions are",
    "trailing_comma.json": "at line 1, column 25",
    "truncated.json": "Expecting ':' delimiter at line 1, column 20",
    "truncated.json.gz": "ends in the middle of its gzip stream",
    "utf16.json": "is not UTF-8: byte 0 is 0xff",
    "words.json": "Expecting value at line 1, column 1",
}
"""What the message about each file of references, predictions or null odds must say."""
GOOD_SCORES = {"references.json", "references_v1.json", "predictions.json", "null_odds.json"}


def test_the_table_of_files_to_be_scored_is_complete() -> None:
    assert sorted({*IN_SCORES, *GOOD_SCORES}) == sorted(path.name for path in SCORES.iterdir())


def scored(**files: str) -> list[str]:
    names = {"references": "references.json", "predictions": "predictions.json", **files}
    return [word for flag, name in names.items() for word in (f"--{flag}", str(SCORES / name))]


@pytest.mark.parametrize("name", sorted(IN_SCORES))
def test_a_bad_file_is_not_scored(name: str, capsys: Capture) -> None:
    kind = {"references": "references", "odds": "null_odds"}.get(name.split("_")[0], "predictions")
    assert IN_SCORES[name] in refusal(score.main, scored(**{kind: name}), capsys)


def test_the_good_files_are_scored_and_limits_without_odds_are_not(capsys: Capture) -> None:
    assert score.main(scored(null_odds="null_odds.json")) == 0
    assert json.loads(capsys.readouterr().out)["exact"] == 50.0
    message = refusal(score.main, [*scored(), "--na_prob_thresh", "0.5"], capsys)
    assert "give --null_odds too" in message
    assert "is v1.1" in refusal(score.main, scored(references="references_v1.json", null_odds="null_odds.json"), capsys)


def test_odds_of_unknown_questions_are_mentioned(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "odds.json").write_text('{"a": 0.1, "b": 0.9, "c": 0.5}', encoding="utf-8")
    assert score.main([*scored(), "--null_odds", str(tmp_path / "odds.json")]) == 0
    assert "null odds for 1 unknown question ('c') are ignored" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- real processes


@pytest.mark.parametrize(
    ("command", "part"),
    [
        (["qa_dist.train", "--output_dir", "out", "--config", str(RECIPES / "bomb.yaml")], "the alias of"),
        (["qa_dist.train", "--output_dir", "out", "--config", str(RECIPES / "deep.yaml")], "nested too deeply"),
        (["qa_dist.score", *scored(predictions="deep.json")], "nested too deeply"),
        (["qa_dist.evaluate", "--adapter", b"\xff"], "is not UTF-8"),
        (["qa_dist.cli", "tran"], "'tran' is no command"),
    ],
)
def test_a_process_ends_in_the_same_way(command: list[str | bytes], part: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert part in sentence(done.stderr)
    assert not (tmp_path / "out").exists()


def test_the_corpus_is_large() -> None:
    num_data = len(list(MALFORMED.iterdir()))
    counts = [num_data, len(IN_RECIPES), len(FLAGS), len(IN_SCORES)]
    assert min(counts) >= 40, counts
    assert sum(counts) > 250, counts
