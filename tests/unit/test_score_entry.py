"""`python -m qa_dist.score` and the handling of errors that all entry points share."""

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qa_dist.common import command
from qa_dist.common.errors import ConfigError, ScoringError
from qa_dist.score import main
from tests.refusals import refusal

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path):
    """Writes values as JSON files, gzipped where the name says so, and gives their paths."""

    def write(**values):
        paths = {}
        for name, value in values.items():
            path = tmp_path / name.replace("_gz", ".gz")
            content = json.dumps(value).encode()
            path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
            paths[name] = str(path)
        return paths

    return write


def squad(version, **questions):
    qas = [{"id": key, "answers": [{"text": text} for text in texts]} for key, texts in questions.items()]
    return {"version": version, "data": [{"paragraphs": [{"qas": qas}]}]}


def test_version_1(files, capsys):
    paths = files(references_gz=squad("1.1", a=["cat"], b=["dog"]), predictions_gz={"a": "the cat", "b": ""})
    code = main(["--references", paths["references_gz"], "--predictions", paths["predictions_gz"]])
    output = capsys.readouterr()
    assert (code, output.err) == (0, "")
    assert json.loads(output.out) == {"exact_match": 50.0, "f1": 50.0}


def test_version_2(files, capsys):
    paths = files(
        references=squad("v2.0", a=["cat"], b=[]), predictions={"a": "cat", "b": "dog"}, odds_gz={"a": 0.1, "b": 0.9}
    )
    flags = ["--references", paths["references"], "--predictions", paths["predictions"]]
    assert main(flags) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["exact"] == 50.0
    assert "best_exact" not in plain
    assert main([*flags, "--null_odds", paths["odds_gz"]]) == 0
    assert json.loads(capsys.readouterr().out) == {
        **plain,
        **{"best_exact": 100.0, "best_exact_thresh": 0.1, "best_f1": 100.0, "best_f1_thresh": 0.1},
    }
    assert main([*flags, "--null_odds", paths["odds_gz"], "--na_prob_thresh", "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"] == 100.0


def test_rules_for_other_languages_are_named_in_what_is_printed(files, capsys):
    paths = files(references=squad("1.1", a=["每天九克朗"]), predictions={"a": "九克朗"})
    flags = ["--references", paths["references"], "--predictions", paths["predictions"]]
    assert main(flags) == 0
    plain = capsys.readouterr()
    assert json.loads(plain.out) == {"exact_match": 0.0, "f1": 0.0}
    assert plain.err.startswith("qa_dist.score: note: most of the reference text is Chinese or Japanese, ")
    assert plain.err.count("\n") == 1
    assert main([*flags, "--answer_normalization", "mlqa:zh"]) == 0
    found = capsys.readouterr()
    assert found.err == ""
    assert json.loads(found.out) == {"answer_normalization": "mlqa:zh", "exact_match": 0.0, "f1": 74.99999999999999}
    assert main([*flags, "--answer_normalization", "mlqa"]) == 2
    assert "--answer_normalization mlqa is not one of squad, xquad, mlqa:ar, " in capsys.readouterr().err


def test_mistakes_are_one_sentence_and_code_2(files, capsys):
    paths = files(references=squad("1.1", a=["cat"], b=["dog"]), predictions={"a": "cat", "c": "cow"}, odds={"a": 1})
    flags = ["--references", paths["references"], "--predictions", paths["predictions"]]
    assert main(flags) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        "qa_dist.score: note: predictions for 1 unknown question ('c') are ignored\n"
        "qa_dist.score: error: 1 question ('b') without predictions (--allow_missing scores them 0); check that both "
        "files are of the same data set.\n"
    )
    assert main([*flags, "--allow_missing"]) == 0
    assert json.loads(capsys.readouterr().out) == {"exact_match": 50.0, "f1": 50.0}
    assert main([*flags, "--null_odds", paths["odds"]]) == 2
    assert "--null_odds is for SQuAD v2.0" in capsys.readouterr().err
    assert main([*flags, "--na_prob_thresh", "0.5"]) == 2
    assert "--na_prob_thresh is for SQuAD v2.0" in capsys.readouterr().err
    assert main(["--references", "nothing.json", "--predictions", paths["predictions"]]) == 2
    assert capsys.readouterr().err == "qa_dist.score: error: nothing.json does not exist; check the path\n"


