"""Encoder families: one row for each architecture of transformers whose peculiarities are known here.

An encoder without a row trains too: in padded batches, with `--lora_target_modules all-linear` or names of layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is known of one architecture.

    Attributes:
        projections: Names of the layers that `--lora_target_modules attention` adapts: the query and the value
            projection, as in Hu et al. 2022 (LoRA), section 4.2.
        attention_dropout: Name of the configuration's field with the dropout probability of the attention weights.
        unpadded: Whether attention can run on one row of real tokens, each feature with its own positions. It cannot
            where scores depend on more than queries, keys and a distance limit, as with relative position biases.
        positions_follow_padding: Whether positions are numbered from `pad_token_id + 1` instead of 0.
        configurations: Sizes that `--model_config` knows by name, each as the fields that differ from the default of
            the architecture's configuration class.
    """

    projections: tuple[str, ...]
    attention_dropout: str = "attention_probs_dropout_prob"
    unpadded: bool = False
    positions_follow_padding: bool = False
    configurations: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def first_position(self, model_config: Any) -> int:
        """Number of a feature's first position, given the transformers configuration of its model."""
        return int(model_config.pad_token_id) + 1 if self.positions_follow_padding else 0


FAMILIES: dict[str, Family] = {
    "albert": Family(projections=("query", "value")),
    "bert": Family(
        projections=("query", "value"),
        unpadded=True,
        configurations={
            # The default is BERT base, uncased.
            "bert-base": {},
            "bert-large": {
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
            },
            "minilm-l6": {
                "hidden_size": 384,
                "num_hidden_layers": 6,
                "num_attention_heads": 12,
                "intermediate_size": 1536,
            },
        },
    ),
    "deberta-v2": Family(projections=("query_proj", "value_proj")),
    "distilbert": Family(projections=("q_lin", "v_lin"), attention_dropout="attention_dropout", unpadded=True),
    "electra": Family(projections=("query", "value"), unpadded=True),
    # One layer for queries, keys and values.
    "modernbert": Family(projections=("Wqkv",), attention_dropout="attention_dropout", unpadded=True),
    "mpnet": Family(projections=("q", "v"), positions_follow_padding=True),
    "roberta": Family(projections=("query", "value"), unpadded=True, positions_follow_padding=True),
}
"""By `model_type`, as in the model's config.json."""

UNKNOWN = Family(projections=())
"""Of an architecture without a row."""


def family_of(model_config: Any) -> Family:
    """The row of a model's architecture, given its transformers configuration; `UNKNOWN` if it has none."""
    return FAMILIES.get(model_config.model_type, UNKNOWN)


def model_types_unpadded() -> list[str]:
    """Model types that can be computed without padding."""
    return [model_type for model_type, family in FAMILIES.items() if family.unpadded]


def named_configurations() -> dict[str, tuple[str, Mapping[str, int]]]:
    """What `--model_config` knows by name: the model type, and what differs from its default configuration."""
    return {
        name: (model_type, changes)
        for model_type, family in FAMILIES.items()
        for name, changes in family.configurations.items()
    }
