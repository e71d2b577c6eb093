"""Every architecture that transformers has with a question-answering head is trained, or refused by name.

tests/integration/test_architectures.py trains each of them, from a configuration with two layers.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from qa_dist.common.errors import ConfigError, UserError
from qa_dist.config.options import ModelConfig, RunConfig
from qa_dist.documentation import architecture_table
from qa_dist.model import pretrained
from qa_dist.model.building import build_model
from qa_dist.model.families import FAMILIES, REFUSED, Family, require_trainable
from qa_dist.model.precision import DTYPES
from qa_dist.model.span_model import SpanModel
from qa_dist.training.inputs import load_data
from tests.tiny import MODEL_TYPES, MORE_TYPES, tiny_config, tiny_model

LENGTH = 64
LENGTHS = (20, 9, 31)
LABELS = torch.tensor([[4, 6], [2, 2], [15, 20]])


def architectures() -> dict[str, Any]:
    """What transformers has with a question-answering head: classes of configurations by model type."""
    from transformers import MODEL_FOR_QUESTION_ANSWERING_MAPPING

    return {configuration.model_type: configuration for configuration in MODEL_FOR_QUESTION_ANSWERING_MAPPING}


def lacks(model_type: str) -> list[str]:
    """What an architecture of transformers needs here and has not got; nothing if it is trained, or refused."""
    if model_type in REFUSED:
        return [f"{model_type} has a row in FAMILIES and one in REFUSED"] * (model_type in FAMILIES)
    found = []
    if model_type not in FAMILIES:
        fields = ", ".join(field.name for field in dataclasses.fields(Family))
        found.append(
            f"{model_type} needs a row in model/families.py: in FAMILIES ({fields}), or in REFUSED with the reason"
        )
    if model_type not in (*MODEL_TYPES, *MORE_TYPES):
        found.append(f"{model_type} needs a configuration with two layers in tests/tiny.py, and to be in MORE_TYPES")
    return found


def test_every_architecture_is_trained_or_refused() -> None:
    missing = [lack for model_type in sorted(architectures()) for lack in lacks(model_type)]
    assert missing == []


def test_a_new_architecture_is_told_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lacks("newbert") == [
        "newbert needs a row in model/families.py: in FAMILIES (projections, attention_dropout, unpadded, "
        "positions_follow_padding, token_types, depends_on_padding, global_question, full_attention, half_precision, "
        "without_effect, problem, configurations), or in REFUSED with the reason",
        "newbert needs a configuration with two layers in tests/tiny.py, and to be in MORE_TYPES",
    ]
    monkeypatch.setitem(REFUSED, "bert", "twice")
    assert lacks("bert") == ["bert has a row in FAMILIES and one in REFUSED"]


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_not_trained_is_refused_by_name(model_type: str) -> None:
    configuration = architectures().get(model_type, type("Gone", (), {"model_type": model_type}))
    with pytest.raises(ConfigError, match=f"{model_type} models are not trained here: .{{20}}"):
        require_trainable(configuration)


def test_a_refused_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match="gpt2 models are not trained here: each of its tokens sees only those before"
    ):
        build_model(ModelConfig(model_name_or_path=str(tmp_path)), seed=1, max_seq_length=LENGTH)


def test_a_refused_model_is_refused_before_packages_for_its_tokenizer_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("t5", d_model=32, num_layers=2).save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"no model")
    monkeypatch.setattr(pretrained, "_is_installed", lambda module: False)
    config = ModelConfig(model_name_or_path=str(tmp_path))
    with pytest.raises(UserError, match="SentencePiece"):
        pretrained.load_tokenizer(config)
    with pytest.raises(ConfigError, match="t5 models are not trained here"):
        load_data(RunConfig(model=config))


@pytest.mark.parametrize("language", [None, "de_DE"])
def test_a_model_of_languages_is_told_which_one(tmp_path: Path, language: str | None) -> None:
    configuration = tiny_config("xmod", 50)
    configuration.default_language = language
    configuration.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"xmod.* has {language or 'nothing'} as default_language.* one of en_XX$"):
        build_model(ModelConfig(model_name_or_path=str(tmp_path)), seed=1, max_seq_length=LENGTH)


def test_what_transformers_computes_in_float32_alone_is_refused_in_half_precision(tmp_path: Path) -> None:
    folder = tiny_model("xmod", tmp_path)
    model, _ = build_model(ModelConfig(model_name_or_path=str(folder), tuning="full"), seed=1, max_seq_length=LENGTH)
    for precision, dtype in DTYPES.items():
        with pytest.raises(RuntimeError, match="dtypes match"), torch.autocast("cpu", dtype):
            model(*row())
        with pytest.raises(ConfigError, match=f"--mixed_precision {precision} .* type xmod.* --mixed_precision no"):
            require_trainable(tiny_config("xmod", 50), precision)
        require_trainable(tiny_config("bert", 50), precision)
    require_trainable(tiny_config("xmod", 50))


def row() -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    input_ids_T = torch.randint(5, 50, (sum(LENGTHS),), generator=generator)
    types_T = torch.cat([(torch.arange(length) > length // 3).long() for length in LENGTHS])
    first = 0
    for length in LENGTHS:
        # [CLS] question [SEP] context [SEP]
        input_ids_T[first], input_ids_T[first + length // 3], input_ids_T[first + length - 1] = 2, 3, 3
        first += length
    return input_ids_T, types_T, LENGTHS


def logits(model: SpanModel) -> torch.Tensor:
    with torch.inference_mode():
        return torch.stack(model(*row()))


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def test_a_feature_s_logits_do_not_depend_on_those_beside_it(base: tuple[str, Path]) -> None:
    model, _ = build_model(ModelConfig(model_name_or_path=str(base[1]), tuning="full"), seed=1, max_seq_length=LENGTH)
    input_ids_T, types_T, lengths = row()
    together, first = logits(model.eval()), 0
    for length in lengths:
        piece = slice(first, first + length)
        with torch.inference_mode():
            alone = torch.stack(model(input_ids_T[piece], types_T[piece], (length,)))
        torch.testing.assert_close(alone, together[:, piece], rtol=0, atol=1e-5 * float(together.abs().max()))
        first += length


def test_the_table_of_architectures_has_them_all() -> None:
    table = architecture_table()
    assert all(f"`{model_type}`" in table for model_type in (*FAMILIES, *REFUSED))