ROWS = [{"id": "1", "prediction_text": "Ada Kerrow"}, {"id": 2, "prediction_text": "the flood of 1911"}]
PREDICTED = {
    "object.json": json.dumps({str(row["id"]): row["prediction_text"] for row in ROWS}),
    "rows.json": json.dumps(ROWS),
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "rows.csv": "id,prediction_text\n1,Ada Kerrow\n2,the flood of 1911\n",
    "rows.tsv": "id\tprediction_text\n1\tAda Kerrow\n2\tthe flood of 1911\n",
    "floats.csv": "ID,Prediction\n1.0,Ada Kerrow\n2.0,the flood of 1911\n",
    "semicolons.csv": "id;prediction_text\n1;Ada Kerrow\n2;the flood of 1911\n",
    "data.json": json.dumps({"data": ROWS}),
    "columns.json": json.dumps({name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}),
    "lists.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "split.json": json.dumps({"columns": list(ROWS[0]), "index": [0, 1], "data": [list(row.values()) for row in ROWS]}),
    "other_lists.json": json.dumps({"id": [1, 2], "prediction": [row["prediction_text"] for row in ROWS]}),
    "other_columns.jsonl": json.dumps(
        {"guid": {"0": 1, "1": 2}, "text": {str(i): r["prediction_text"] for i, r in enumerate(ROWS)}}
    ),
    "one_line.jsonl": json.dumps({str(row["id"]): row["prediction_text"] for row in ROWS}),
    "nbest.json": json.dumps({str(r["id"]): [{"text": r["prediction_text"]}, {"text": "x"}] for r in ROWS}),
}
QUESTIONS = [
    {"id": 1, "context": "By Ada Kerrow.", "question": "Who?", "answers": [{"text": "Ada Kerrow"}]},
    {"id": 2, "context": "In 1911.", "question": "When?", "answers": [{"text": "1911", "answer_start": 3}]},
]
REFERENCES = {
    "squad.json": json.dumps({"data": [{"paragraphs": [{"context": "x", "qas": QUESTIONS}]}]}),
    "paragraphs.json": json.dumps([{"context": "x", "qas": QUESTIONS}]),
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in QUESTIONS),
    "rows.csv": "id,context,question,answer_text\n1,By Ada Kerrow.,Who?,Ada Kerrow\n2,In 1911.,When?,1911\n",
    "floats.csv": "id,context,question,answer_text\n1.0,By Ada Kerrow.,Who?,Ada Kerrow\n2.0,In 1911.,When?,1911\n",
    "rows.tsv": "id\tcontext\tquestion\tanswer_text\n1\tBy Ada Kerrow.\tWho?\tAda Kerrow\n2\tIn 1911.\tWhen?\t1911\n",
}


@pytest.mark.parametrize("references", REFERENCES)
@pytest.mark.parametrize("predictions", PREDICTED)
def test_every_layout_of_both_files_gives_the_same_scores(references, predictions, tmp_path, monkeypatch, capsys):
    (tmp_path / f"r-{references}").write_text(REFERENCES[references])
    (tmp_path / f"p-{predictions}").write_text(PREDICTED[predictions])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--references", f"~/r-{references}", "--predictions", f"~/p-{predictions}"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == {"exact_match": 50.0, "f1": 75.0}
    assert ("first candidate" in output.err) == (predictions == "nbest.json")


@pytest.mark.parametrize("predicted", [[{"id": 2, "prediction_text": 1871}], {"2": 1871}, {"2": 1871.0}])
def test_a_whole_number_is_a_predicted_text(predicted, files, capsys):
    rows = [{"id": 2, "context": "In 1871.", "question": "When?", "answers": [1871]}]
    paths = files(references=rows, predictions=predicted)
    assert main(["--references", paths["references"], "--predictions", paths["predictions"]]) == 0
    assert json.loads(capsys.readouterr().out) == {"exact_match": 100.0, "f1": 100.0}


@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_a_blank_answer_is_a_reference_as_the_official_scripts_have_it(version, files, capsys):
    qas = [{"id": "a", "answers": [{"text": "cat"}]}, {"id": "b", "answers": [{"text": "", "answer_start": 0}]}]
    references = {"version": version, "data": [{"paragraphs": [{"qas": qas}]}]}
    paths = files(references=references, predictions={"a": "cat", "b": "dog"})
    assert main(["--references", paths["references"], "--predictions", paths["predictions"]]) == 0
    found = json.loads(capsys.readouterr().out)
    if version == "1.1":
        assert found == {"exact_match": 50.0, "f1": 50.0}
    else:
        assert (found["exact"], found["HasAns_total"], "NoAns_total" in found) == (50.0, 2, False)


