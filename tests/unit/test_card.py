"""`qa-dist card`: what it says is what was measured, its code runs, nothing of this machine is in it, and refusals."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from qa_dist.card import main
from qa_dist.config.options import DataConfig, ModelConfig, RunConfig
from qa_dist.reporting.card import CardOptions, card
from qa_dist.reporting.run_record import read_run
from tests.refusals import refusal
from tests.unit.data_fixtures import FIXTURES
from tests.unit.trained import edit_json

Capture = pytest.CaptureFixture[str]

EARLIER = FIXTURES / "earlier"
TOKEN = "hf_" + "a" * 34


def written(capsys: Capture, *words: str | Path) -> str:
    """The card that a command line writes; it prints where."""
    assert main([str(word) for word in words]) == 0
    return Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")


def metadata(text: str) -> dict[str, Any]:
    """The metadata as the hub's library reads it."""
    found = ModelCard(text).data.to_dict()
    assert isinstance(found, dict)
    return found


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def cells(text: str, start: str) -> list[str]:
    """The cells of the first row of a table that begins so."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The output folder of a run of a version before, to spoil."""
    return Path(shutil.copytree(EARLIER / "run", tmp_path / "mine"))


# ------------------------------------------------------------------------------------------------------- what it says


def test_a_card_of_a_run(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    text = written(capsys, trained / "adapter", "--output", tmp_path / "card.md")
    scores = json.loads((trained / "adapter" / "metrics.json").read_text(encoding="utf-8"))
    assert metadata(text) == {
        "library_name": "peft",
        "pipeline_tag": "question-answering",
        "tags": ["question-answering", "qa-dist", "lora"],
        "metrics": ["exact_match", "f1"],
        "model-index": [
            {
                "name": "adapter",
                "results": [
                    {
                        "task": {"type": "question-answering", "name": "Extractive question answering"},
                        "dataset": {"name": "train.json", "type": "train.json", "split": "validation"},
                        "metrics": [
                            {"type": "exact_match", "value": round(scores["exact_match"], 4), "name": "Exact match"},
                            {"type": "f1", "value": round(scores["f1"], 4), "name": "F1"},
                        ],
                    }
                ],
            }
        ],
    }
    assert cells(text, "12") == ["12", f"{scores['exact_match']:.2f}", f"{scores['f1']:.2f}"]
    counts = json.loads((trained / "adapter" / "run.json").read_text(encoding="utf-8"))["data"]["train"]
    assert cells(text, "train") == ["train", "`train.json`", "12", "0", str(counts["num_features"])]
    # Other tests may have put stores of other data beside the run's.
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in (trained / "stores").glob("*/limits.json")]
    ceilings = [each["ceilings"]["squad 30 v1"] for each in kept if "squad 30 v1" in each["ceilings"]]
    said = {f"exceed exact match {best['exact_match']:.2f} and F1 {best['f1']:.2f} on" for best in ceilings}
    assert any(sentence in text for sentence in said)
    assert cells(text, "rank of the adapters")[1] == "8"
    assert cells(text, "layers with adapters")[1] == "attention"
    # Nothing is said of what nobody measured or stated.
    assert not re.search(r"carbon|CO2|licen[sc]e|language:", text, re.IGNORECASE)


def test_a_run_whose_data_say_that_answers_may_be_missing(run: Path, capsys: Capture) -> None:
    """--version_2_with_negative is auto, and the evaluation had such questions."""
    options = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    (run / "config.yaml").write_text(yaml.safe_dump(options | {"version_2_with_negative": None}), encoding="utf-8")
    assert "or none, where the text does not answer it" in written(capsys, run)
    assert read_run(str(run)).may_lack_answers
    (run / "null_odds.json").unlink()
    assert "or none, where the text does not answer it" not in written(capsys, run)


@pytest.mark.parametrize("steps", [None, 3])
def test_epochs_are_said_where_they_decided(run: Path, capsys: Capture, steps: int | None) -> None:
    options = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    (run / "config.yaml").write_text(yaml.safe_dump(options | {"max_train_steps": steps}), encoding="utf-8")
    assert ("| epochs | 3.0 |" in written(capsys, run)) == (steps is None)


def test_the_revision_of_the_base_model_is_in_the_code(run: Path, capsys: Capture) -> None:
    options = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    hub = options | {"model_name_or_path": "them/base", "model_revision": "v1.2"}
    (run / "config.yaml").write_text(yaml.safe_dump(hub), encoding="utf-8")
    assert 'from_pretrained("them/base", revision="v1.2")' in written(capsys, run)
    assert 'from_pretrained("a/b")' in written(capsys, run, "--base_model", "a/b")


