"""Small things to test with: random two-layer encoders of every family, their tokenizer, and a SQuAD file to match."""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MODEL_TYPES = ("albert", "bert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta")
"""Architectures on which tests run that try every kind of encoder."""
MORE_TYPES = (
    *("big_bird", "camembert", "convbert", "data2vec-text", "deberta", "ernie", "flaubert", "fnet", "funnel"),
    *("jina_embeddings_v3", "longformer", "megatron-bert", "mobilebert", "rembert", "roberta-prelayernorm"),
    *("roformer", "splinter", "ultrabert", "xlm", "xlm-roberta-xl", "xlnet", "xmod"),
)
"""Others of which `tiny_config` makes one with two layers."""
WORDS = (
    "amber basin cedar delta ember fjord grove haven inlet jetty knoll ledge marsh nadir oasis plain quarry ridge "
    "shoal thorn upland vale wharf yard zenith anchor beacon canyon dune estuary forest glacier harbor island jungle "
    "kiln lagoon meadow north orchard pasture reef summit tundra valley willow"
).split()
MAX_POSITIONS = 160

_ENDS = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
_SPECIAL: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16, "classifier_dropout_prob": 0.0},
    "big_bird": {"block_size": 16},
    "convbert": {"embedding_size": 32},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "electra": {"embedding_size": 16},
    "longformer": {"attention_window": 16, **_ENDS},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    # MPNet's code takes 1 for the padding, whatever the configuration says.
    "mpnet": {"pad_token_id": 1},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16, "classifier_dropout_prob": 0.0},
    "roberta": {"type_vocab_size": 1},
    "roformer": {"embedding_size": 32},
    "ultrabert": {"num_key_value_heads": 2, "head_dim": 16, "attention_dropout": 0.0, **_ENDS},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    **{name: {"type_vocab_size": 1} for name in ("camembert", "xlm-roberta")},
}
"""What is added to the usual configuration of an architecture, or differs from it."""


def tiny_tokenizer(*, padding_side: str = "right", uncased: bool = True, words: tuple[str, ...] = ()) -> Any:
    """A WordPiece tokenizer as BERT's: whole words above and given, all else by letters of Latin; emoji are unknown."""
    from qa_dist.benchmarking.synthetic import wordpiece_tokenizer

    letters = [chr(code) for code in (*range(33, 127), *range(0xC0, 0x180))]
    pieces = ("the", "stage", "of", "##ing")
    tokens = [*WORDS, *pieces, *words, *letters, *(f"##{letter}" for letter in letters)]
    return wordpiece_tokenizer(tokens, lowercase=uncased, padding_side=padding_side)


def tiny_config(model_type: str, vocab_size: int, num_layers: int = 2) -> Any:
    """A configuration of one architecture with two layers or as many as said, with dropout at 0.

    A test that asks for an architecture that an old transformers does not have yet is skipped.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    common = {"vocab_size": vocab_size, "pad_token_id": 0, "initializer_range": 0.2}
    usual = {
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": MAX_POSITIONS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    xlm = {
        **{"emb_dim": 32, "n_layers": num_layers, "n_heads": 2, "n_words": vocab_size, "dropout": 0.0},
        **{"attention_dropout": 0.0, "max_position_embeddings": MAX_POSITIONS, "pad_index": 0, "unk_index": 1},
    }
    # What stands instead of the usual.
    instead: dict[str, dict[str, Any]] = {
        "distilbert": {
            **{"dim": 32, "n_layers": num_layers, "n_heads": 2, "hidden_dim": 64, "dropout": 0.0},
            **{"attention_dropout": 0.0, "qa_dropout": 0.0, "max_position_embeddings": MAX_POSITIONS},
        },
        "flaubert": xlm,
        "funnel": {
            **{"block_sizes": [1] * num_layers, "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64},
            **{"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
            # There are two encoders of that type.
            "architectures": ["FunnelModel"],
        },
        "modernbert": {
            **{name: value for name, value in usual.items() if "dropout" not in name},
            **{"global_attn_every_n_layers": 2, "local_attention": 16, **_ENDS},
        },
        "xlm": xlm,
        "xlnet": {"d_model": 32, "n_layer": num_layers, "n_head": 2, "d_inner": 64, "dropout": 0.0, **_ENDS},
    }
    options = {**common, **instead.get(model_type, usual), **_SPECIAL.get(model_type, {})}
    config = AutoConfig.for_model(model_type, **options)
    for name, value in config.to_dict().items():
        if "dropout" in name and type(value) in (int, float):
            setattr(config, name, 0.0)
    return config


def tiny_model(model_type: str, directory: Path, *, seed: int = 0, num_layers: int = 2) -> Path:
    """A folder with a randomly initialised encoder, without a head, and its tokenizer."""
    import torch

    made, random_state = _made(model_type, seed, num_layers)
    shutil.copytree(made, directory, dirs_exist_ok=True)
    torch.set_rng_state(random_state)
    return directory


@cache
def _made(model_type: str, seed: int, num_layers: int) -> tuple[Path, Any]:
    """A folder as `tiny_model` makes it, of which a process makes one, and the state of torch's generator after it."""
    import torch
    from transformers import AutoModel

    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = AutoModel.from_config(tiny_config(model_type, len(tokenizer), num_layers))
    folder = tempfile.mkdtemp()
    maker = os.getpid()
    # Not by a fork of this process, which ends sooner.
    atexit.register(lambda: os.getpid() == maker and shutil.rmtree(folder))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder), torch.get_rng_state()