def test_questions_without_known_answers_are_not_scored(files, capsys):
    qas = [{"id": "a", "answers": [{"text": "cat"}]}, {"id": "b"}]
    some = {"version": "1.1", "data": [{"paragraphs": [{"qas": qas}]}]}
    none = {"version": "1.1", "data": [{"paragraphs": [{"qas": qas[1:]}]}]}
    paths = files(some=some, none=none, predictions={"a": "the cat", "b": "dog"})
    assert main(["--references", paths["some"], "--predictions", paths["predictions"]]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == {"exact_match": 100.0, "f1": 100.0}
    assert "1 question ('b') without known answers are not scored" in output.err
    assert "unknown" not in output.err
    assert main(["--references", paths["none"], "--predictions", paths["predictions"]]) == 2
    assert "holds no answers (answers is missing for 1 question ('b'))" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('[{"id": "a", "prediction_text": "x"}, {"id": "a", "prediction_text": "y"}]', "1 id ('a') more than once"),
        ('[{"id": "a", "guess": "x"}]', "holds rows with id, guess; predictions are"),
        ('[{"id": "a", "prediction_text": "x"}, "y"]', "row 2 has no id that is text"),
        ('{"a": [{"text": "x"}], "b": []}', "does not for 2 ids ('a', 'b')"),
        ("", "is empty; files are JSON, JSONL, CSV, TSV or Parquet, each plain or .gz, and predictions are an object"),
        ('{"predictions": {"a": "x"}}', "does not for 1 id ('predictions'); predictions are an object from question"),
        ('{"id": ["a", "b"], "prediction_text": ["x"]}', "id that is text"),
    ],
)
def test_predictions_that_cannot_be_told_are_refused(content, part, files, tmp_path, capsys):
    (tmp_path / "predictions.json").write_text(content)
    paths = files(references=squad("1.1", a=["cat"]))
    assert main(["--references", paths["references"], "--predictions", str(tmp_path / "predictions.json")]) == 2
    assert part in capsys.readouterr().err


def test_a_table_of_predictions_with_shifted_columns_is_refused(files, tmp_path, capsys):
    (tmp_path / "predictions.csv").write_text("id,prediction_text\na,Ada Kerrow, the builder\nb,1871\n")
    paths = files(references=squad("1.1", a=["Ada Kerrow"], b=["1871"]))
    words = ["--references", paths["references"], "--predictions", str(tmp_path / "predictions.csv")]
    assert "1 where a row has more values than the header has columns (row 1); put" in refusal(main, words, capsys)


def test_unknown_flags_are_refused(capsys):
    assert main(["--references", "a", "--predictions", "b", "--allow_miss"]) == 2
    message = "unrecognized arguments: --allow_miss; see qa_dist.score --help"
    assert capsys.readouterr().err == f"qa_dist.score: error: {message}\n"


