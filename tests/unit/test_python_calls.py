"""What `qa_dist` offers to Python: the parts of a run as calls, and values that a notebook shows."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import qa_dist
from qa_dist.config.options import RunConfig
from qa_dist.config.parsing import parse
from qa_dist.config.recipe_files import recipe_path
from qa_dist.model.building import build_model
from qa_dist.model.span_model import transformers_model
from qa_dist.reporting import inspection
from qa_dist.training.trainer import Trainer
from tests.unit.trained import options_of, reset_accelerate, some_calibration

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(trained: Path) -> RunConfig:
    reset_accelerate()
    return qa_dist.configure(trained / "adapter" / "config.yaml")


class Printer:
    """IPython's, as far as it is asked."""

    def __init__(self) -> None:
        self.shown = ""

    def text(self, text: str) -> None:
        self.shown += text


def in_notebook(value: Any) -> str:
    """What a notebook shows of a value, by IPython's protocol: of its classes, the first that has either method."""
    owner = next(each for each in type(value).__mro__ if vars(each).keys() & {"_repr_pretty_", "__repr__"})
    assert "_repr_pretty_" in vars(owner)
    printer = Printer()
    value._repr_pretty_(printer, False)
    assert printer.shown == str(value)
    return printer.shown


def test_a_configuration_is_the_one_that_flags_give(tmp_path: Path) -> None:
    options = {"output_dir": tmp_path, "lora_target_modules": ("query", "key"), "max_train_steps": 3, "tf32": True}
    words = ["--output_dir", str(tmp_path), "--lora_target_modules", "query,key", "--max_train_steps", "3", "--tf32"]
    made = qa_dist.configure("quickstart", **options)
    assert made == parse(["--config", "quickstart", *words], prog="test", description="")[0]
    assert qa_dist.configure(recipe_path("quickstart"), **options) == made
    assert qa_dist.configure() == RunConfig()


def test_a_configuration_is_made_from_another() -> None:
    first = qa_dist.configure("tutorial", lora_r=4)
    other = qa_dist.configure(first, train_file="a.json", lora_alpha=8)
    assert (other.data.train_file, other.data.dataset_name) == ("a.json", None), "one source takes the other's place"
    assert (other.model.lora_r, other.model.lora_alpha, first.model.lora_alpha) == (4, 8, 1)
    assert qa_dist.configure(first, tuning="full").model.lora_r == RunConfig().model.lora_r


def test_what_a_configuration_shows_gives_it_again() -> None:
    made = qa_dist.configure("tutorial", train_file="a.json", lora_r=4)
    assert eval(repr(made), {"configure": qa_dist.configure}) == made
    assert repr(RunConfig()) == "configure()"
    assert "lora_r: 4" in in_notebook(made).splitlines()


