"""A run in one process: what it writes, when it stops, what it refuses."""

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qa_dist import evaluate, train
from qa_dist.common.errors import ConfigError
from qa_dist.config.recipe_files import read_recipe
from qa_dist.distributed.ranks import Ranks
from qa_dist.distributed.strategies.data_parallel import DataParallel
from tests.distributed.launching import lines
from tests.tiny import tiny_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    return {**tiny_inputs(folder, num_train=24, num_validation=12), "store_dir": str(folder / "store")}


@pytest.fixture
def run(inputs: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Train with these options on top of a small run; returns the exit code."""
    from accelerate.state import AcceleratorState

    def start(**options: Any) -> int:
        small = {"max_seq_length": 64, "doc_stride": 16, "global_batch_size": 8, "num_train_epochs": 1}
        settings = {**inputs, **small, "output_dir": tmp_path / "out", "disable_tqdm": "true", **options}
        words = [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
        AcceleratorState._reset_state(reset_partial_state=True)
        return train.main(words)

    yield start
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tf32": "true"}, "--tf32 is for CUDA devices and this one is cpu; drop it"),
        ({"optim": "paged_adamw_8bit"}, "--optim paged_adamw_8bit is for GPUs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_this_device_cannot_do_is_refused_at_once(
    run: Callable[..., int], tmp_path: Path, capsys: Any, options: dict[str, str], sentence: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")
    assert run(**options, train_file="none.json") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_processes_that_a_library_left_out_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    alone: Any = SimpleNamespace(world_size=1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    Ranks._refuse_dropped(alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="the launcher started 2 processes but 1 joined; use torchrun"):
        Ranks._refuse_dropped(alone)


def test_tf32_is_switched_on_where_it_can_be() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        Ranks.use_tf32(SimpleNamespace(device=torch.device("cuda")))  # type: ignore[arg-type]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_steps_that_overflow_in_float16_are_skipped_and_counted(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every skipped step halves the scale, until gradients fit into float16.
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**20))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = {
        "mixed_precision": "fp16",
        "num_train_epochs": 3,
        "checkpointing_steps": 2,
        "checkpoint_total_limit": 9,
    }
    assert run(**options, output_dir=whole) == 0
    norms = [line["grad_norm"] for line in lines(whole / "metrics.jsonl") if "loss" in line and "grad_norm" in line]
    skipped = norms.count(None)
    assert norms[:2] == [None, None], "an adapter's A has no gradient yet in the third step"
    assert norms[skipped:].count(None) == 0 < len(norms[skipped:])
    assert json.loads((whole / "run.json").read_text())["skipped_steps"] == skipped
    # The count, the scale and the moments that the skipped steps did not touch go on.
    assert run(**options, output_dir=resumed, resume_from_checkpoint=whole / "checkpoints" / "step-00000002") == 0
    assert json.loads((resumed / "run.json").read_text())["skipped_steps"] == skipped
    name = "adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_everything_is_written(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(num_train_epochs=2, eval_on_start="true") == 0
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    expected = "adapter_model.safetensors adapter_config.json tokenizer.json config.yaml metrics.json predictions.json"
    assert {*expected.split(), "nbest.json", "metrics.jsonl", "run.json", "best"} <= names
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics) == ["answer_normalization", "exact_match", "f1", "num_examples"]
    assert metrics["num_examples"] == 12
    assert len(json.loads((out / "predictions.json").read_text())) == 12
    entries = json.loads((out / "nbest.json").read_text())["q0"]
    assert list(entries[0]) == ["text", "score", "probability", "start_char", "end_char"]
    assert sum(entry["probability"] for entry in entries) == pytest.approx(1)
    record = json.loads((out / "run.json").read_text())
    assert record["world_size"] == 1
    assert record["versions"]["torch"]
    assert len(record["data"]["train"]["fingerprint"]) == 64
    assert {"prepare", "model", "train", "evaluate", "write"} <= set(record["seconds"])
    assert record["peak_memory_bytes_per_rank"][0] > (1e7 if torch.cuda.is_available() else 1e8)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"].endswith("bert")


def test_metrics_jsonl_has_a_line_per_step_and_evaluation(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(num_train_epochs=2, eval_steps=2, eval_on_start="true") == 0
    found = lines(tmp_path / "out" / "metrics.jsonl")
    steps = [line for line in found if "loss" in line]
    keys = ["step", "epoch", "loss", "learning_rate", "grad_norm", "num_features", "num_tokens"]
    assert all(list(line) == keys for line in steps)
    num_features = json.loads((tmp_path / "out" / "run.json").read_text())["data"]["train"]["num_features"]
    assert sum(line["num_features"] for line in steps) == 2 * num_features
    evaluations = [line for line in found if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, *range(2, len(steps) + 1, 2), *[len(steps)] * (len(steps) % 2)]
    assert all({"eval_f1", "eval_exact_match"} <= set(line) for line in evaluations)


def test_the_best_weights_are_kept_and_early_stopping_stops(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    from qa_dist.evaluation import loop as evaluation

    whole, scores = evaluation.evaluate, iter([10.0, 30.0, 20.0, 25.0, 40.0])

    def scored(*arguments: Any, **options: Any) -> evaluation.Evaluation:
        found = whole(*arguments, **options)
        return dataclasses.replace(found, metrics={**found.metrics, "f1": next(scores)})

    monkeypatch.setattr(evaluation, "evaluate", scored)
    assert run(num_train_epochs=50, eval_steps=2, early_stopping_patience=2, learning_rate=0.01) == 0
    out = tmp_path / "out"
    record = json.loads((out / "run.json").read_text())
    assert [entry["f1"] for entry in record["evaluations"]] == [10.0, 30.0, 20.0, 25.0]
    assert record["num_steps"] == 8
    assert record["weights_of_step"] == 4
    assert json.loads((out / "metrics.json").read_text())["f1"] == 30.0
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (out, out / "best")]
    assert weights[0] == weights[1]


def test_the_logits_are_those_of_the_weights_that_are_kept(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    import numpy as np
    from accelerate.state import AcceleratorState

    from qa_dist.evaluation import loop as evaluation

    whole, scores = evaluation.evaluate, iter([30.0, 20.0, 10.0, 30.0])

    def scored(*arguments: Any, **options: Any) -> evaluation.Evaluation:
        found = whole(*arguments, **options)
        return dataclasses.replace(found, metrics={**found.metrics, "f1": next(scores)})

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", scored)
        assert run(num_train_epochs=3, learning_rate=0.01, gather="logits") == 0
    out = tmp_path / "out"
    assert json.loads((out / "run.json").read_text())["weights_of_step"] == 3
    AcceleratorState._reset_state(reset_partial_state=True)
    assert evaluate.main(["--adapter", str(out), "--results_dir", str(tmp_path / "again")]) == 0
    assert np.array_equal(np.load(out / "logits.npy"), np.load(tmp_path / "again" / "logits.npy"))


def test_keep_last_ends_with_the_last_weights(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(num_train_epochs=2, keep="last", eval_steps="no") == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["weights_of_step"] == record["num_steps"]
    assert "evaluations" not in record
    assert not (tmp_path / "out" / "best").exists()
    assert (tmp_path / "out" / "metrics.json").exists(), "the final evaluation is whole all the same"


def test_training_without_validation_data(run: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    assert run(validation_file=None) == 2
    assert "give --validation_file, or --eval_steps no" in capsys.readouterr().err
    assert run(validation_file=None, eval_steps="no") == 0
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_loss_only_evaluations_on_a_subset(run: Callable[..., int], tmp_path: Path) -> None:
    options = {"max_eval_features": 5, "max_train_features": 10, "subset_seed": 42, "eval_on_start": "true"}
    assert run(**options, keep="last") == 0
    evaluations = [line for line in lines(tmp_path / "out" / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 2]
    assert not any("eval_f1" in line for line in evaluations)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["num_examples"] == 12


def test_the_resolved_configuration_repeats_the_run(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(seed=5, lora_dropout=0.2, model_dropout=0.1) == 0
    config = str(tmp_path / "out" / "config.yaml")
    assert read_recipe(config)["seed"] == 5
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    assert train.main(["--config", config, "--output_dir", str(tmp_path / "again")]) == 0
    for name in ("metrics.jsonl", "adapter_model.safetensors", "predictions.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_token_budgets_and_padding_do_not_change_the_result(run: Callable[..., int], tmp_path: Path) -> None:
    import numpy as np

    curves = []
    for number, options in enumerate(
        [{}, {"max_tokens_per_device": 64}, {"padding": "sorted"}, {"padding": "max_length"}]
    ):
        assert run(output_dir=tmp_path / str(number), lora_dropout=0, num_train_epochs=4, **options) == 0
        curves.append([line["loss"] for line in lines(tmp_path / str(number) / "metrics.jsonl") if "loss" in line])
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=1e-5)


def test_results_are_not_overwritten_unless_told(run: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    assert run() == 0
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert run(learning_rate=0.01) == 2
    assert "already holds results" in capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert run(learning_rate=0.01, overwrite_output_dir="true") == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before


def test_two_runs_do_not_share_a_folder(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from qa_dist.training import loop as training

    build, codes = training.build_trainable, []

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        # The first run has written nothing yet; the second is refused before it gets here.
        if not codes:
            codes.append(0)
            for more in ({}, {"overwrite_output_dir": "true"}, {"resume_from_checkpoint": "auto"}):
                codes.append(run(**more))
        return build(*arguments, **options)

    monkeypatch.setattr(training, "build_trainable", meanwhile)
    assert run() == 0
    assert codes == [0, 2, 2, 2]
    assert capsys.readouterr().err.count("another run is writing to --output_dir") == 3
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["num_examples"] == 12
    # It is free when the run has ended, well or not.
    monkeypatch.setattr(training, "build_trainable", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(overwrite_output_dir="true")
    monkeypatch.setattr(training, "build_trainable", build)
    assert run(overwrite_output_dir="true") == 0


@pytest.fixture
def launched_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the next runs be started by the torchrun of this name."""

    def launched(name: str) -> None:
        # What a torchrun sets that has restarted nothing after a failure, as when a machine joins.
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/torchelastic_a1b2c3/{name}/attempt_0/0/error.json")

    return launched


def fail_after(num_steps: int, run: Callable[..., int], **options: Any) -> None:
    """Let a run fail after so many steps."""
    update, steps = DataParallel.optimizer_step, itertools.count()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            DataParallel,
            "optimizer_step",
            lambda *given: update(*given) if next(steps) < num_steps else torch.tensor(float("inf")),
        )
        with pytest.raises(SystemExit, match="1"):
            run(**options)


