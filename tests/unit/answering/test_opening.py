"""What a model's folder may hold, wherever it was trained, and what is said of one that holds something else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qa_dist.answering.reader import Reader
from qa_dist.answering.torch_backend import TorchBackend
from qa_dist.common.errors import UserError
from tests.tiny import WORDS, tiny_config, tiny_model, tiny_tokenizer
from tests.unit.trained import edit_json, trained_folder

CONTEXT = " ".join(WORDS[:30])
QUESTION = "what follows amber ?"


def foreign_model(model_type: str, folder: Path) -> Path:
    """A question-answering model as transformers alone makes one."""
    from transformers import AutoModelForQuestionAnswering

    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)
    AutoModelForQuestionAnswering.from_config(tiny_config(model_type, len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def best_span(folder: Path, question: str, context: str, longest: int) -> tuple[float, int, int]:
    """Score and characters of the best span of a short context, by loops over the logits of transformers' own model."""
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    encoded = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets, sides = encoded.pop("offset_mapping")[0].tolist(), encoded.sequence_ids(0)
    if model.config.model_type in ("distilbert", "modernbert"):
        encoded.pop("token_type_ids")
    if getattr(model.config, "type_vocab_size", 2) == 1:
        encoded["token_type_ids"] = torch.zeros_like(encoded["input_ids"])
    with torch.no_grad():
        output = model(**encoded)
    start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
    tokens = [token for token, side in enumerate(sides) if side == 1]
    return max(
        (start[first] + end[last], offsets[first][0], offsets[last][1])
        for first in tokens
        for last in tokens
        if first <= last < first + longest
    )


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2", "distilbert", "electra", "modernbert", "roberta"])
def test_a_model_of_transformers_is_read(model_type: str, tmp_path: Path) -> None:
    folder = foreign_model(model_type, tmp_path / model_type)
    reader = Reader(folder, device="cpu", max_answer_length=4)
    answer = reader.answer(QUESTION, CONTEXT)
    score, start, end = best_span(folder, QUESTION, CONTEXT, 4)
    assert (answer.start_char, answer.end_char) == (start, end)
    assert answer.score == pytest.approx(score, abs=1e-4)
    assert answer.no_answer_odds is None
    # As many as it has positions, which are fewer than the usual 384.
    assert reader.settings["max_seq_length"] == {"roberta": 159}.get(model_type, 160)
    assert reader.settings["doc_stride"] == reader.settings["max_seq_length"] // 2