def tiny_inputs(folder: Path, *, num_train: int, num_validation: int, unanswerable: bool = False) -> dict[str, str]:
    """A model and two files of short contexts, as options of a run; some questions of the second may have no answer."""
    return {
        "model_name_or_path": str(tiny_model("bert", folder / "bert")),
        "train_file": str(tiny_squad(folder / "train.json", num_train, seed=1, longest=40)),
        "validation_file": str(
            tiny_squad(folder / "validation.json", num_validation, seed=2, longest=40, unanswerable=unanswerable)
        ),
    }


def tiny_squad(path: Path, num_examples: int, *, seed: int, unanswerable: bool = False, longest: int = 150) -> Path:
    """A SQuAD file: the answer to "what follows X ?" is the word behind X. Lengths vary widely."""
    rng = np.random.default_rng(seed)
    paragraphs = []
    for index in range(num_examples):
        words = [str(word) for word in rng.choice(WORDS, size=int(rng.integers(5, longest)))]
        place = int(rng.integers(0, len(words) - 1))
        asked = words[place]
        context = " ".join(words)
        start = len(" ".join(words[: words.index(asked) + 1])) + 1
        answer = {"text": words[words.index(asked) + 1], "answer_start": start}
        impossible = unanswerable and index % 4 == 3
        record: dict[str, Any] = {"id": f"q{index}", "question": f"what follows {asked} ?", "answers": [answer]}
        if unanswerable:
            record["is_impossible"] = impossible
            record["answers"] = [] if impossible else [answer]
        paragraphs.append({"context": context, "qas": [record]})
    document = {"version": "v2.0" if unanswerable else "1.1", "data": [{"title": "tiny", "paragraphs": paragraphs}]}
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def tiny_training(folder: Path, num_examples: int, *, longest: int = 150) -> list[str]:
    """Arguments of a training without evaluation on inputs made in `folder`; length and --output_dir are left out."""
    options = {
        "model_name_or_path": tiny_model("bert", folder / "bert"),
        "train_file": tiny_squad(folder / "train.json", num_examples, seed=1, longest=longest),
        "eval_steps": "no",
        "store_dir": folder / "store",
        "max_seq_length": 64,
        "doc_stride": 16,
    }
    return _words(options)


def tiny_run(folder: Path) -> list[str]:
    """Arguments of a run of seconds on a tiny model and data that are made in `folder`; --output_dir is left out."""
    options = {
        "model_name_or_path": tiny_model("bert", folder / "bert"),
        "train_file": tiny_squad(folder / "train.json", 16, seed=1, longest=40),
        "validation_file": tiny_squad(folder / "dev.json", 9, seed=2, longest=40),
        "store_dir": folder / "store",
        "max_seq_length": 64,
        "doc_stride": 16,
        "lora_dropout": 0,
        "model_dropout": 0,
        "num_train_epochs": 2,
    }
    return _words(options)


def _words(options: Mapping[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]
