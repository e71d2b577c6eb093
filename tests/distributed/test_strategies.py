"""ZeRO-1, 2, 3 and FSDP2 on gloo processes: the same adapters, the same answers and the same files as one process."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from safetensors.numpy import load_file

from qa_dist import evaluate, train
from tests.distributed import strategy_state
from tests.distributed.forking import run_main, start_ranks
from tests.distributed.launching import ROOT, lines, of_accelerate
from tests.tiny import tiny_model, tiny_squad

pytestmark = pytest.mark.distributed

NUM_STEPS = 8
STRATEGIES = ("zero1", "zero2", "zero3", "fsdp2")

BUCKET = 1100
"""Elements of gradients reduced at once; the tiny adapters have matrices of 1,024 and 2,048, and a bias of 2."""


def needed(strategy: str) -> None:
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "model_name_or_path": tiny_model("bert", folder / "bert"),
        "train_file": tiny_squad(folder / "train.json", 40, seed=1, unanswerable=True),
        "validation_file": tiny_squad(folder / "validation.json", 21, seed=2, unanswerable=True),
        "store_dir": folder / "store",
        "max_seq_length": 64,
        "doc_stride": 16,
        "lora_dropout": 0,
        "lora_target_modules": "all-linear",
        # With 32 the adapters of the tiny model are above ZeRO-3's threshold, and its biases below.
        "lora_r": 32,
        "learning_rate": 2e-3,
        "max_grad_norm": 0.5,
        "global_batch_size": 11,
        "max_train_steps": NUM_STEPS,
        # Several micro-batches per step, and an evaluation in which one rank has a batch less than the other.
        "max_tokens_per_device": 150,
        "eval_tokens_per_device": 640,
        "eval_steps": 3,
        "checkpointing_steps": 4,
        "metric_for_best_model": "loss",
        "disable_tqdm": "true",
    }


def words(inputs: dict[str, object], output: Path, **options: object) -> list[str]:
    settings = {**inputs, "output_dir": output, **options}
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def in_this_process(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """The exit code of an entry point, run as a single process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    code = main(arguments)
    AcceleratorState._reset_state(reset_partial_state=True)
    return code


@pytest.fixture(scope="module")
def single(inputs: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "single"
    run_main("qa_dist.train", words(inputs, output), output.with_suffix(".log"))
    return output


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_gives_what_one_process_gives(
    strategy: str, inputs: dict[str, object], single: Path, tmp_path: Path
) -> None:
    needed(strategy)
    output = tmp_path / "out"
    num_processes, environment = of_accelerate(strategy)
    arguments = words(inputs, output)
    run_main("qa_dist.train", arguments, tmp_path / "log", num_processes=num_processes, environment=environment)
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert (record["strategy"], record["world_size"]) == (strategy, 2)
    steps, expected = (
        [line for line in lines(folder / "metrics.jsonl") if "loss" in line] for folder in (output, single)
    )
    assert len(steps) == NUM_STEPS
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("learning_rate", 0)):
        ours, theirs = ([line[name] for line in curve] for curve in (steps, expected))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, err_msg=name)
    assert max(line["grad_norm"] for line in steps) > 0.5, "nothing was clipped"
    for folder in (Path(), Path("best")):
        ours, theirs = (load_file(place / folder / "adapter_model.safetensors") for place in (output, single))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            np.testing.assert_allclose(ours[name], tensor, atol=1e-4, err_msg=name)
        described = [json.loads((place / folder / "adapter_config.json").read_text()) for place in (output, single)]
        for config in described:
            config["target_modules"].sort()
        assert described[0] == described[1]
    assert (output / "predictions.json").read_bytes() == (single / "predictions.json").read_bytes()
    # The best thresholds are scores, which the last bits of the weights move.
    ours, theirs = (json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in (output, single))
    assert ours.pop("answer_normalization") == theirs.pop("answer_normalization")
    assert ours == pytest.approx(theirs, rel=0, abs=1e-3)
    # A plain process reads the adapter and answers the same, to the last score.
    again = tmp_path / "again"
    assert in_this_process(evaluate.main, ["--adapter", str(output), "--results_dir", str(again)]) == 0
    for name in ("predictions.json", "metrics.json", "nbest.json", "null_odds.json"):
        assert (again / name).read_bytes() == (output / name).read_bytes(), name
    # And it goes on from a checkpoint of the strategy, with adapters in groups, where peft had them.
    resumed = tmp_path / "resumed"
    checkpoint = output / "checkpoints" / "step-00000004"
    options = words(inputs, resumed, resume_from_checkpoint=checkpoint, lora_implementation="grouped")
    assert in_this_process(train.main, options) == 0
    for name, tensor in load_file(single / "adapter_model.safetensors").items():
        found = load_file(resumed / "adapter_model.safetensors")[name]
        np.testing.assert_allclose(found, tensor, atol=1e-4, err_msg=name)


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def launched(strategy: str, folder: Path) -> dict[str, str]:
    """What accelerate launch would put into the environment, for a model that is large beside a bucket of gradients."""
    if strategy.startswith("fsdp2"):
        return {**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": str(strategy != "fsdp2_gathered").lower()}
    config = json.loads((ROOT / "ds_configs" / f"{strategy}.json").read_text(encoding="utf-8"))
    config["zero_optimization"]["reduce_bucket_size"] = BUCKET
    path = folder / f"{strategy}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


@pytest.fixture(scope="module")
def state(inputs: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process gets."""
    folder = tmp_path_factory.mktemp("state")
    group = start_ranks(partial(strategy_state.check, words(inputs, folder), str(folder / "result")), folder / "log")
    assert group.wait() == [0], group.text()
    return folder / "result"


@pytest.mark.parametrize("strategy", [*STRATEGIES, "fsdp2_gathered", "zero2_offload", "zero3_offload"])
def test_weights_and_moments_are_taken_and_put_back_whole(
    strategy: str, inputs: dict[str, object], state: Path, tmp_path: Path
) -> None:
    import torch

    needed(strategy)
    body = partial(strategy_state.check, words(inputs, tmp_path), str(tmp_path / "result"))
    group = start_ranks(body, tmp_path / "log", num_processes=2, environment=launched(strategy, tmp_path))
    assert group.wait() == [0, 0], group.text()
    found, expected = (torch.load(path) for path in (tmp_path / "result", state))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            np.testing.assert_allclose(ours[name], tensor, atol=1e-4, err_msg=name)


def test_a_rank_out_of_memory_says_so_and_ends_the_run(inputs: dict[str, object], tmp_path: Path) -> None:
    body = partial(strategy_state.run_out_of_memory, words(inputs, tmp_path / "out"))
    group = start_ranks(body, tmp_path / "log", num_processes=2, environment=FSDP2)
    assert group.wait() == [1, 1]
    assert "[rank 1 of 2] the run stops: step 1: out of memory with 150 tokens per device" in group.text()
    assert "lower --max_tokens_per_device" in group.text()