@pytest.mark.parametrize("options", [{}, {"use_dora": "true", "lora_target_modules": "all-linear"}])
def test_an_adapter_becomes_part_of_the_weights(trained: Path, tmp_path: Path, options: dict[str, str]) -> None:
    from qa_dist.config.parsing import parse
    from qa_dist.config.recipe_files import read_recipe
    from qa_dist.model.saved import load_trained

    adapter = (trained_folder(tmp_path, learning_rate="0.05", **options) if options else trained) / "adapter"
    reader = Reader(adapter, device="cpu")
    assert isinstance(reader.backend, TorchBackend)
    assert not [name for name, _ in reader.backend.model.named_parameters() if "lora" in name]
    config, _ = parse([], prog="", description="", groups=("model",), base=read_recipe(str(adapter / "config.yaml")))
    beside = load_trained(config.model, str(adapter), max_seq_length=64, tokenizer_pads_left=False)
    assert [name for name, _ in beside.named_parameters() if "lora" in name]
    lengths = (20, 13)
    input_ids_T = torch.randint(5, 50, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart, folded = (
            torch.stack(model(input_ids_T, torch.zeros_like(input_ids_T), lengths))
            for model in (beside, reader.backend.model)
        )
    assert (apart - folded).abs().max() < 1e-5 * apart.abs().max()


def test_over_quantised_weights_an_adapter_stays_beside_them(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the quant extra, is not installed")
    reader = Reader(trained_folder(tmp_path, quantization="8bit") / "adapter", device="cpu")
    assert isinstance(reader.backend, TorchBackend)
    assert [name for name, _ in reader.backend.model.named_parameters() if "lora" in name]
    answer = reader.answer(QUESTION, CONTEXT)
    assert answer.text == CONTEXT[answer.start_char : answer.end_char] != ""


def test_a_whole_model_that_was_trained_here_needs_no_other_folder(tmp_path: Path) -> None:
    folder = trained_folder(tmp_path, tuning="full")
    before = Reader(folder / "adapter", device="cpu").answer(QUESTION, CONTEXT)
    (folder / "model").rename(folder / "gone")
    reader = Reader(folder / "adapter", device="cpu")
    assert reader.answer(QUESTION, CONTEXT) == before
    assert reader.settings["max_seq_length"] == 64, "as its run has it"


def test_whether_there_may_be_no_answer_is_as_in_the_run(copy: Path) -> None:
    adapter = copy / "adapter"
    assert not Reader(adapter, device="cpu").allow_no_answer
    # What an evaluation writes where questions lack answers.
    (adapter / "null_odds.json").write_text("{}")
    assert Reader(adapter, device="cpu").allow_no_answer
    assert not Reader(adapter, device="cpu", allow_no_answer=False).allow_no_answer


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_model("bert", tmp_path_factory.mktemp("foreign") / "bert")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_length": 15}, "max_seq_length 15 is out of range; it must be at least 16"),
        ({"max_seq_length": 161, "doc_stride": 8}, "max_seq_length 161 is more than the 160 positions of this model"),
        ({"max_seq_length": 64, "doc_stride": 60}, "doc_stride 60 leaves no room"),
        ({"max_seq_length": "many"}, "max_seq_length many is not an integer"),
        ({"tokens_per_batch": 1}, "tokens_per_batch 1 is out of range; it must be at least 16"),
        ({"n_best_size": 0}, "n_best_size 0 is out of range; it must be at least 1 and at most 1000"),
        ({"null_score_diff_threshold": float("nan")}, "null_score_diff_threshold nan is out of range"),
        ({"mixed_precision": "int8"}, "mixed_precision 'int8' is none of no, bf16, fp16"),
        ({"device": "gpu"}, "the device 'gpu' is none that is known; give cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "the device cuda:99 is not there"),
        ({"quantized": "yes"}, "quantized is 'yes'; give True, False or None"),
        ({"num_threads": 0}, "num_threads is 0; give a whole number of 1 or more, or None"),
        ({"num_threads": True}, "num_threads is True; give a whole number of 1 or more, or None"),
        ({"num_threads": 2}, "num_threads can be set for an exported model only"),
    ],
)
def test_options_that_do_not_fit_are_named_as_they_were_given(
    foreign: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        Reader(foreign, **options)
    assert str(caught.value).startswith(message), str(caught.value)


def test_what_is_no_model_is_refused(tmp_path: Path, foreign: Path) -> None:
    (tmp_path / "empty").mkdir()
    file = tmp_path / "model.txt"
    file.write_text("a model")
    headless = tiny_model("bert", tmp_path / "headless")
    other = foreign_model("bert", tmp_path / "other")
    edit_json(other / "config.json", vocab_size=20)
    for name, message in (
        (tmp_path / "nowhere", "does not exist; name a local folder, a hub id"),
        (tmp_path / "empty", "holds no adapter and no model; name the --output_dir of a training run, or a model"),
        (file, "is a file; name the folder that holds the model"),
        (headless, "lacks qa_outputs.bias, qa_outputs.weight, which would be random"),
        (other, "cannot be loaded"),
    ):
        with pytest.raises(UserError) as caught:
            Reader(name, device="cpu")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_noticed(tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    folder = foreign_model("bert", tmp_path / "bert")
    AutoModelForQuestionAnswering.from_config(tiny_config("bert", 20)).save_pretrained(folder)
    reader = Reader(folder, device="cpu")
    with pytest.raises(UserError, match="the tokenizer gives token ids up to"):
        reader.answer(QUESTION, CONTEXT)


def test_the_run_of_a_stranger_may_not_set_what_is_no_option(copy: Path) -> None:
    adapter = copy / "adapter"
    with (adapter / "config.yaml").open("a") as file:
        file.write("trust_remote_code: true\n")
    with pytest.raises(UserError, match="trust_remote_code is no option here"):
        Reader(adapter, device="cpu")
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "LORA"
