"""How often the host waits for its GPU in a whole step of training, counted without one."""

import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.support.fake_cuda import CUDA, count, fake_cuda, needs_compiler, run
from tests.tiny import tiny_model, tiny_squad

pytestmark = needs_compiler


def steps() -> dict[str, Any]:
    """Counts of the third step and of what comes before its report is read, with one micro-batch and with several."""
    from qa_dist.config.options import DataConfig, ModelConfig, RunConfig, TrainingConfig
    from qa_dist.distributed.ranks import Ranks
    from qa_dist.features.building import prepare_store
    from qa_dist.model.building import build_model
    from qa_dist.model.pretrained import load_tokenizer
    from qa_dist.training import trainer
    from qa_dist.training.step_report import StepReport

    trainer.is_fused = lambda *_: True
    found: dict[str, Any] = {}
    empty = torch.empty
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = DataConfig(
            train_file=str(tiny_squad(folder / "train.json", 12, seed=1, longest=40)),
            store_dir=str(folder / "store"),
            max_seq_length=64,
            doc_stride=16,
        )
        plain = ModelConfig(model_name_or_path=str(tiny_model("bert", folder / "bert")), lora_dropout=0.0)
        for tokens in (1024, 256):
            training = TrainingConfig(output_dir=name, global_batch_size=8, max_tokens_per_device=tokens)
            config = RunConfig(data=data, model=plain, training=training)
            model, _ = build_model(plain, seed=1, max_seq_length=64)
            store = prepare_store(config, "train", tokenizer=load_tokenizer(plain), progress=False)
            made = trainer.Trainer(config, Ranks(), store, model)
            for step in range(2):
                made.step(step)
            pieces = len(made.inputs.micro_batches(2, tokens))
            with fake_cuda(), mock.patch.object(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k)):
                move(made)
                # The first one makes the moments.
                count(partial(made.step, 0))
                whole = asdict(count(partial(made.step, 2)))
                with mock.patch.object(StepReport, "read", side_effect=KeyError):
                    before = asdict(count(partial(until_read, made)))
            found[str(tokens)] = {"micro_batches": pieces, "whole": whole, "before": before}
    return found


def until_read(made: Any) -> None:
    try:
        made.step(3)
    except KeyError:
        return
    raise AssertionError("the report was not read")


def move(made: Any) -> None:
    """Let a trainer go on with fake tensors on a fake GPU."""
    from qa_dist.memory.tracing import fake_weights
    from qa_dist.training.optimizer import make_optimizer

    fake_weights(made.model, CUDA)
    made.ranks.device = made.inputs._device = CUDA
    made.engine._parameters = dict(made.model.trainable())
    made.engine.optimizer = make_optimizer(made.config.training, made.model.trainable(), fused=True)


def test_the_host_waits_once_in_a_step_and_never_in_a_micro_batch() -> None:
    counts = run(f"{__name__}:steps")
    assert counts["1024"]["micro_batches"] == 1 < counts["256"]["micro_batches"]
    for each in counts.values():
        assert each["before"]["sync_names"] == {}
        assert each["whole"]["syncs"] == 1, each["whole"]["sync_names"]
        assert each["whole"]["by_name"]["aten::_fused_adamw_"] == 2, "matrices decay and vectors do not"
