"""Options of the model: which encoder, how it is loaded, and what of it is trained."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from qa_dist.config.option import option


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The encoder, and what is trained of it."""

    model_name_or_path: str = option(
        "google-bert/bert-base-uncased",
        "hub id or local folder of the encoder, or package:NAME/FOLDER for one shipped inside a Python package",
    )
    model_revision: str = option("main", "branch, tag or commit of the hub model")
    model_config: str | None = option(
        None,
        "random weights instead of a checkpoint's, to measure speed with: bert-base, bert-large, minilm-l6, or a "
        "folder with a config.json",
        fixed=True,
    )
    tokenizer_name: str | None = option(None, "tokenizer, if it is not the model's own")
    cache_dir: str | None = option(None, "folder for downloaded models; auto: the hub library's own")
    model_dropout: float | None = option(
        None,
        "all dropout probabilities of the encoder (on a CPU, attention without padding has none); auto: as in the "
        "model's configuration",
        minimum=0,
        below=1,
        fixed=True,
    )
    tuning: Literal["lora", "full"] = option("lora", "train LoRA adapters and the head, or everything", fixed=True)
    quantization: Literal["no", "8bit", "4bit"] = option(
        "no",
        "load the frozen linear layers in 8 bits (LLM.int8) or 4 bits (NF4), through bitsandbytes; head, adapters, "
        "embeddings and norms stay in float32",
        fixed=True,
    )
    init_adapter: str | None = option(
        None, "folder of an adapter on this model to go on from with new data, instead of new adapters and a new head"
    )
    lora_r: int = option(8, "rank of the adapters", minimum=1, fixed=True)
    lora_alpha: float = option(
        16, "numerator of the adapters' scale (alpha/r; alpha/sqrt(r) with --use_rslora)", above=0, fixed=True
    )
    lora_dropout: float = option(0.1, "dropout before the adapters", minimum=0, below=1, fixed=True)
    lora_target_modules: tuple[str, ...] = option(
        ("attention",),
        "layers that get adapters: `attention` (query and value projections, whatever the architecture calls them), "
        "`all-linear` (every linear layer of the encoder), or module names separated by commas",
        fixed=True,
    )
    lora_bias: Literal["none", "all"] = option(
        "none", "biases of the encoder that are trained beside the adapters, those of its norms included", fixed=True
    )
    use_rslora: bool = option(False, "rank-stabilised scale alpha/sqrt(r) (Kalajdzievski 2023)", fixed=True)
    use_dora: bool = option(False, "weight-decomposed adapters (Liu et al. 2024)", fixed=True)
    lora_implementation: Literal["auto", "grouped", "peft"] = option(
        "auto",
        "`grouped` computes layers that read one input, and their adapters, as one product, in about half the "
        "launches; `peft` layer by layer, as peft does; auto: grouped on CUDA, if a check at the start finds it equal",
    )
    padding: Literal["auto", "unpadded", "sorted", "max_length"] = option(
        "auto",
        "unpadded computes real tokens only; sorted pads a micro-batch to its longest feature; max_length pads to "
        "--max_seq_length; auto is unpadded where the architecture allows it, else sorted",
    )
    show_structure: bool = option(False, "list every trainable tensor with its shape before training")

    def problems(self) -> Iterable[str]:
        if self.quantization != "no":
            if self.tuning == "full":
                yield f"--quantization {self.quantization} freezes what --tuning full trains; use --tuning lora"
            if self.model_config is not None:
                yield (
                    f"--quantization {self.quantization} quantises the weights of a checkpoint as it is read, and "
                    "--model_config has none; name a checkpoint with --model_name_or_path"
                )
        if self.init_adapter is not None and self.tuning == "full":
            yield f"--init_adapter {self.init_adapter} goes on from LoRA adapters but --tuning is full; drop one"
        if self.init_adapter is not None and self.model_config is not None:
            yield f"--init_adapter {self.init_adapter} is on a checkpoint and --model_config has none; drop one"
        if self.tuning == "full":
            # Only what was set to something else than its default is a contradiction.
            for item in dataclasses.fields(self):
                name = item.name
                if name in ADAPTER_OPTIONS and getattr(self, name) != item.default:
                    yield f"--{name} sets up LoRA but --tuning is full; drop it or use --tuning lora"
        if self.lora_implementation == "grouped":
            others = {
                "--use_dora": self.use_dora,
                f"--quantization {self.quantization}": self.quantization != "no",
            }
            for other in (name for name, is_given in others.items() if is_given):
                yield (
                    f"--lora_implementation grouped does not work with {other}; drop it: auto leaves such layers to "
                    "peft"
                )
        if not self.lora_target_modules:
            yield "--lora_target_modules is empty; use attention, all-linear or module names"
        if len(self.lora_target_modules) > 1 and {"attention", "all-linear"} & set(self.lora_target_modules):
            yield (
                f"--lora_target_modules {','.join(self.lora_target_modules)} mixes a keyword with names; "
                "give attention, all-linear or names alone"
            )


ADAPTER_OPTIONS = tuple(
    item.name
    for item in dataclasses.fields(ModelConfig)
    if item.name.startswith("lora_") or item.name in ("use_rslora", "use_dora")
)
"""Options of adapters, which mean nothing where there are none."""