def test_ranks_that_their_launcher_starts_again_go_on_unasked_and_no_others(
    run: Callable[..., int], launched_by: Callable[[str], None], tmp_path: Path, capsys: Any
) -> None:
    options = {"checkpointing_steps": 1, "num_train_epochs": 2}
    launched_by("one")
    fail_after(2, run, **options)
    launched_by("another")
    assert run(**options) == 2
    assert "already holds results" in capsys.readouterr().err
    launched_by("one")
    assert run(**options) == 0
    assert "resumed after step 2 of" in capsys.readouterr().err
    steps = [line["step"] for line in lines(tmp_path / "out" / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


def test_a_launcher_goes_on_only_where_its_ranks_took_the_folder_over(
    run: Callable[..., int], launched_by: Callable[[str], None], tmp_path: Path, capsys: Any
) -> None:
    assert run(checkpointing_steps=1) == 0
    launched_by("one")
    anew = {"checkpointing_steps": 1, "overwrite_output_dir": "true"}
    assert run(**anew, model_name_or_path="./nowhere") == 2
    assert run(**anew) == 0
    assert "resumed" not in capsys.readouterr().err, "what is overwritten is no part of this run"


def test_a_run_that_came_from_another_folder_goes_on_from_its_own_checkpoints(
    run: Callable[..., int], launched_by: Callable[[str], None], tmp_path: Path, capsys: Any
) -> None:
    options = {"checkpointing_steps": 1, "num_train_epochs": 2}
    fail_after(1, run, **options)
    launched_by("one")
    options |= {"resume_from_checkpoint": tmp_path / "out" / "checkpoints" / "step-00000001"}
    fail_after(1, run, **options, output_dir=tmp_path / "second")
    assert run(**options, output_dir=tmp_path / "second") == 0
    assert "resumed after step 2 of" in capsys.readouterr().err


def test_trackers_get_the_figures(run: Callable[..., int], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tracking extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(report_to="tensorboard") == 0
    folders = {path.parent for path in (tmp_path / "out").rglob("events.out.tfevents.*")}
    tags = set()
    for folder in folders:
        events = EventAccumulator(str(folder)).Reload()
        tags |= set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss", "eval/f1"} <= tags


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"report_to": "nothing_like_it"}, "--report_to nothing_like_it is no tracker; use some of"),
        ({"report_to": "aim"}, "needs the package aim, which is not installed"),
        ({"max_tokens_per_device": 20}, "--max_tokens_per_device 20 is less than one feature"),
        ({"max_seq_length": 512}, "160 positions"),
        ({"train_file": "missing.json"}, "missing.json"),
        ({"model_name_or_path": "./nowhere"}, "nowhere does not exist"),
    ],
)
def test_mistakes_are_one_sentence_with_code_2(
    run: Callable[..., int], options: dict[str, Any], message: str, capsys: Any
) -> None:
    assert run(**options) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1
    assert message in said[0]


