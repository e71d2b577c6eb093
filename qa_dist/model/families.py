"""Architectures: a row for each that transformers has with a question-answering head, to train or to refuse.

One that is in neither table, because it is newer than this program, is let in: in padded batches, with
`--lora_target_modules all-linear` or names of layers. What fails then, fails before the first step (`rehearsal`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qa_dist.common.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is known of one architecture.

    Attributes:
        projections: Names of the layers that `--lora_target_modules attention` adapts: the query and the value
            projection, as in Hu et al. 2022 (LoRA), section 4.2; empty where there are none that are linear layers.
        attention_dropout: Name of the configuration's field with the dropout probability of the attention weights.
        unpadded: Whether attention can run on one row of real tokens, each feature with its own positions. It cannot
            where scores depend on more than queries, keys and a distance limit, as with relative position biases.
        positions_follow_padding: Whether positions are numbered from `pad_token_id + 1` instead of 0.
        token_types: Whether the model reads token types of a text and not, as XLM does, further words.
        depends_on_padding: Whether a feature's logits change with the length to which it is padded, as they do where
            layers mix neighbours without a look at the mask. All features are padded to `--max_seq_length` then.
        global_question: Whether the question's tokens attend to, and are seen by, all others (Beltagy et al. 2020).
        full_attention: What to set in the configuration where every feature is as short as `longest_full_attention`
            says, so that attention does not change its kind at the first short batch.
        half_precision: Whether products can be computed in half precision.
        without_effect: Patterns of the names of biases that no softmax sees, with `{last}` for the number of the last
            layer: a key's shifts all scores of a query alike, and that of the norm in front of a head that is one
            linear layer, without dropout between, all logits of a feature.
        problem: What keeps the model with a configuration from training, as a sentence without its end; None: nothing.
        configurations: Sizes that `--model_config` knows by name, each as the fields that differ from the default of
            the architecture's configuration class.
    """

    projections: tuple[str, ...]
    attention_dropout: str = "attention_probs_dropout_prob"
    unpadded: bool = False
    positions_follow_padding: bool = False
    token_types: bool = True
    depends_on_padding: bool = False
    global_question: bool = False
    full_attention: Mapping[str, Any] = field(default_factory=dict)
    half_precision: bool = True
    without_effect: tuple[str, ...] = ()
    problem: Callable[[Any], str | None] = lambda model_config: None
    configurations: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def first_position(self, model_config: Any) -> int:
        """Number of a feature's first position, given the transformers configuration of its model."""
        return int(model_config.pad_token_id) + 1 if self.positions_follow_padding else 0

    def has_blocks(self, model_config: Any) -> bool:
        """Whether attention is cut into blocks, among which a feature lies as its padding has it."""
        return any(getattr(model_config, name, value) != value for name, value in self.full_attention.items())


def longest_full_attention(model_config: Any) -> int:
    """Tokens up to which BigBird attends to all of them: `max_tokens_to_attend` in transformers' `BigBirdModel`."""
    return int((5 + 2 * model_config.num_random_blocks) * model_config.block_size)


def _lacks_language(model_config: Any) -> str | None:
    """X-MOD computes the layers of one language for all text, and fails where it is not told which."""
    languages = tuple(map(str, model_config.languages))
    if model_config.default_language in languages:
        return None
    return (
        f"its config.json has {model_config.default_language or 'nothing'} as default_language, the language whose "
        f"layers are used; write that of the data there, one of {', '.join(languages)}"
    )


_KEYS = r"\.attention\.self\.key\.bias"
_BEHIND_NORM = (_KEYS, r"\.encoder\.layer\.{last}\.output\.LayerNorm\.bias")

_BERT_LIKE = Family(projections=("query", "value"), unpadded=True, without_effect=_BEHIND_NORM)
_ROBERTA_LIKE = replace(_BERT_LIKE, positions_follow_padding=True)
_NORM_FIRST = replace(_ROBERTA_LIKE, without_effect=(_KEYS,))

