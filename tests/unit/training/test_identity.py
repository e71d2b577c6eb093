"""What a run and a checkpoint must share: what differs is named, and ranks that start from other weights are."""

from typing import Any

import pytest
import torch
from torch import nn

from qa_dist.common.errors import ConfigError
from qa_dist.config.options import DataConfig, EvaluationConfig, RunConfig, TrainingConfig
from qa_dist.model.fingerprint import weights_fingerprint
from qa_dist.training.identity import differences, run_identity


class FakeRanks:
    """Rank 0 of two, of which the other has these fingerprints; None: the same ones."""

    def __init__(self, other: Any = None) -> None:
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other or value]

    def broadcast(self, value: Any) -> Any:
        return value


class FakeStore:
    fingerprint = "f" * 64


def model(frozen: float = 1.0, trained: float = 2.0) -> Any:
    """A frozen tensor, a trained one, and the copy of a head that peft keeps and nobody uses."""
    made = nn.Module()
    made.base, made.head = nn.Linear(2, 2), nn.Module()
    made.head.original_module = nn.Linear(2, 2)
    for weight in made.base.parameters():
        nn.init.constant_(weight, frozen)
        weight.requires_grad_(False)
    made.adapter = nn.Parameter(torch.full((3,), trained))
    return made


def identity(config: RunConfig, built: Any, ranks: Any = None) -> dict[str, Any]:
    store: Any = FakeStore()
    return run_identity(config, store, built, ranks or FakeRanks())


def test_determinism_is_part_of_it_and_runs_from_before_there_was_a_choice_go_on() -> None:
    plain, deterministic = (
        identity(RunConfig(training=TrainingConfig(deterministic=wanted)), model()) for wanted in (False, True)
    )
    assert differences(plain, deterministic) == ["deterministic is True here and False there"]
    earlier = {name: value for name, value in plain.items() if name != "deterministic"}
    assert differences(earlier, plain) == []
    assert differences(earlier, deterministic) == ["deterministic is True here and False there"]


def test_the_identity_is_the_fixed_options_the_data_and_the_base_weights() -> None:
    config = RunConfig(training=TrainingConfig(seed=7, hang_timeout=3))
    found = identity(config, model())
    assert found.items() >= config.fixed().items()
    assert found["seed"] == 7
    assert "hang_timeout" not in found, "what a step computes does not depend on it"
    assert found["training data"] == "f" * 64
    assert identity(config, model(trained=5.0)) == found, "what is trained is in the checkpoint"
    assert identity(config, model(frozen=5.0))["base model"] != found["base model"]


def test_in_full_fine_tuning_the_base_is_what_is_trained() -> None:
    built, other = model(), model(trained=5.0)
    for each in (built, other):
        each.requires_grad_(True)
    assert identity(RunConfig(), built)["base model"] != identity(RunConfig(), other)["base model"]


def test_a_rank_that_starts_from_other_weights_is_named() -> None:
    with pytest.raises(ConfigError, match="rank 1 starts from other weights than rank 0") as caught:
        identity(RunConfig(), model(), FakeRanks(other=("0" * 64, "0" * 64)))
    assert caught.value.on_all_ranks


def test_differences_name_what_differs_and_nothing_else() -> None:
    saved = {"seed": 1, "lora_r": 8, "gone": True}
    found = differences(saved, {"seed": 2, "lora_r": 8, "new": None})
    assert found == [
        "gone is absent here and True there",
        "new is None here and absent there",
        "seed is 2 here and 1 there",
    ]
    assert differences(saved, dict(saved)) == []


def test_a_fingerprint_sees_every_bit_name_and_type() -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1, dtype=torch.bfloat16)}
    changed = [
        {**weights, "a": weights["a"].reshape(3, 2)},
        {**weights, "a": weights["a"].double()},
        {**weights, "a": torch.nextafter(weights["a"], torch.tensor(9.0))},
        {"c": weights["a"], "b": weights["b"]},
        {"a": weights["a"]},
    ]
    prints = [weights_fingerprint(each) for each in (weights, dict(reversed(weights.items())), *changed)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 1 + len(changed)


def test_rules_of_scores_are_fixed_and_those_of_earlier_checkpoints_were_squads() -> None:
    found = identity(RunConfig(), model())
    assert found["answer_normalization"] == "squad"
    earlier = {name: value for name, value in found.items() if name != "answer_normalization"}
    assert differences(earlier, found) == []
    other = identity(RunConfig(evaluation=EvaluationConfig(answer_normalization="mlqa:zh")), model())
    assert differences(earlier, other) == ["answer_normalization is mlqa:zh here and squad there"]


def test_the_seed_of_a_subset_of_features_is_part_of_it() -> None:
    drawn = [
        identity(RunConfig(data=DataConfig(max_train_features=5, max_eval_features=5, subset_seed=seed)), model())
        for seed in (1, 2)
    ]
    assert differences(*drawn) == ["subset_seed is 2 here and 1 there"]
    earlier = {name: value for name, value in drawn[0].items() if name != "subset_seed"}
    assert differences(earlier, drawn[1]) == [], "checkpoints of earlier versions do not say"
    # What decides the features of a subset of examples is in their fingerprint.
    assert "subset_seed" not in identity(RunConfig(data=DataConfig(max_eval_features=5, subset_seed=1)), model())


def test_an_option_that_was_taken_out_and_was_off_is_no_difference() -> None:
    found = identity(RunConfig(), model())
    off = {"loraplus_lr_ratio": None, "head_lr_ratio": None, "ema_decay": None, "init_lora_weights": "default"}
    assert differences({**found, **off}, found) == []


def test_another_compiler_s_choice_is_another_run_and_earlier_checkpoints_do_not_tell() -> None:
    layers, none = (
        identity(RunConfig(training=TrainingConfig(torch_compile=wanted)), model()) for wanted in ("layers", "no")
    )
    assert differences(layers, none) == ["torch_compile is no here and layers there"]
    earlier = {name: value for name, value in layers.items() if name != "torch_compile"}
    assert differences(earlier, none) == differences(earlier, layers) == []


def test_checkpoints_of_versions_without_rdrop_are_those_of_runs_without_it() -> None:
    without, with_it = (
        identity(RunConfig(training=TrainingConfig(rdrop_alpha=alpha)), model()) for alpha in (0.0, 1.0)
    )
    earlier = {name: value for name, value in without.items() if name != "rdrop_alpha"}
    assert differences(earlier, without) == []
    assert differences(earlier, with_it) == ["rdrop_alpha is 1.0 here and 0.0 there"]


def test_the_type_of_the_stream_is_part_of_it_and_was_float32_before_there_was_a_choice() -> None:
    wide, narrow = (
        identity(RunConfig(training=TrainingConfig(mixed_precision="bf16", residual_dtype=dtype)), model())
        for dtype in ("float32", "bf16")
    )
    earlier = {name: value for name, value in wide.items() if name != "residual_dtype"}
    assert differences(earlier, wide) == []
    for saved in (earlier, wide):
        assert differences(saved, narrow) == ["residual_dtype is bf16 here and float32 there"]
