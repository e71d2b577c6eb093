"""What the items share: where they run, how big things are there, and small models and data of their own."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qa_dist.benchmarking.measuring import synthetic_features
from qa_dist.benchmarking.synthetic import wordpiece_tokenizer
from qa_dist.config.options import ModelConfig, RunConfig, defaults
from qa_dist.config.parsing import parse
from qa_dist.data.sample import synthetic_examples
from qa_dist.distributed.ranks import Ranks
from qa_dist.distributed.sharing import forget_accelerate
from qa_dist.model.span_model import SpanModel, transformers_model
from qa_dist.training.start import build_trainable
from qa_dist.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Scene:
    """Where items run.

    Attributes:
        device: what is checked: CUDA, or the CPU in a rehearsal.
        is_rehearsal: whether everything is in miniature.
        folder: for files that nobody keeps.
        squad: folder of train-v1.1.json.gz and dev-v1.1.json.gz.
        model: folder of a pretrained encoder with its tokenizer.
    """

    device: torch.device
    is_rehearsal: bool
    folder: Path
    squad: Path | None = None
    model: Path | None = None

    def choose(self, whole: Any, rehearsed: Any) -> Any:
        """A size: the whole one, or that of a rehearsal."""
        return rehearsed if self.is_rehearsal else whole

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def config(self, **options: Any) -> RunConfig:
        """A run's options, by flag name, on a small model without dropout if nothing else is said."""
        values: dict[str, Any] = {
            "output_dir": str(self.folder / "out"),
            "model_config": str(self.small_model()),
            "store_dir": str(self.folder / "stores"),
            "max_seq_length": self.choose(384, 64),
            "doc_stride": self.choose(128, 16),
            "model_dropout": 0.0,
            "lora_dropout": 0.0,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "global_batch_size": 8,
            "disable_tqdm": True,
            # What is checked and measured without them is told from what is with them.
            "cuda_graphs": "no",
            "torch_compile": "no",
        }
        values |= options
        if values.get("tuning") == "full":
            lora = {name: value for name, value in defaults(ModelConfig).items() if name.startswith("lora_")}
            values |= {name: list(value) if isinstance(value, tuple) else value for name, value in lora.items()}
        config, _ = parse([], prog="qa_dist.bench gpu", description="", groups=(), base=values)
        return config

    def small_model(self, model_type: str = "bert") -> Path:
        """A folder with the configuration of a small encoder and a tokenizer for it; its head size is 64 (or 16)."""
        folder = self.folder / f"small-{model_type}"
        if not (folder / "config.json").exists():
            tokenizer = _word_tokenizer()
            _small_configuration(model_type, len(tokenizer), self).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    def small_weights(self) -> Path:
        """The same folder of a BERT, with random weights beside the configuration: a checkpoint that can be loaded."""
        folder = self.folder / "weights-bert"
        if not (folder / "model.safetensors").exists():
            from transformers import AutoModel, BertConfig

            torch.manual_seed(5)
            config = BertConfig.from_pretrained(self.small_model())
            AutoModel.from_config(config, trust_remote_code=False).save_pretrained(folder)
            _word_tokenizer().save_pretrained(folder)
        return folder

    def trainer(
        self,
        config: RunConfig,
        ranks: Ranks,
        *,
        num_features: int,
        model: SpanModel | None = None,
        notice: Callable[[str], object] = lambda text: None,
    ) -> Trainer:
        """A trainer of a new model, or of one that is there."""
        if model is None:
            model = new_model(config, ranks)
        vocab_size = int(transformers_model(model.model).config.vocab_size)
        return Trainer(config, ranks, synthetic_features(config, num_features, vocab_size), model, notice=notice)


def new_model(config: RunConfig, ranks: Ranks) -> SpanModel:
    """The model that a run would build."""
    return build_trainable(config, ranks, None)[0]


class RanksOnCpu(Ranks):
    """One process that computes on the CPU, also where there is a GPU."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.device = torch.device("cpu")

    def place(self, model: Any) -> Any:
        return model.to(self.device)


@contextmanager
def alone(config: RunConfig, kind: type[Ranks] = Ranks) -> Iterator[Ranks]:
    """This process as the only rank of a run, until the block ends."""
    forget_accelerate()
    ranks = kind(mixed_precision=config.training.mixed_precision)
    try:
        yield ranks
    finally:
        ranks.close()


def replaced(config: RunConfig, **changes: Any) -> RunConfig:
    """The configuration with some options of training changed."""
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def furthest(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """The greatest difference of tensors of the same names, relative to the largest value of each (or 1e-3)."""
    if found.keys() != wanted.keys():
        raise AssertionError(f"other tensors: {sorted(found.keys() ^ wanted.keys())[:5]}")
    return max(relative_error(found[name], wanted[name]) for name in wanted)


def relative_error(found: torch.Tensor, wanted: torch.Tensor, least: float = 1e-3) -> float:
    """The greatest difference, relative to the largest value that was wanted."""
    if found.shape != wanted.shape:
        raise AssertionError(f"the shape is {tuple(found.shape)} instead of {tuple(wanted.shape)}")
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    difference = float((found - wanted).abs().max()) if wanted.numel() else 0.0
    return difference / max(float(wanted.abs().max()) if wanted.numel() else 0.0, least)


@cache
def _word_tokenizer() -> Any:
    """A WordPiece tokenizer that knows the words of synthetic examples, so that lengths are those of SQuAD."""
    texts = [example.context for example in synthetic_examples(100, seed=0)]
    words = sorted({word for text in texts for word in re.findall(r"\w+", text.lower())})
    return wordpiece_tokenizer([".", "?", *words])


def _small_configuration(model_type: str, vocab_size: int, scene: Scene) -> Any:
    """A few layers of an architecture; weights large enough that attention is not uniform."""
    from transformers import AutoConfig

    hidden, layers, heads = scene.choose((256, 3, 4), (32, 2, 2))
    common = {"vocab_size": vocab_size, "pad_token_id": 0, "initializer_range": 0.1, "max_position_embeddings": 512}
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 2 * hidden,
    }
    if model_type == "distilbert":
        sizes = {"dim": hidden, "n_layers": layers, "n_heads": heads, "hidden_dim": 2 * hidden}
    special: dict[str, dict[str, Any]] = {
        "electra": {"embedding_size": hidden // 2},
        "roberta": {"type_vocab_size": 1},
        "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
        "modernbert": {
            "global_attn_every_n_layers": 2,
            "local_attention": 16,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
    }
    return AutoConfig.for_model(model_type, **common, **sizes, **special.get(model_type, {}))
