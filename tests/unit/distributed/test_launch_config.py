"""What launchers ask for: carried out whole, or refused with the reason."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qa_dist.common.errors import ConfigError
from qa_dist.config.options import ModelConfig, RunConfig, TrainingConfig
from qa_dist.distributed import zero_section
from qa_dist.distributed.launch_config import GRADIENT_BUCKET, LaunchConfig, asks_for, read_launch_config

ROOT = Path(__file__).parents[3]
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def training(quantization: Any = "no", lora_implementation: Any = "auto", **options: Any) -> RunConfig:
    model = ModelConfig(quantization=quantization, lora_implementation=lora_implementation)
    return RunConfig(model=model, training=TrainingConfig(output_dir="unused", **options))


def deepspeed(path: Path, **more: str) -> dict[str, str]:
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path), **more}


def problems(environment: dict[str, str], **options: Any) -> str:
    with pytest.raises(ConfigError) as found:
        read_launch_config(environment, training(**options))
    return "\n".join(found.value.problems)


@pytest.fixture
def edited(tmp_path: Path) -> Any:
    """A copy of zero2.json with changes; None removes a key."""

    def write(**changes: Any) -> Path:
        config = json.loads((ROOT / "ds_configs" / "zero2.json").read_text(encoding="utf-8"))
        for name, value in changes.items():
            if value is None:
                del config[name]
            elif isinstance(value, dict) and name in config:
                config[name].update(value)
            else:
                config[name] = value
        path = tmp_path / "edited.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        return path

    return write


def test_without_a_strategy_it_is_data_parallel() -> None:
    assert read_launch_config({}, training()) == LaunchConfig(strategy="ddp")
    switched_off = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_MIXED_PRECISION": "no"}
    assert read_launch_config(switched_off, training()) == LaunchConfig()
    assert asks_for({}) is None


def test_there_are_deepspeed_configurations() -> None:
    assert {path.stem for path in DS_CONFIGS} == {"zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"}


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_leave_batch_precision_and_clipping_to_the_recipe(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    autos = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [found[name] for name in autos] == ["auto"] * 4
    assert found["bf16"] == found["fp16"] == {"enabled": "auto"}
    assert not {"optimizer", "scheduler"} & set(found)
    launch_config = read_launch_config(deepspeed(path), training(max_grad_norm=0.7))
    assert launch_config.strategy == path.stem.removesuffix("_offload")
    assert launch_config.deepspeed["gradient_clipping"] == 0.7
    assert '"auto"' not in json.dumps(dict(launch_config.deepspeed))
    assert read_launch_config(deepspeed(path), training(max_grad_norm=None)).deepspeed["gradient_clipping"] == 0.0


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_reads_what_it_is_given(path: Path) -> None:
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    from deepspeed.runtime.config import DeepSpeedConfig

    config = DeepSpeedConfig(dict(read_launch_config(deepspeed(path), training(max_grad_norm=0.7)).deepspeed))
    assert int(config.zero_optimization_stage) == int(path.stem[4])
    assert config.gradient_clipping == 0.7
    assert not config.float16_config.enabled
    assert not config.bfloat16_config.enabled
    # DeepSpeed's default takes 1.9 GiB on every rank; estimates of memory count on this.
    assert config.zero_config.reduce_bucket_size == GRADIENT_BUCKET
    offloaded = config.zero_config.offload_optimizer
    assert (offloaded is not None) == path.stem.endswith("_offload")


def test_the_keys_of_the_section_are_those_of_deepspeed() -> None:
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    taken = {field.alias or name: field.annotation for name, field in fields.items()}
    assert {name: taken.get(name) for name in zero_section._NUMBERS} == dict.fromkeys(zero_section._NUMBERS, int)
    assert {taken.get(name) for name in zero_section._SWITCHES} == {bool, bool | None}
    assert zero_section._OFFLOADS.keys() <= taken.keys()


def test_a_whole_number_may_be_written_as_json_writes_large_ones(edited: Any) -> None:
    path = edited(zero_optimization={"reduce_bucket_size": 5e8, "overlap_comm": False, "offload_param": None})
    assert read_launch_config(deepspeed(path), training()).strategy == "zero2"


def test_offloading_by_flag_is_offloading_by_file() -> None:
    for stage in ("zero2", "zero3"):
        by_flag = read_launch_config(deepspeed(ROOT / f"ds_configs/{stage}.json"), training(cpu_offload=True))
        by_file = read_launch_config(deepspeed(ROOT / f"ds_configs/{stage}_offload.json"), training())
        places = [
            {name: section for name, section in launch_config.deepspeed["zero_optimization"].items() if "off" in name}
            for launch_config in (by_flag, by_file)
        ]
        assert places[0] == places[1] != {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "section optimizer, but the recipe sets the optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "section scheduler, but the recipe"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4, but micro-batches follow"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2, but"),
        ({"train_batch_size": 99}, "train_batch_size is 99, but the recipe's global_batch_size is 16"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but the recipe's max_grad_norm is 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but precision is the recipe's (--mixed_precision no)"),
        ({"fp16": {"loss_scale": 128}}, "fp16.loss_scale is 128"),
        ({"gradient_cliping": 1.0}, "gradient_cliping would have no effect"),
        ({"zero_force_ds_cpu_optimizer": True}, "torch's AdamW"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0; use 1, 2 or 3"),
        ({"zero_optimization": {"stage": [2]}}, "zero_optimization.stage is [2]; use 1, 2 or 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "device is nvme; use cpu or none"),
        (
            {"zero_optimization": {"offload_optimizer": "cpu"}},
            "is cpu and must be an object, such as",
        ),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "has no effect in stage 2"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "reduce_bucket_size is auto, which nothing fills in"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true; use 1, 2 or 3"),
        ({"zero_optimization": {"reduce_bucket_size": -5}}, "reduce_bucket_size is -5; use a whole number, 1 or more"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "reduce_bucket_size is many; use a whole number"),
        ({"zero_optimization": {"allgather_bucket_size": 1.5}}, "allgather_bucket_size is 1.5; use a whole number"),
        ({"zero_optimization": {"allgather_bucket_size": True}}, "allgather_bucket_size is true; use a whole number"),
        ({"zero_optimization": {"overlap_comm": 1}}, "zero_optimization.overlap_comm is 1; use true or false"),
        ({"zero_optimization": {"overlap_com": True}}, "overlap_com would have no effect; did you mean overlap_comm?"),
        (
            {"zero_optimization": {"allgather_partitions": False}},
            "zero_optimization.allgather_partitions would have no",
        ),
        ({"zero_optimization": {"foo": 3}}, "zero_optimization.foo would have no effect; remove it"),
        ({"zero_optimization": {"cpu_offload": True}}, "did you mean offload_optimizer?"),
        (
            {"zero_optimization": {"stage3_max_live_parameters": 9}},
            "stage3_max_live_parameters has no effect in stage 2; remove it, or use stage 3",
        ),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, "overlap_comm has no effect in stage 1; remove"),
        ({"zero_optimization": {"offload_optimizer": False}}, "offload_optimizer is false and must be an object"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "zero_optimization.offload_optimizer.ratio would have no effect; keep to device and pin_memory",
        ),
        ({"zero_optimization": {"offload_optimizer": {"pin_memory": "yes"}}}, "pin_memory is yes; use true or false"),
        ({"communication_data_type": "int8"}, "communication_data_type is int8; use fp32, fp16, bf16"),
        ({"wall_clock_breakdown": "often"}, "wall_clock_breakdown is often; use true or false"),
        ({"steps_per_print": 0}, "steps_per_print is 0; use a whole number, 1 or more"),
        ({"zero_optimization": None}, "no zero_optimization section"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_value_that_contradicts_the_recipe_is_named(edited: Any, changes: dict[str, Any], message: str) -> None:
    assert message in problems(deepspeed(edited(**changes)))


def test_values_equal_to_the_recipe_are_no_contradiction(edited: Any) -> None:
    zero = {"stage": 2, "allgather_partitions": True}
    path = edited(train_batch_size=8, gradient_clipping=0.5, bf16={"enabled": False}, zero_optimization=zero)
    assert read_launch_config(deepspeed(path), training(global_batch_size=8, max_grad_norm=0.5)).strategy == "zero2"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision (bf16) is not the run's (no)"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "use --torch_compile"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config has no"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps (4) has no effect"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "gradient_clipping is 0.5, but the recipe's max_grad_norm is 1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_launcher_values_that_contradict_the_recipe_are_refused(variables: dict[str, str], message: str) -> None:
    assert message in problems(variables)
    assert message in problems({**FSDP, **variables})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "stage is 2, but the launcher's zero_stage is 3"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device is cpu"),
        ({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag is true"),
        ({"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}, "zero3_save_16bit_model is true"),
        ({"ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "Expert"}, "deepspeed_moe_layer_cls_names is Expert"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}, "without a deepspeed_config_file"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "absent/zero2.json"}, "start in the folder that it is relative to"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_deepspeed_flags_beside_the_file_are_refused(variables: dict[str, str], message: str) -> None:
    assert message in problems({**deepspeed(ROOT / "ds_configs/zero2.json"), **variables})


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    for text, reason in (("{", "Expecting"), ('{"bf16": {}, "bf16": {}}', "'bf16' more than once")):
        (tmp_path / "broken.json").write_text(text, encoding="utf-8")
        found = problems(deepspeed(tmp_path / "broken.json"))
        assert "is not JSON" in found
        assert reason in found


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_VERSION": "1"}, "version 1 is not supported"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "only ZeRO offloads"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "every rank reads the checkpoint itself"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "layer by layer"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "whole tensors"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use --gradient_checkpointing"),
        ({"FSDP_SHARDING_STRATEGY": "NO_SHARD"}, "set fsdp_reshard_after_forward instead"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fsdp_settings_that_nothing_honours_are_refused(variables: dict[str, str], message: str) -> None:
    assert message in problems({**FSDP, **variables})


def test_fsdp2_is_read() -> None:
    assert read_launch_config(FSDP, training()) == LaunchConfig(strategy="fsdp2", reshard_after_forward=True)
    kept = {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}
    assert not read_launch_config(kept, training()).reshard_after_forward
    both = {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    assert read_launch_config(both, training(gradient_checkpointing=True)).strategy == "fsdp2"


def test_options_that_a_strategy_cannot_honour_are_refused() -> None:
    assert "--torch_compile layers does not work with fsdp2" in problems(FSDP, torch_compile="layers")
    assert "--torch_compile model does not work with zero3" in problems(
        deepspeed(ROOT / "ds_configs/zero3.json"), torch_compile="model"
    )
    for launched in (FSDP, deepspeed(ROOT / "ds_configs/zero1.json")):
        assert "--lora_implementation grouped does not work with" in problems(launched, lora_implementation="grouped")
    assert "--quantization 8bit does not work with fsdp2" in problems(FSDP, quantization="8bit")
    assert read_launch_config(deepspeed(ROOT / "ds_configs/zero2.json"), training("4bit")).strategy == "zero2"
    for optim in ("adamw_8bit", "paged_adamw_8bit"):
        assert f"--optim {optim} does not work with fsdp2" in problems(FSDP, optim=optim)
        for strategy in ("zero1", "zero2", "zero3"):
            found = problems(deepspeed(ROOT / f"ds_configs/{strategy}.json"), optim=optim)
            assert f"--optim {optim} does not work with {strategy}, which cuts the tensors apart" in found
        assert read_launch_config({}, training(optim=optim)).strategy == "ddp"
    assert "--cpu_offload does not work with ddp" in problems({}, cpu_offload=True)
    assert "--cpu_offload does not work with fsdp2" in problems(FSDP, cpu_offload=True)


def test_problems_are_reported_together(edited: Any) -> None:
    path = edited(optimizer={}, gradient_clipping=3)
    found = problems(deepspeed(path, ACCELERATE_MIXED_PRECISION="fp16"))
    assert len(found.splitlines()) == 3
    assert all(sign in found for sign in ("mixed_precision (fp16)", "section optimizer", "gradient_clipping is 3"))


def test_reading_a_launch_configuration_loads_no_library() -> None:
    code = (
        "import sys, qa_dist.distributed.launch_config; sys.exit('torch' in sys.modules or 'accelerate' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