def test_what_the_user_states(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("--license", "cc-by-4.0", "--language", "en", "pt-BR", "--base_model", "them/base", "--repo_id", "me/x")
    text = written(capsys, trained / "adapter", "--output", tmp_path / "card.md", *words)
    found = metadata(text)
    assert (found["license"], found["language"]) == ("cc-by-4.0", ["en", "pt-BR"])
    assert (found["base_model"], found["base_model_relation"]) == ("them/base", "adapter")
    assert found["model-index"][0]["name"] == "x"
    assert "\n# x\n" in text
    assert 'reader = qa_dist.Reader("me/x")' in text
    assert "was a folder where this was trained" not in text


def test_intervals_and_slices_with_references(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    from qa_dist import analyze

    run, references = str(trained / "adapter"), str(trained / "train.json")
    text = written(capsys, run, "--output", tmp_path / "card.md", "--references", references)
    assert analyze.main([run, "--references", references, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    f1 = found["f1"]
    assert cells(text, "12")[3:] == [f"{f1['value']:.2f}", f"{f1['low']:.2f} to {f1['high']:.2f}"]
    assert f"over the {found['num_contexts']} contexts" in text
    assert "too narrow: under 30 questions" in text
    by = {each["by"] for each in found["slices"]}
    assert {"question_word", "windows", "title"} <= by
    words = [each for each in found["slices"] if each["by"] == "question_word"]
    for each in words:
        row = cells(text, each["value"])
        assert (row[1], row[4]) == (str(each["n"]), f"{each['f1']['value']:.2f}")
    assert "By windows of the run's tokenizer" in text
    assert "title of the article" not in text


def test_the_metadata_have_the_intervals(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    from qa_dist import analyze

    run, references = str(trained / "adapter"), str(trained / "train.json")
    text = written(capsys, run, "--output", tmp_path / "card.md", "--references", references)
    assert analyze.main([run, "--references", references, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    data = ModelCard(text).data
    assert [each.metric_type for each in data.eval_results] == ["exact_match", "f1"]
    for each in data.eval_results:
        score = found[each.metric_type]
        assert each.metric_value == round(score["value"], 4)
        assert each.metric_args == {
            "confidence_interval": [round(score["low"], 4), round(score["high"], 4)],
            "confidence_level": 0.95,
            "n_resamples": 2000,
            "resampled": "contexts",
        }
    # About a single context there is none.
    one = {name: {**found[name], "low": None, "high": None} for name in ("exact_match", "f1")}
    about_one = card(read_run(run), CardOptions(folder_name="x"), {**found, **one})
    assert [each.metric_args for each in ModelCard(about_one).data.eval_results] == [None, None]


def test_a_run_on_some_questions_has_intervals_on_these(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    run = Path(shutil.copytree(trained / "adapter", tmp_path / "run"))
    whole = json.loads((trained / "train.json").read_text(encoding="utf-8"))
    paragraphs = whole["data"][0]["paragraphs"]
    paragraphs.append(json.loads(json.dumps(paragraphs[0])))
    for entry in paragraphs[-1]["qas"]:
        entry["id"] += " again"
    count = 12 + len(paragraphs[-1]["qas"])
    references = tmp_path / "whole.json"
    references.write_text(json.dumps(whole), encoding="utf-8")
    words = [str(run), "--references", str(references)]
    assert "leave out questions of" in refusal(main, words, capsys)
    options = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    (run / "config.yaml").write_text(yaml.safe_dump(options | {"max_eval_samples": 12}), encoding="utf-8")
    assert main(words) == 0
    note = f"12 of the {count} questions of {references} are answered; what is said about answers is about these"
    assert capsys.readouterr().err == f"qa_dist.card: note: {note}\n"
    text = (run / "README.md").read_text(encoding="utf-8")
    assert "to" in cells(text, "12")[4]


def test_a_run_of_a_version_before(run: Path, capsys: Capture) -> None:
    text = written(capsys, run, "--references", EARLIER / "dev.json")
    scores = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    values = {each["type"]: each["value"] for each in metadata(text)["model-index"][0]["results"][0]["metrics"]}
    assert values == {key: round(scores[key], 4) for key in ("exact_match", "f1")}
    assert "By whether there is an answer:" in text
    assert "or none, where the text does not answer it" in text
    # Its store is not there any more.
    assert "no model can exceed" not in text


def test_an_evaluation_written_over_the_runs_own_is_not_taken_for_it(run: Path, capsys: Capture) -> None:
    final = json.loads((run / "run.json").read_text(encoding="utf-8"))["final"]
    edit_json(run / "metrics.json", f1=99.0)
    text = written(capsys, run)
    assert f"F1 {final['f1']:.2f} on its validation data" in text
    assert "99.00" not in text


def test_what_is_not_known_is_left_out(run: Path, capsys: Capture) -> None:
    for name in ("run.json", "metrics.json", "config.yaml", "predictions.json"):
        (run / name).unlink()
    edit_json(run / "adapter_config.json", base_model_name_or_path="them/base")
    text = written(capsys, run)
    assert metadata(text) == {
        "base_model": "them/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "question-answering",
        "tags": ["question-answering", "qa-dist"],
    }
    assert re.findall("^## .*", text, re.MULTILINE) == ["## How to use it"]
    # What files say in another form is not known either.
    (run / "config.yaml").write_text("model_name_or_path: [1]\ntrain_file: 3\nmax_seq_length: long\n", encoding="utf-8")
    (run / "run.json").write_text('{"data": [], "final": {"f1": "x"}, "versions": 3, "parameters": {"total": 1}}')
    again = written(capsys, run)
    assert metadata(again) == metadata(text)
    assert "## Results" not in again


@pytest.mark.parametrize(
    ("options", "name", "hub_id"),
    [
        ({"dataset_name": "squad_v2"}, "squad_v2", "squad_v2"),
        ({"dataset_name": "me/data"}, "me/data", "me/data"),
        ({"dataset_name": "/home/me/secret/data"}, "data", None),
        ({"dataset_name": "~/secret/data/"}, "data", None),
        ({"dataset_name": "../secret/data"}, "data", None),
        ({"dataset_name": "synthetic:50"}, "synthetic:50", None),
        ({}, "the sample inside qa_dist", None),
        ({"train_file": "secret/a|b`c.json"}, "a?b?c.json", None),
    ],
)
def test_data_by_its_name(run: Path, capsys: Capture, options: dict[str, str], name: str, hub_id: str | None) -> None:
    (run / "config.yaml").write_text(json.dumps({"tuning": "lora", **options}), encoding="utf-8")
    text = written(capsys, run)
    assert cells(text, "train")[1] == f"`{name}`"
    assert metadata(text).get("datasets") == ([hub_id] if hub_id else None)
    assert "secret" not in text


def test_nothing_of_this_machine_and_no_secret_gets_in(
    trained: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "config.yaml"
    # By hand: options refuse this.
    text = config.read_text(encoding="utf-8")
    text = re.sub("(?m)^train_file: .*", f"train_file: /data/{TOKEN}.json", text)
    config.write_text(re.sub("(?m)^optim: .*", "optim: secret-of-mine", text), encoding="utf-8")
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-mine")
    card = written(capsys, tmp_path / "adapter", "--references", trained / "train.json")
    assert cells(card, "train")[1] == "`***.json`"
    assert cells(card, "optimiser")[1] == "***"
    for part in (str(trained), str(tmp_path), TOKEN, "secret", "/data", str(Path.home()) + "/"):
        assert part not in card


# ---------------------------------------------------------------------------------------------------------- its code


def test_the_code_for_qa_dist_runs(
    trained: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    text = written(capsys, "adapter", "--output", tmp_path / "card.md")
    exec(blocks(text)[0], {})
    answer = capsys.readouterr().out.strip()
    assert answer
    assert answer in "Ada Kerrow built the mill in 1911."
    on_hub = written(capsys, "adapter", "--output", tmp_path / "card.md", "--repo_id", "me/x")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: {"me/x": "adapter"}[name])
    exec(blocks(on_hub)[0], {})
    assert capsys.readouterr().out.strip() == answer


def logits(model: Any) -> Any:
    """Start and end logits of a question with token types, [2, T]."""
    import torch

    ids = torch.tensor([[2, 7, 8, 3, 9, 10, 11, 3]])
    with torch.inference_mode():
        found = model.eval()(input_ids=ids, token_type_ids=torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]))
    return torch.stack((found.start_logits[0], found.end_logits[0]))


def test_the_code_without_qa_dist_gives_the_same_model(
    trained: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from qa_dist.model.merging import fold, load_plain

    monkeypatch.chdir(trained)
    text = written(capsys, "adapter", "--output", tmp_path / "card.md")
    assert "`model` was a folder where this was trained" in text
    scope: dict[str, Any] = {}
    exec(blocks(text)[1], scope)
    config = RunConfig(data=DataConfig(max_seq_length=64, doc_stride=16), model=ModelConfig(model_name_or_path="model"))
    expected = logits(fold(load_plain(config, "adapter", tokenizer_pads_left=False)))
    assert torch.equal(logits(scope["model"]), expected)
    assert len(scope["tokenizer"]) == scope["model"].config.vocab_size
    # The same for the merged model.
    scope["model"].save_pretrained(tmp_path / "merged")
    merged = written(capsys, "adapter", "--merged_dir", tmp_path / "merged", "--base_model", "them/base")
    found = metadata(merged)
    assert (found["library_name"], found["base_model_relation"]) == ("transformers", "finetune")
    assert found["model-index"][0]["name"] == "merged"
    assert (tmp_path / "merged" / "README.md").is_file()
    scope["tokenizer"].save_pretrained(tmp_path / "merged")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(blocks(merged)[1], scope)
    assert (logits(scope["model"]) - expected).abs().max() < 1e-5


def test_a_base_model_in_a_package_is_loaded_by_qa_dist_alone(run: Path, capsys: Capture) -> None:
    (run / "config.yaml").write_text("model_name_or_path: package:some_model/data\n", encoding="utf-8")
    text = written(capsys, run)
    assert len(blocks(text)) == 1
    assert "on `package:some_model/data`" in text
    assert "base_model" not in metadata(text)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_card_is_replaced_only_as_it_was_written(run: Path, capsys: Capture) -> None:
    path = run / "README.md"
    first = written(capsys, run)
    assert written(capsys, run, "--license", "mit") != first
    path.write_text(first.replace("extractive", "wonderful"), encoding="utf-8")
    edited = path.read_bytes()
    assert "README.md was written or edited by hand" in refusal(main, [str(run)], capsys)
    assert path.read_bytes() == edited
    assert written(capsys, run, "--overwrite") == first
    path.write_text("# My model\n", encoding="utf-8")
    assert "--overwrite" in refusal(main, [str(run)], capsys)
    assert path.read_text(encoding="utf-8") == "# My model\n"


def test_what_has_no_card_is_one_sentence(run: Path, tmp_path: Path, capsys: Capture) -> None:
    empty, torn, listed = tmp_path / "empty", tmp_path / "torn", tmp_path / "listed"
    empty.mkdir()
    shutil.copytree(run, torn)
    (torn / "adapter_model.safetensors").unlink()
    shutil.copytree(run, listed)
    (listed / "run.json").write_text("[]", encoding="utf-8")
    before = {path.name for path in run.iterdir()}
    dev = str(EARLIER / "dev.json")
    other = json.loads((EARLIER / "dev.json").read_text(encoding="utf-8"))
    for article in other["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                qa["answers"], qa["is_impossible"] = [], True
    (tmp_path / "other.json").write_text(json.dumps(other), encoding="utf-8")
    for words, part in (
        ([], "the following arguments are required: RUN"),
        ([tmp_path / "none"], "none is not a folder; name the --output_dir"),
        ([empty], "empty holds no whole adapter and no whole model; name"),
        ([torn], "torn holds no whole adapter"),
        ([listed], "run.json must hold a JSON object, not a list"),
        ([run, "--references", tmp_path / "no.json"], "no.json does not exist"),
        ([run, "--references", EARLIER / "train.json"], "leave out questions of"),
        ([run, "--references", tmp_path / "other.json"], "give the file that it was evaluated on"),
        ([run, "--license", "My own"], "'My own' is not the hub's name of a licence"),
        ([run, "--language", "english"], "'english' is not the code of a language"),
        ([run, "--repo_id", "a/b/c"], "'a/b/c' is not a hub id"),
        ([run, "--base_model", "/models/bert"], "'/models/bert' is not a hub id"),
        ([run, "--output", empty], "empty is a folder; name the file in it"),
        ([run, "--output", tmp_path / "no" / "card.md"], "card.md cannot be written: No such file"),
        ([run, "--merged_dir", run], "mine holds an adapter; name what qa-dist merge wrote"),
        ([run, "--merged_dir", empty], "empty holds no whole adapter"),
    ):
        assert part in refusal(main, [str(word) for word in words], capsys), words
    assert {path.name for path in run.iterdir()} == before
    (run / "predictions.json").unlink()
    assert "holds no predictions.json" in refusal(main, [str(run), "--references", dev], capsys)
