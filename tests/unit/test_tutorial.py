"""The recipe `tutorial` against the tutorial: the values that it names, and the libraries' defaults for all others."""

from pathlib import Path

import pytest
from peft import LoraConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from transformers import TrainingArguments

from qa_dist.config.options import RunConfig
from qa_dist.config.parsing import parse
from qa_dist.data.sources import subset
from qa_dist.model.families import FAMILIES


@pytest.fixture(scope="module")
def recipe() -> RunConfig:
    return parse(["--output_dir", "out", "--config", "tutorial"], prog="test", description="")[0]


def test_data_and_model_are_the_tutorial_s(recipe: RunConfig) -> None:
    data, model = recipe.data, recipe.model
    assert (data.dataset_name, data.max_seq_length, data.doc_stride) == ("squad", 384, 128)
    assert (data.subset_seed, data.max_train_features, data.max_eval_features) == (42, 5000, 1000)
    assert (data.max_train_samples, data.max_eval_samples) == (None, None), "the subset is one of features"
    assert model.model_name_or_path.removeprefix("google-bert/") == "bert-base-uncased"
    assert (model.model_config, model.model_dropout, model.quantization) == (None, None, "no")


@pytest.mark.parametrize(("num_features", "num_chosen"), [(88_524, 5000), (10_784, 1000)])
def test_the_features_are_the_first_of_datasets_shuffle(recipe: RunConfig, num_features: int, num_chosen: int) -> None:
    datasets = pytest.importorskip("datasets")
    shuffled = datasets.Dataset.from_dict({"index": range(num_features)}).shuffle(seed=42).select(range(num_chosen))
    assert subset(num_features, num_chosen, recipe.data.subset_seed).tolist() == shuffled["index"][:]


def test_adapters_are_the_tutorial_s(recipe: RunConfig) -> None:
    model = recipe.model
    lora = LoraConfig(r=8, lora_alpha=1, lora_dropout=0.1)
    assert (model.tuning, model.lora_r, model.lora_alpha) == ("lora", lora.r, lora.lora_alpha)
    assert model.lora_dropout == lora.lora_dropout
    assert (model.use_rslora, model.use_dora) == (lora.use_rslora, lora.use_dora) == (False, False)
    assert model.lora_target_modules == ("attention",)
    assert FAMILIES["bert"].projections == tuple(DEFAULT_TARGETS["bert"]) == ("query", "value")


def test_the_optimisation_is_the_tutorial_s(recipe: RunConfig, tmp_path: Path) -> None:
    training = recipe.training
    trainer = TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=2e-5,
        weight_decay=0.01,
        per_device_train_batch_size=16,
        num_train_epochs=5,
        use_cpu=True,
    )
    assert training.learning_rate == trainer.learning_rate
    assert training.weight_decay == trainer.weight_decay == 0.01
    assert training.global_batch_size == trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    assert training.num_train_epochs == trainer.num_train_epochs
    assert (training.lr_scheduler_type, trainer.lr_scheduler_type.value) == ("linear", "linear")
    assert (training.warmup_ratio, trainer.warmup_steps) == (0, 0)
    assert training.max_grad_norm == trainer.max_grad_norm == 1.0
    assert training.seed == trainer.seed == 42
    assert training.optim == "adamw"
    assert (training.adam_beta1, training.adam_beta2) == (trainer.adam_beta1, trainer.adam_beta2)
    assert training.adam_epsilon == trainer.adam_epsilon
    assert (training.max_train_steps, training.mixed_precision) == (None, "no")
    assert (trainer.bf16, trainer.fp16) == (False, False)
    assert (training.eval_on_start, training.eval_steps, training.keep) == (True, "epoch", "last")