FAMILIES: dict[str, Family] = {
    "albert": Family(projections=("query", "value")),
    "bert": replace(
        _BERT_LIKE,
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
    "big_bird": Family(projections=("query", "value"), full_attention={"attention_type": "original_full"}),
    "camembert": _ROBERTA_LIKE,
    # A convolution over neighbours, padding included.
    "convbert": Family(projections=("query", "value"), depends_on_padding=True),
    "data2vec-text": _ROBERTA_LIKE,
    # One layer for queries, keys and values.
    "deberta": Family(projections=("in_proj",)),
    "deberta-v2": Family(projections=("query_proj", "value_proj")),
    "distilbert": Family(
        projections=("q_lin", "v_lin"),
        attention_dropout="attention_dropout",
        unpadded=True,
        without_effect=(r"\.attention\.k_lin\.bias",),
    ),
    "electra": _BERT_LIKE,
    "ernie": _BERT_LIKE,
    "flaubert": Family(projections=("q_lin", "v_lin"), attention_dropout="attention_dropout", token_types=False),
    # Fourier transforms of whole rows instead of attention.
    "fnet": Family(projections=(), attention_dropout="hidden_dropout_prob", depends_on_padding=True),
    # Pools neighbours.
    "funnel": Family(projections=("q_head", "v_head"), attention_dropout="attention_dropout", depends_on_padding=True),
    "jina_embeddings_v3": Family(projections=("q_proj", "v_proj"), attention_dropout="attention_probs_dropout_prob"),
    "longformer": Family(projections=("query", "value"), positions_follow_padding=True, global_question=True),
    "megatron-bert": Family(projections=("query", "value")),
    "mobilebert": Family(projections=("query", "value")),
    # One layer for queries, keys and values.
    "modernbert": Family(projections=("Wqkv",), attention_dropout="attention_dropout", unpadded=True),
    "mpnet": Family(projections=("q", "v"), positions_follow_padding=True),
    "rembert": Family(projections=("query", "value")),
    "roberta": _ROBERTA_LIKE,
    "roberta-prelayernorm": _NORM_FIRST,
    "roformer": Family(projections=("query", "value")),
    "splinter": Family(projections=("query", "value")),
    "ultrabert": Family(projections=("q_proj", "v_proj"), attention_dropout="attention_dropout"),
    "xlm": Family(projections=("q_lin", "v_lin"), attention_dropout="attention_dropout", token_types=False),
    "xlm-roberta": _ROBERTA_LIKE,
    "xlm-roberta-xl": _NORM_FIRST,
    # Its projections are no layers but tensors.
    "xlnet": Family(projections=(), attention_dropout="dropout"),
    # Its layers of languages write half precision into a tensor of float32.
    "xmod": replace(_NORM_FIRST, half_precision=False, problem=_lacks_language),
}
"""What is trained, by `model_type`, as in the model's config.json."""

_LOOKS_BACK = (
    "each of its tokens sees only those before it, so that the start of an answer cannot depend on its end; use an "
    "encoder"
)
_GENERATES = "it is an encoder with a decoder behind it, which writes answers instead of marking them; use an encoder"
_READS_MORE = "it reads {} beside the text, which question answering on plain text does not have"
_ROWS_OF_ONE_LENGTH = "{}, so that a feature's logits would depend on chance or on the length of a batch"

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("arcee", "bloom", "diffllama", "exaone4", "falcon", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama"),
            *("minimax", "ministral", "ministral3", "mistral", "mixtral", "mpt", "nemotron", "opt", "qwen2"),
            *("qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3"),
        ),
        _LOOKS_BACK,
    ),
    **dict.fromkeys(("bart", "bigbird_pegasus", "led", "mbart", "mt5", "mvp", "t5", "umt5"), _GENERATES),
    "canine": "it reads characters, and has no fast tokenizer that could say where an answer is",
    "ibert": "its layers (QuantLinear) are made for integers, and take no adapters",
    "layoutlmv2": _READS_MORE.format("a page and the place of each word on it"),
    "layoutlmv3": _READS_MORE.format("a page and the place of each word on it"),
    "lilt": _READS_MORE.format("the place of each word on a page"),
    "luke": _READS_MORE.format("the entities that it names"),
    "lxmert": _READS_MORE.format("an image"),
    "markuplm": _READS_MORE.format("the place of each word in a web page's tree"),
    "mra": "its attention is a CUDA kernel that is compiled while it runs",
    "nystromformer": "its attention takes rows of exactly segment_means_seq_len tokens",
    "reformer": _ROWS_OF_ONE_LENGTH.format("its attention sorts tokens by random hashes"),
    "roc_bert": _READS_MORE.format("the shape and the sound of each character"),
    "squeezebert": "its layers are convolutions, which take no adapters",
    "yoso": _ROWS_OF_ONE_LENGTH.format("its attention samples tokens by random hashes"),
}
"""Why an architecture with a question-answering head is not trained, by `model_type`."""

UNKNOWN = Family(projections=())
"""Of an architecture without a row."""


def family_of(model_config: Any) -> Family:
    """The row of a model's architecture, given its transformers configuration; `UNKNOWN` if it has none."""
    return FAMILIES.get(model_config.model_type, UNKNOWN)


def require_trainable(model_config: Any, mixed_precision: str = "no") -> None:
    """Refuse what cannot be trained here: an architecture, a configuration of one, or one in this precision.

    Raises:
        ConfigError: The message says why.
    """
    model_type = model_config.model_type
    if (reason := REFUSED.get(model_type)) is not None:
        raise ConfigError(
            [
                f"{model_type} models are not trained here: {reason}; docs/compatibility.md lists the "
                "architectures that are, such as bert, roberta, deberta-v2, modernbert and xlm-roberta"
            ]
        )
    family = family_of(model_config)
    if (problem := family.problem(model_config)) is not None:
        raise ConfigError([f"this {model_type} model cannot be used as it is: {problem}"])
    if mixed_precision != "no" and not family.half_precision:
        raise ConfigError(
            [
                f"--mixed_precision {mixed_precision} does not work for a model of type {model_type}, which "
                "transformers computes in float32 alone; use --mixed_precision no"
            ]
        )


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
