"""The same run at any world size: the loss curve, the gradients, the answers."""

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.forking import run_main
from tests.distributed.launching import lines
from tests.tiny import tiny_model, tiny_squad

pytestmark = pytest.mark.distributed

WORLD_SIZES = (1, 2, 3, 5)
NUM_STEPS = 24
BUDGETS = {1: "128", 2: "4096", 3: "200", 5: "96"}
"""Every world size with a token budget of its own: neither may matter."""
OPTIONS = {2: {"lora_implementation": "grouped"}}
"""What else must not matter: who computes the adapters."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "model": str(tiny_model("bert", folder / "bert")),
        "train": str(tiny_squad(folder / "train.json", 60, seed=1, unanswerable=True)),
        "validation": str(tiny_squad(folder / "validation.json", 33, seed=2, unanswerable=True)),
        "store": str(folder / "store"),
    }


def arguments(inputs: dict[str, str], output: Path, **options: object) -> list[str]:
    settings: dict[str, object] = {
        "model_name_or_path": inputs["model"],
        "train_file": inputs["train"],
        "validation_file": inputs["validation"],
        "store_dir": inputs["store"],
        "output_dir": output,
        "max_seq_length": 64,
        "doc_stride": 16,
        "lora_dropout": 0,
        "lora_target_modules": "all-linear",
        "learning_rate": 2e-3,
        # 11 leaves a short last step in every epoch, and ranks without a feature at world size 5.
        "global_batch_size": 11,
        "num_train_epochs": 100,
        "max_train_steps": NUM_STEPS,
        "eval_steps": 12,
        "keep": "last",
        "disable_tqdm": "true",
        **options,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def runs(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    outputs = {}
    for world_size in WORLD_SIZES:
        output = outputs[world_size] = tmp_path_factory.mktemp("runs") / str(world_size)
        words = arguments(inputs, output, max_tokens_per_device=BUDGETS[world_size], **OPTIONS.get(world_size, {}))
        run_main("qa_dist.train", words, output.with_suffix(".log"), num_processes=world_size)
    return outputs


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_the_loss_curve_does_not_depend_on_the_world_size(runs: dict[int, Path], world_size: int) -> None:
    curves = {}
    for size in (1, world_size):
        steps = [line for line in lines(runs[size] / "metrics.jsonl") if "loss" in line]
        assert [line["step"] for line in steps] == list(range(1, NUM_STEPS + 1))
        curves[size] = steps
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        single, several = ([line[name] for line in curves[size]] for size in (1, world_size))
        np.testing.assert_allclose(several, single, rtol=tolerance, err_msg=name)
    for name in ("num_features", "num_tokens", "learning_rate"):
        assert [line[name] for line in curves[1]] == [line[name] for line in curves[world_size]]
    # The model learns, so that equal curves mean something.
    losses = [line["loss"] for line in curves[1]]
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.1


@pytest.mark.parametrize("world_size", [1, 3])
def test_features_that_are_computed_twice_alike_take_the_same_steps(
    inputs: dict[str, str], runs: dict[int, Path], tmp_path: Path, world_size: int
) -> None:
    # Dropout so rare that nothing is dropped: both copies say the same, and are not apart.
    words = arguments(inputs, tmp_path / "twice", rdrop_alpha=3, model_dropout=1e-7, max_tokens_per_device=200)
    run_main("qa_dist.train", words, tmp_path / "twice.log", num_processes=world_size)
    once, twice = (
        [line for line in lines(folder / "metrics.jsonl") if "loss" in line] for folder in (runs[1], tmp_path / "twice")
    )
    for name in ("loss", "num_features", "num_tokens"):
        np.testing.assert_allclose([line[name] for line in twice], [line[name] for line in once], rtol=1e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_adapters_agree(runs: dict[int, Path], world_size: int) -> None:
    from safetensors.numpy import load_file

    single, several = (load_file(runs[size] / "adapter_model.safetensors") for size in (1, world_size))
    assert single.keys() == several.keys()
    for name, tensor in single.items():
        np.testing.assert_allclose(several[name], tensor, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def evaluations(
    inputs: dict[str, str], runs: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], Path]:
    found = {}
    for world_size in WORLD_SIZES:
        for gather in ("candidates", "logits") if world_size in (1, 3) else ("candidates",):
            results = found[world_size, gather] = tmp_path_factory.mktemp("results")
            words = ["--adapter", str(runs[1]), "--store_dir", inputs["store"], "--results_dir", str(results)]
            # A small budget makes many batches, and few enough that one of five ranks may have none.
            words += ["--gather", gather, "--eval_tokens_per_device", "640"]
            run_main("qa_dist.evaluate", words, results.with_suffix(".log"), num_processes=world_size)
    return found


def test_evaluation_files_are_byte_identical(evaluations: dict[tuple[int, str], Path]) -> None:
    assert len(evaluations) == len(WORLD_SIZES) + 2
    first = evaluations[1, "candidates"]
    for results in evaluations.values():
        for name in ("metrics.json", "predictions.json", "nbest.json", "null_odds.json"):
            assert (results / name).read_bytes() == (first / name).read_bytes(), (results, name)
    assert len(set((first / "predictions.json").read_text().splitlines())) > 10, "answers should differ"


def test_gathered_logits_cover_every_token(evaluations: dict[tuple[int, str], Path], runs: dict[int, Path]) -> None:
    import json

    one, three = (np.load(evaluations[size, "logits"] / "logits.npy") for size in (1, 3))
    data = json.loads((runs[1] / "run.json").read_text())["data"]["validation"]
    assert one.shape == (round(data["mean_tokens"] * data["num_features"]), 2)
    assert np.isfinite(one).all()
    assert np.array_equal(one, three)


def test_evaluate_repeats_the_metrics_of_the_run(inputs: dict[str, str], runs: dict[int, Path], tmp_path: Path) -> None:
    words = ["--adapter", str(runs[2]), "--store_dir", inputs["store"], "--results_dir", str(tmp_path)]
    run_main("qa_dist.evaluate", words, tmp_path / "log")
    for name in ("metrics.json", "predictions.json"):
        assert (tmp_path / name).read_bytes() == (runs[2] / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"lora_bias": "all", "layer_decay": 0.9},
        {"tuning": "full", "lora_target_modules": "attention", "lora_dropout": 0.1, "layer_decay": 0.8},
    ],
    ids=["lora", "full"],
)
def test_methods_give_the_same_weights_at_any_world_size(
    inputs: dict[str, str], tmp_path: Path, options: dict[str, object]
) -> None:
    from safetensors.numpy import load_file

    found = []
    for world_size in (1, 2):
        output = tmp_path / str(world_size)
        few = {"max_train_steps": 6, "eval_steps": "no", "model_dropout": 0, **options}
        run_main(
            "qa_dist.train", arguments(inputs, output, **few), output.with_suffix(".log"), num_processes=world_size
        )
        (saved,) = output.glob("*model.safetensors")
        found.append(load_file(saved))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        np.testing.assert_allclose(found[1][name], tensor, atol=1e-6, err_msg=name)
