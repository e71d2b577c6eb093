"""Encoder families: what is known of each model type."""

ATTENTION_PROJECTIONS = {
    "albert": ("query", "value"),
    "bert": ("query", "value"),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "electra": ("query", "value"),
    "modernbert": ("Wqkv",),
    "mpnet": ("q", "v"),
    "roberta": ("query", "value"),
}
"""Query and value projections, adapted as by Hu et al. 2022 (LoRA), section 4.2; ModernBERT fuses them with keys."""


CONFIGURATIONS: dict[str, dict[str, int]] = {
    "bert-base": {},
    "bert-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
"""What `--model_config` knows by name: how each differs from transformers' default, BERT base (uncased)."""


ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")


OFFSET_POSITIONS = ("roberta", "mpnet")
"""Architectures that number positions from `pad_token_id + 1`."""


MODEL_TYPES_UNPADDED = ("bert", "distilbert", "electra", "modernbert", "roberta")
"""Architectures whose attention can run on one row of real tokens."""
