"""Every row of the table of families is true of transformers' own code, and complete."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qa_dist.config.options import ModelConfig
from qa_dist.model.building import build_model
from qa_dist.model.families import FAMILIES, Family, family_of, named_configurations
from qa_dist.model.pretrained import model_configuration
from qa_dist.model.span_model import SpanModel, transformers_model
from tests.tiny import MODEL_TYPES, MORE_TYPES, tiny_config, tiny_model

LENGTHS = (20, 1, 31)


def shortcomings(model_type: str, folder: Path) -> list[str]:
    """What a family's row lacks or says wrongly, one sentence each, as its two-layer model shows."""
    if model_type not in FAMILIES:
        fields = ", ".join(f"{field.name}: {field.type}" for field in dataclasses.fields(Family))
        return [f"model/families.py has no row for {model_type}; a row has {fields}"]
    if model_type not in (*MODEL_TYPES, *MORE_TYPES):
        return [f"tests/tiny.py makes no two-layer {model_type} to try the row on: add it to MORE_TYPES"]
    family = FAMILIES[model_type]
    tiny_model(model_type, folder)
    model = build(folder, padding="max_length" if family.depends_on_padding else "sorted")
    fields_of_config = transformers_model(model.model).config.to_dict()
    found = []
    for name in family.projections:
        # XLM has its attentions, and what is between them, in lists of their own.
        lists = [part for part in transformers_model(model.model).modules() if isinstance(part, nn.ModuleList)]
        if not any(all(len(layers(block, name)) == 1 for block in blocks) for blocks in lists if len(blocks)):
            (block, *_) = model.blocks()
            number = len(layers(block, name))
            found.append(f"projections: {name} is {number} layers in each {type(block).__name__}, not one")
    if family.attention_dropout not in fields_of_config:
        found.append(f"attention_dropout: the configuration has no field {family.attention_dropout}")
    found += wrong_positions(model, family)
    if family.unpadded and not found:
        difference = largest_difference(build(folder, padding="unpadded"), model)
        if not difference <= 1e-5:
            found.append(f"unpadded: logits are {difference:.1e} from those of padded batches; leave it False")
    return found


def layers(block: nn.Module, name: str) -> list[nn.Module]:
    """The linear layers of that name inside a block."""
    parts = [part for path, part in block.named_modules() if path.rpartition(".")[2] == name]
    return [part for part in parts if isinstance(part, nn.Linear)]


def build(folder: Path, **options: Any) -> SpanModel:
    """A model without adapters, in evaluation."""
    config = ModelConfig(model_name_or_path=str(folder), tuning="full", **options)
    model, _ = build_model(config, seed=1, max_seq_length=64)
    return model.eval()


def logits(model: SpanModel, lengths: tuple[int, ...]) -> torch.Tensor:
    ids = torch.randint(5, 50, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.stack(model(ids, torch.zeros_like(ids), lengths))


def largest_difference(first: SpanModel, second: SpanModel) -> float:
    try:
        return float((logits(first, LENGTHS) - logits(second, LENGTHS)).abs().max())
    except (RuntimeError, TypeError, IndexError):
        return float("inf")


def wrong_positions(model: SpanModel, family: Family) -> list[str]:
    """What is wrong with the first position, as the longest feature that the model takes shows."""
    plain = transformers_model(model.model)
    tables = [part for name, part in plain.named_modules() if name.endswith("embeddings.position_embeddings")]
    if not tables:
        return ["positions_follow_padding: the model has no table of positions"] * family.positions_follow_padding
    if family.depends_on_padding:
        # All its features are equally long.
        return []
    longest = plain.config.max_position_embeddings - family.first_position(plain.config)

    def fits(length: int) -> bool:
        try:
            logits(model, (length,))
        except (IndexError, RuntimeError):
            return False
        return True

    if fits(longest) and not fits(longest + 1):
        return []
    return [f"positions_follow_padding: with it, features of {longest} tokens should be the longest that fit"]


@pytest.mark.parametrize("model_type", sorted({*MODEL_TYPES, *MORE_TYPES, *FAMILIES}))
def test_every_family_has_a_row_that_is_true(model_type: str, tmp_path: Path) -> None:
    assert not shortcomings(model_type, tmp_path)


@pytest.mark.parametrize(
    ("model_type", "change", "said"),
    [
        ("bert", {"projections": ("query", "values")}, "projections: values is 0 layers in each BertLayer"),
        ("bert", {"projections": ("dense",)}, "projections: dense is 3 layers in each BertLayer"),
        ("distilbert", {"attention_dropout": "attention_probs_dropout_prob"}, "configuration has no field"),
        ("bert", {"positions_follow_padding": True}, "features of 159 tokens should be the longest"),
        ("roberta", {"positions_follow_padding": False}, "features of 160 tokens should be the longest"),
        ("modernbert", {"positions_follow_padding": True}, "has no table of positions"),
        ("deberta-v2", {"unpadded": True}, "unpadded: logits are"),
        ("mpnet", {"unpadded": True}, "unpadded: logits are"),
    ],
    ids=str,
)
def test_a_wrong_row_is_told_what_is_wrong(
    model_type: str, change: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, model_type, dataclasses.replace(FAMILIES[model_type], **change))
    (found,) = shortcomings(model_type, tmp_path)
    assert said in found


def test_a_missing_row_is_told_what_a_row_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "electra")
    (found,) = shortcomings("electra", tmp_path)
    assert "no row for electra" in found
    assert all(field.name in found for field in dataclasses.fields(Family))
    monkeypatch.setitem(FAMILIES, "squeezebert", FAMILIES["bert"])
    assert shortcomings("squeezebert", tmp_path) == [
        "tests/tiny.py makes no two-layer squeezebert to try the row on: add it to MORE_TYPES"
    ]


def test_an_architecture_without_a_row_is_padded_and_has_no_known_projections() -> None:
    family = family_of(SimpleNamespace(model_type="newbert"))
    assert (family.projections, family.unpadded, family.positions_follow_padding) == ((), False, False)


@pytest.mark.parametrize("name", named_configurations())
def test_a_named_configuration_changes_fields_that_there_are(name: str) -> None:
    model_type, changes = named_configurations()[name]
    config = model_configuration(ModelConfig(model_config=name))
    assert config.model_type == model_type
    assert changes.keys() <= type(config)().to_dict().keys()
    assert {field: getattr(config, field) for field in changes} == changes


def test_the_option_s_help_names_every_configuration() -> None:
    (described,) = (field.metadata for field in dataclasses.fields(ModelConfig) if field.name == "model_config")
    assert f"{', '.join(named_configurations())}, or a folder" in described["help"]


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *MORE_TYPES])
def test_every_tiny_configuration_has_two_layers(model_type: str) -> None:
    assert tiny_config(model_type, 50).num_hidden_layers == 2
