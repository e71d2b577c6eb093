"""Every architecture that is trained: it is saved, comes back, is evaluated and merged."""

import dataclasses
from pathlib import Path

import pytest
import torch

from qa_dist.common.errors import ConfigError
from qa_dist.config.options import DataConfig, ModelConfig, RunConfig
from qa_dist.model.building import build_model
from qa_dist.model.families import FAMILIES
from qa_dist.model.merging import TOLERANCE, merge
from qa_dist.model.rehearsal import rehearse
from qa_dist.model.saved import load_trained, save_trained
from qa_dist.model.span_model import SpanModel, span_loss
from qa_dist.model.trainable import GradientCheck
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unit.model.test_architectures import LENGTH, LENGTHS, logits, row

pytestmark = pytest.mark.integration

LABELS = torch.tensor([[4, 6], [2, 2], [15, 20]])


def has_gradient(parameter: torch.Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.count_nonzero())


def trained(model: SpanModel) -> SpanModel:
    """The model after two steps, by which every adapter and the head had a gradient."""
    check = GradientCheck(model)
    optimizer = torch.optim.SGD([parameter for _, parameter in model.trainable()], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        start_T, end_T = model.train()(*row())
        span_loss(start_T, end_T, LENGTHS, LABELS).mean().backward()
        parameters = dict(model.trainable())
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in model.trainable()], 1.0)
        check.observe(lambda names, found=parameters: [has_gradient(found[name]) for name in names])
        optimizer.step()
        check.updated(0.1)
    return model.eval()


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_an_architecture_trains_comes_back_and_is_merged(model_type: str, tmp_path: Path) -> None:
    folder = tiny_model(model_type, tmp_path / "base")
    tokenizer = tiny_tokenizer()
    config = ModelConfig(model_name_or_path=str(folder), lora_dropout=0.0)
    if FAMILIES[model_type].projections:
        trained(build_model(config, seed=1, max_seq_length=LENGTH)[0])
    else:
        with pytest.raises(ConfigError, match="use all-linear"):
            build_model(config, seed=1, max_seq_length=LENGTH)
    config = dataclasses.replace(config, lora_target_modules=("all-linear",))
    model, _ = build_model(config, seed=1, max_seq_length=LENGTH)
    out = tmp_path / "adapter"
    out.mkdir()
    rehearse(model, tokenizer, config, out)
    assert list(out.iterdir()) == []
    expected = logits(trained(model))
    assert bool(expected.isfinite().all())
    save_trained(model, {name: tensor.detach() for name, tensor in model.trainable()}, tokenizer, out)
    again = load_trained(config, str(out), max_seq_length=LENGTH, tokenizer_pads_left=False)
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6 * scale)
    (tmp_path / "merged").mkdir()
    whole = RunConfig(model=config, data=DataConfig(max_seq_length=LENGTH, doc_stride=16))
    assert merge(whole, str(out), tokenizer, tmp_path / "merged") <= TOLERANCE
    config = ModelConfig(model_name_or_path=str(tmp_path / "merged"), tuning="full")
    plain = load_trained(config, str(tmp_path / "merged"), max_seq_length=LENGTH, tokenizer_pads_left=False)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-4 * scale)