def test_help_loads_no_heavy_library():
    script = (
        "import sys; from qa_dist.score import build_parser; build_parser().format_help(); "
        "assert len(sys.modules) < 250, len(sys.modules); "
        "sys.exit(', '.join({'torch', 'numpy', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.stderr.strip() == ""
    subprocess.run([sys.executable, "-m", "qa_dist.score", "--help"], cwd=ROOT, capture_output=True, check=True)


# command.run_command


def fails_with(error):
    def work():
        raise error

    return work


def test_exit_codes_and_messages(capsys):
    assert command.run_command("program", lambda: 7) == 7
    assert command.run_command("program", fails_with(ScoringError("This went wrong."))) == 2
    assert capsys.readouterr().err == "program: error: This went wrong.\n"
    assert command.run_command("program", fails_with(ConfigError(["one", "two"]))) == 2
    assert capsys.readouterr().err == "program: error: 2 problems in the configuration:\n  - one\n  - two\n"
    assert command.run_command("program", fails_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "program: interrupted\n"
    with pytest.raises(RuntimeError, match="a fault of the program"):
        command.run_command("program", fails_with(RuntimeError("a fault of the program")))


def test_ranks_other_than_0_name_their_machine_and_leave_to_one_what_all_found(capsys, monkeypatch):
    monkeypatch.setattr(command, "SECONDS_FOR_RANK_0", 0.0)
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    own, shared = ScoringError("Not here."), ConfigError(["Everywhere."], on_all_ranks=True)
    said = {}
    for rank, local_rank in (("0", "0"), ("8", "0"), ("9", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        for error in (own, shared):
            assert command.run_command("program", fails_with(error)) == 2
        said[rank] = capsys.readouterr().err.splitlines()
    first, shared_line = "program: error: Not here.", "program: error: Everywhere."
    assert said["0"] == [first, shared_line]
    assert said["8"] == [f"{first} (rank 8 on node7)", f"{shared_line} (rank 8 on node7)"], "one of each machine"
    assert said["9"] == [f"{first} (rank 9 on node7)"]


def test_a_reader_that_goes_away_leaves_no_traceback():
    script = (
        "import sys; from qa_dist.common import command\n"
        "def work():\n"
        "    for _ in range(100_000): sys.stdout.write('line\\n')\n"
        "    return 0\n"
        "sys.exit(command.run_command('program', work))"
    )
    command = f'{sys.executable} -c "$0" | head -n 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command, script], cwd=ROOT, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "line\n", "")


@pytest.mark.parametrize(
    ("redirection", "sentence"),
    [
        (">&-", "program: error: standard output is closed; leave it open, or send it to /dev/null\n"),
        (">/dev/full", "program: error: standard output takes no more (No space left on device); make room\n"),
        ("2>&-", ""),
    ],
)
def test_streams_that_take_nothing_leave_no_traceback(redirection: str, sentence: str) -> None:
    script = (
        "import sys; from qa_dist.common import command\n"
        "def work():\n"
        "    sys.stderr.write('a note\\n' * ('2>&-' in sys.argv)); sys.stdout.write('line\\n')\n"
        "    return 0\n"
        "sys.exit(command.run_command('program', work))"
    )
    words = ["bash", "-c", f'{sys.executable} -c "$0" "$1" {redirection}', script, redirection]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (2 if sentence else 0, sentence)


# command.note_exit


def test_rank_0_notes_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("QA_DIST_EXIT_FILE", raising=False)
    assert command.note_exit(85) == 85
    file = tmp_path / "exit_code"
    monkeypatch.setenv("QA_DIST_EXIT_FILE", str(file))
    monkeypatch.setenv("RANK", "1")
    assert command.note_exit(1) == 1
    assert not file.exists()
    monkeypatch.setenv("RANK", "0")
    assert command.note_exit(85) == 85
    assert file.read_text() == "85\n"
    monkeypatch.setenv("QA_DIST_EXIT_FILE", str(file / "nowhere"))
    assert command.note_exit(2) == 2
    assert "the exit code 2 was not noted" in capsys.readouterr().err


def test_training_notes_its_exit_code_wherever_it_ends(tmp_path, monkeypatch, capsys):
    from qa_dist import train
    from qa_dist.common.errors import TrainingError
    from qa_dist.distributed.failures import failures_named

    file = tmp_path / "exit_code"
    monkeypatch.setenv("QA_DIST_EXIT_FILE", str(file))
    assert train.main(["--num_train_epochs", "many"]) == 2
    assert file.read_text() == "2\n"
    with pytest.raises(SystemExit, match="1"), failures_named():
        raise TrainingError("the loss is not finite")
    assert file.read_text() == "1\n"
    assert "the run stops: the loss is not finite" in capsys.readouterr().err
    file.unlink()
    with pytest.raises(ZeroDivisionError):
        command.run_command("qa_dist.train", lambda: 1 // 0)
    assert file.read_text() == "1\n"


def test_a_reader_that_goes_away_ends_several_ranks_as_it_ends_one(monkeypatch, capsys):
    from qa_dist.distributed import failures

    monkeypatch.setattr(failures, "require_consistent_launch", lambda: None)
    dropped = []
    monkeypatch.setattr(failures, "drop_output", lambda: dropped.append(True))
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for kind, code in ((command.OutputClosedError, 141), (BrokenPipeError, 1)):
        with pytest.raises(SystemExit, match=str(code)), failures.failures_named():
            raise kind(errno.EPIPE, "Broken pipe")
        # Others, such as a tracker's, are failures.
        assert ("Traceback" in capsys.readouterr().err) == (kind is BrokenPipeError)
    assert dropped == [True]


def test_a_question_with_an_empty_id_is_refused_as_an_evaluation_refuses_it(files, capsys):
    rows = [
        {"id": name, "question": "q", "context": "c", "answers": [{"text": "c", "answer_start": 0}]} for name in "b"
    ]
    paths = files(references=[*rows, {**rows[0], "id": ""}], predictions={"b": "c", "": "c"})
    told = refusal(main, ["--references", paths["references"], "--predictions", paths["predictions"]], capsys)
    assert "1 where id is empty" in told