def test_evaluating_a_folder_without_a_model_is_one_sentence(tmp_path: Path, capsys: Any) -> None:
    for folder, message in ((tmp_path, "holds no adapter and no model"), (tmp_path / "none", "is not a folder")):
        assert evaluate.main(["--adapter", str(folder)]) == 2
        assert message in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written_is_one_sentence(
    run: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert run(output_dir=tmp_path / "file" / "out") == 2
    assert "cannot be used" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_features(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(DataParallel, "optimizer_step", lambda *arguments: torch.tensor(float("inf")))
    with pytest.raises(SystemExit, match="1"):
        run()
    assert "the run stops: step 1: the gradient is not finite; features q" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_a_strategy_without_what_it_needs_is_refused(
    run: Callable[..., int], variable: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv(variable, "true")
    assert run() == 2
    assert "the launcher asks for" in capsys.readouterr().err


def test_evaluation_refuses_a_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    described = {"peft_type": "LORA", "base_model_name_or_path": "unused"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert evaluate.main(["--adapter", str(tmp_path)]) == 2
    assert "asks for FSDP, which holds models to train" in capsys.readouterr().err


def test_a_failed_run_leaves_no_watchdog(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:

    monkeypatch.setattr(DataParallel, "optimizer_step", lambda *arguments: torch.tensor(float("inf")))
    with pytest.raises(SystemExit, match="1"):
        run()
    assert "the gradient is not finite" in capsys.readouterr().err
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_determinism_reaches_torch_and_changes_nothing_on_a_cpu(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both are left in the process.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    assert run(output_dir=tmp_path / "plain") == 0
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        assert run(output_dir=tmp_path / "same", deterministic="true") == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    plain, same = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "same"))
    assert plain == same
