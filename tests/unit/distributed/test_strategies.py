"""What was asked of a library and dropped by it is an error, in one process."""

import io
import logging
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qa_dist.common.errors import ConfigError
from qa_dist.config.options import ModelConfig
from qa_dist.distributed.engine import Engine, NamedParameters, collective
from qa_dist.distributed.launch_config import LaunchConfig
from qa_dist.distributed.strategies.choice import make_engine
from qa_dist.distributed.strategies.fsdp import FullyShard
from qa_dist.distributed.strategies.zero import Zero, _tell_gpu, _with_fitting_bucket
from qa_dist.distributed.watchdog import Watchdog
from qa_dist.model.building import build_model
from qa_dist.model.span_model import SpanModel
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def model(tmp_path: Path) -> SpanModel:
    config = ModelConfig(model_name_or_path=str(tiny_model("bert", tmp_path)))
    return build_model(config, seed=1, max_seq_length=64)[0]


def make(launch_config: LaunchConfig, model: SpanModel) -> Any:
    ranks: Any = SimpleNamespace(launch_config=launch_config, device=CPU, watchdog=Watchdog(math.inf))

    def make_optimizer(parameters: NamedParameters) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter for _, parameter in parameters])

    return make_engine(ranks, model, make_optimizer, max_grad_norm=1.0)


def test_sharding_that_did_not_happen_is_an_error(
    group: None, model: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed.fsdp as fsdp

    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **options: module)
    with pytest.raises(ConfigError, match="asks for FSDP, but 49 tensors are not sharded"):
        make(LaunchConfig(strategy="fsdp2"), model)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_sharing_needs_a_launcher(strategy: Any, model: SpanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=f"{strategy} needs a launcher; start with accelerate launch or torchrun"):
        make(LaunchConfig(strategy=strategy), model)


def test_deepspeed_is_told_the_number_of_this_processs_gpu() -> None:
    for device, number in ((torch.device("cuda", 0), "0"), (torch.device("cuda", 3), "3"), (CPU, "3")):
        environment = {"LOCAL_RANK": "3", "RANK": "11"}
        _tell_gpu(device, environment)
        assert environment == {"LOCAL_RANK": number, "RANK": "11"}


def test_a_key_that_deepspeed_does_not_know_is_one_sentence(group: None, model: SpanModel) -> None:
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2, "overlap_com": True}}
    with pytest.raises(ConfigError, match=r"DeepSpeed refuses its configuration \(.*overlap_com"):
        make(LaunchConfig(strategy="zero2", deepspeed=config), model)


def test_what_deepspeed_logs_before_it_refuses_is_not_shown(
    group: None, model: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    deepspeed = pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")

    def refuse(**_: Any) -> None:
        logging.getLogger("DeepSpeed").warning("configuration: 300 lines of it")
        raise ValueError(f"{'an input that is not permitted, ' * 6}for information visit https://example.org/a")

    monkeypatch.setattr(deepspeed, "initialize", refuse)
    shown = io.StringIO()
    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "handlers", [logging.StreamHandler(shown)])
    with pytest.raises(ConfigError, match=r"refuses its configuration \(an input .* \.\.\.\); mend") as refused:
        make(LaunchConfig(strategy="zero2", deepspeed={"zero_optimization": {"stage": 2}}), model)
    assert "http" not in str(refused.value)
    assert shown.getvalue() == ""


@pytest.mark.parametrize(
    ("configured", "trained", "wanted"), [(1 << 24, 1000, 1000), (500, 1000, 500), (None, 1000, 1000), ("x", 1000, "x")]
)
def test_the_bucket_is_no_larger_than_what_is_trained(configured: Any, trained: int, wanted: Any) -> None:
    zero = {"stage": 2, "reduce_bucket_size": configured} if configured else {"stage": 2}
    config = {"gradient_clipping": 1.0, "zero_optimization": zero}
    assert _with_fitting_bucket(config, trained) == {
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": wanted},
    }


def engine(stage: int, **changes: Any) -> Any:
    """What `Zero` looks at of an engine that took everything over."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    attributes = {
        "optimizer": ZeROOptimizer.__new__(ZeROOptimizer),
        "dp_world_size": 1,
        "module": SimpleNamespace(parameters=lambda: [SimpleNamespace(ds_id=0)]),
    }
    answers = {
        "zero_optimization_stage": stage,
        "gradient_clipping": 1.0,
        "fp16_enabled": False,
        "bfloat16_enabled": False,
        "zero_use_cpu_optimizer": True,
        "zero_offload_param": object(),
    }
    found = SimpleNamespace(**{name: changes.get(name, value) for name, value in attributes.items()})
    for name, value in answers.items():
        setattr(found, name, partial(changes.get, name, value))
    return found


@pytest.mark.parametrize(
    ("changes", "dropped"),
    [
        ({"zero_optimization_stage": 0}, "stage 3"),
        ({"gradient_clipping": 0.0}, "gradient clipping"),
        ({"bfloat16_enabled": True}, "float32 weights"),
        ({"zero_use_cpu_optimizer": False}, "offload of the optimiser"),
        ({"zero_offload_param": None}, "offload of the weights"),
        ({"optimizer": object()}, "ZeRO"),
        ({"dp_world_size": 2}, "all ranks"),
        ({"module": torch.nn.Linear(1, 1)}, "partitioned weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_deepspeed_drops_is_named(changes: dict[str, Any], dropped: str) -> None:
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    cpu = {"device": "cpu"}
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu}}
    strategy = Zero.__new__(Zero)
    strategy._stage = 3
    strategy.module = engine(3)
    strategy._require_honoured(config, 1.0)
    strategy.module = engine(3, **changes)
    with pytest.raises(ConfigError, match=f"did not take over {dropped};"):
        strategy._require_honoured(config, 1.0)


def test_what_all_ranks_do_together_is_known_to_the_watchdog_where_there_are_shards() -> None:
    # What ZeRO and FSDP2 have done inside the backward pass needs no other rank.
    methods = Engine.__abstractmethods__ - {"sync_gradients"}
    assert len(methods) == 8
    for engine in (FullyShard, Zero):
        assert engine.holds_shards
        for name in methods:
            assert hasattr(getattr(engine, name), "__wrapped__"), f"{engine.__name__}.{name} is not `collective`"


@pytest.mark.parametrize("holds_shards", [False, True])
def test_a_collective_method_waits_once(holds_shards: bool) -> None:
    class Held:
        watchdog = Watchdog(math.inf)

        @collective
        def outer(self, number: int) -> int:
            return self.inner(number) + watched(self)

        @collective
        def inner(self, number: int) -> int:
            if number < 0:
                raise ValueError
            return number

    def watched(held: Held) -> bool:
        return held.watchdog._waiting

    held = Held()
    held.holds_shards = holds_shards
    assert held.outer(3) == 3 + holds_shards
    assert not watched(held)
    with pytest.raises(ValueError) as failed:  # noqa: PT011 - any sentence
        held.outer(-1)
    assert getattr(failed.value, "__notes__", []) == ["it was in start"] * holds_shards
    assert not watched(held)