@pytest.mark.parametrize(
    ("recipe", "options", "parts"),
    [
        (None, {"lerning_rate": 1}, ["lerning_rate is no option here; did you mean learning_rate?"]),
        (None, {"ema_decay": 0.9}, ["ema_decay was taken out, as it brought no gain"]),
        (None, {"lora_r": 0, "seed": "x"}, ["2 problems", "lora_r 0 is out of range", "seed x is not an integer"]),
        (
            None,
            {"residual_dtype": "bf16", "mixed_precision": "bf16", "padding": "sorted"},
            ["residual_dtype bf16 is for rows without padding and padding is sorted"],
        ),
        (None, {"init_adapter": "a", "tuning": "full"}, ["init_adapter a goes on from LoRA adapters but tuning is"]),
        ("no-recipe", {}, ["config no-recipe is neither a file nor a recipe", "quickstart"]),
    ],
)
def test_mistakes_are_named_as_in_python(recipe: str | None, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(qa_dist.UserError) as caught:
        qa_dist.configure(recipe, **options)
    said = str(caught.value)
    assert all(part in said for part in parts), said
    assert " --" not in f" {said}"


def test_data_are_the_features_of_a_run(config: RunConfig, trained: Path) -> None:
    data = qa_dist.load_data(config)
    assert data.train.num_examples == data.validation.num_examples == 12
    assert in_notebook(data).splitlines()[0].split() == ["examples", "unanswerable", "features", "mean", "tokens"]
    assert in_notebook(data).splitlines()[1].split()[:4] == ["train", "12", "0", str(data.train.num_features)]
    for number in range(data.train.num_features):
        feature = data.train.feature(number)
        example = data.train.example(feature.example_index)
        label = feature.input_ids[feature.start_token : feature.end_token + 1]
        if feature.start_token != feature.cls_token:
            assert data.tokenizer.decode(label) == example.answers[0].text
            first, last = (
                feature.context_offsets[token - feature.context_start]
                for token in (feature.start_token, feature.end_token)
            )
            assert example.context[first[0] : last[1]] == example.answers[0].text
    with pytest.raises(IndexError, match="no feature"):
        data.train.feature(data.train.num_features)


def test_the_parameters_of_bert_base_without_its_weights() -> None:
    report = qa_dist.count_parameters(qa_dist.configure(model_config="bert-base"))
    assert (report.trainable, report.total, report.before) == (296_450, 109_189_636, 108_893_186)
    assert "296,450" in in_notebook(report)
    assert len(report.tensors) == 12 * 2 * 2 + 2


def test_counts_are_those_of_the_model_with_its_numbers(config: RunConfig) -> None:
    _, report = build_model(config.model, seed=1, max_seq_length=64)
    assert qa_dist.count_parameters(config) == report


def test_a_model_before_training_and_after(
    config: RunConfig, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = qa_dist.build_model(config)
    before = qa_dist.evaluate_model(model, config)
    (run,) = qa_dist.read_runs(trained / "adapter")
    after = qa_dist.evaluate_model(trained / "adapter")
    assert before.loss > after.loss == pytest.approx(run.evaluations[-1]["loss"])
    assert after.named_metrics == run.metrics
    assert after.metrics == qa_dist.evaluate_model(str(trained / "adapter"), config).metrics
    assert in_notebook(after).startswith(f"loss {after.loss:.4f}, EM {after.metrics['exact_match']:.2f}, F1 ")
    assert in_notebook(run).splitlines()[1].split() == ["step", "epoch", "loss", "exact_match", "f1"]
    assert len(repr(after)) < 500
    answer = after.answers[0]
    shown = in_notebook(answer).splitlines()
    assert len(shown) == 2 + len(answer.nbest)
    assert [line.endswith("  <- chosen") for line in shown[2:]].index(True) == answer.nbest.index(answer.prediction)
    assert capsys.readouterr().out == "", "what calls have to say goes to standard error"


def test_a_run_leaves_torch_as_it_was(config: RunConfig, tmp_path: Path) -> None:
    """Its options are its own: what is called after it has others."""
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    changed = qa_dist.configure(config, deterministic=True, output_dir=str(tmp_path / "out"), max_train_steps=1)
    qa_dist.train_model(changed)
    assert (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()) == before
    assert before[1] is False


def test_the_loss_alone_is_that_of_evaluations_in_training(config: RunConfig) -> None:
    config = qa_dist.configure(config, max_eval_features=5, subset_seed=3, padding="sorted")
    model, data = qa_dist.build_model(config), qa_dist.load_data(config)
    chosen = qa_dist.subset(data.validation.num_features, 5, 3)
    losses = []
    for feature in map(data.validation.feature, chosen.tolist()):
        ids, types = (
            torch.tensor(np.array(part), dtype=torch.long)[None] for part in (feature.input_ids, feature.token_type_ids)
        )
        with torch.no_grad():
            out = transformers_model(model.eval().model)(
                input_ids=ids,
                token_type_ids=types,
                position_ids=torch.arange(ids.shape[1])[None],
                start_positions=torch.tensor([feature.start_token]),
                end_positions=torch.tensor([feature.end_token]),
            )
        losses.append(out.loss)
    evaluation = qa_dist.evaluate_model(model, config, loss_only=True)
    assert evaluation.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert (evaluation.metrics, evaluation.answers) == ({}, None)
    assert in_notebook(evaluation) == f"loss {evaluation.loss:.4f}"


def test_an_example_as_its_model_sees_it(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = qa_dist.inspect_example(id="q3", split="validation", model=trained / "adapter")
    assert view.example["id"] == "q3"
    assert len(view.tokens) == sum(feature["num_tokens"] for feature in view.features)
    assert all("start_logit" in token for token in view.tokens)
    (chosen,) = (each["text"] for each in view.answers if each["is_chosen"])
    assert chosen == qa_dist.evaluate_model(trained / "adapter").answers.predictions()["q3"]
    assert "\x1b" not in in_notebook(view)
    assert repr(view).startswith("ExampleView(id='q3', ")
    monkeypatch.setenv("HOME", str(trained))
    assert qa_dist.inspect_example(id="q3", split="validation", model="~/adapter").found == view.found | {
        "adapter": str(trained / "adapter")
    }


def test_an_example_is_answered_with_the_threshold_of_its_model(
    trained: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    some_calibration(1.0, 7.5).write(tmp_path / "adapter")
    seen: list[float] = []
    monkeypatch.setattr(inspection, "add_answers", lambda *given, **_: seen.append(given[2].evaluation.null_threshold))
    for given in (None, config):
        qa_dist.inspect_example(given, id="q3", split="validation", model=tmp_path / "adapter")
    assert seen == [7.5, 7.5]


def test_a_cell_that_was_stopped_goes_on(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_in(name: str, **options: Any) -> qa_dist.Evaluation | None:
        folder = {"output_dir": tmp_path / name, "num_train_epochs": 3, "checkpointing_steps": "1"}
        return qa_dist.train_model(qa_dist.configure(config, **folder, **options))

    whole = run_in("whole")
    step = Trainer.step

    def stopped(trainer: Trainer, number: int) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return step(trainer, number)

    monkeypatch.setattr(Trainer, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_in("stopped")
    monkeypatch.undo()
    gone_on = run_in("stopped", resume_from_checkpoint="auto")
    assert gone_on.metrics == whole.metrics
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda config: qa_dist.train_model(qa_dist.configure()), "output_dir is missing"),
        (lambda config: qa_dist.evaluate_model("/no/such/folder", config), "/no/such/folder is not a folder"),
        (lambda config: qa_dist.evaluate_model(qa_dist.build_model(config)), "config is missing"),
        (
            lambda config: qa_dist.evaluate_model(
                qa_dist.build_model(config), qa_dist.configure(config, train_file="a", validation_file=None)
            ),
            "a does not exist",
        ),
        (lambda config: qa_dist.inspect_example(config), "one of id and feature"),
        (lambda config: qa_dist.inspect_example(feature=1), "config is missing"),
        (lambda config: qa_dist.inspect_example(config, id="x"), "no example with the id x"),
        (lambda config: qa_dist.inspect_example(config, id="x", split="Train"), "no split Train, only train and"),
        (lambda config: qa_dist.write_report([]), "runs is empty"),
        (lambda config: qa_dist.write_report("x", resamples=0), "resamples 0 is out of range; it must be at least 100"),
        (lambda config: qa_dist.write_report("x", seed=-1), "seed -1 is out of range"),
        (lambda config: qa_dist.load_data(qa_dist.configure(config, train_file="/no.json")), "/no.json does not exist"),
        (lambda config: qa_dist.read_runs(["/no/such"]), "/no/such does not exist"),
    ],
)
def test_mistakes_are_one_sentence(call: Any, said: str, config: RunConfig) -> None:
    with pytest.raises(qa_dist.UserError, match=re.escape(said)) as caught:
        call(config)
    assert "\n" not in str(caught.value)


def test_the_page_of_the_api_has_every_name_and_runs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    table = page.partition("|---|---|\n")[2].partition("\n\n")[0]
    cells = " ".join(re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE))
    assert sorted(re.findall(r"`(\w+)", cells)) == sorted(qa_dist.__all__)
    # A file of that name in the folder where one works goes before the recipe that is shipped.
    (tmp_path / "quickstart").write_text(yaml.safe_dump({**options_of(trained), "num_train_epochs": 1}))
    monkeypatch.chdir(tmp_path)
    reset_accelerate()
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)```", page, re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert (tmp_path / "outputs" / "python" / "adapter_model.safetensors").is_file()
    assert "loss" in capsys.readouterr().out
