"""The encoder, its question-answering head and its adapters.

`SpanModel` is what training and evaluation call: features go in as one row of real tokens and logits come out as one
row, whether the architecture computes the row as it is or padded. What is trained is decided here and checked here.

Legend: B features, T real tokens of all of them, L tokens of the longest.
"""

import copy
import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qa_dist.common.errors import CheckpointError, ConfigError, TrainingError, UserError
from qa_dist.config.options import MODEL_TYPES_UNPADDED, ModelConfig
from qa_dist.features.batching import Indices
from qa_dist.features.store import FeatureStore
from qa_dist.model.attention import UNPADDED, cumulative_lengths, position_ids, register
from qa_dist.model.dropout import use_cheap_dropout
from qa_dist.model.pretrained import check_adapter, loading_error, resolve_model_path, weights_folder
from qa_dist.model.quantization import num_elements, outline_quantized, quantization_options, require_quantized

Padding = Literal["unpadded", "sorted", "max_length"]

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

_ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")
_OFFSET_POSITIONS = ("roberta", "mpnet")
"""Architectures that number positions from `pad_token_id + 1`."""

CPU = torch.device("cpu")


class SpanModel(nn.Module):
    """A question-answering model that reads and writes rows of real tokens.

    Attributes:
        model: the transformers model, inside a peft model if adapters are trained.
        padding: how the row is computed.
        notes: what the user should know about choices made here, one sentence each.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        padding: Padding,
        max_seq_length: int,
        tokenizer_pads_left: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.padding = padding
        self.notes = tuple(notes)
        config: Any = model.config
        plain = transformers_model(model)
        # Adapters are layers inside the transformers model. It is called directly: peft's question-answering wrapper
        # (0.21) swallows token_type_ids and position_ids.
        self._call: Callable[..., Any] = plain.__call__
        self._takes_token_types = (
            "token_type_ids" in inspect.signature(plain.forward).parameters
            # RoBERTa has a table of one token type, and tokenizers that number two.
            and getattr(config, "type_vocab_size", 2) > 1
        )
        self._first_position = config.pad_token_id + 1 if config.model_type in _OFFSET_POSITIONS else 0
        self._pad_token_id = config.pad_token_id or 0
        self._padded_length = max_seq_length if padding == "max_length" else None
        self._max_seq_length = max_seq_length
        self._pads_left = tokenizer_pads_left
        self._is_compiled = False

    def forward(
        self, input_ids_T: torch.Tensor, token_type_ids_T: torch.Tensor, lengths: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Start and end logits of every token, both float32 [T].

        Args:
            input_ids_T: int64 [T], the features one behind the other.
            token_type_ids_T: int64 [T].
            lengths: Tokens of each feature; they add up to T.
        """
        if self.padding == "unpadded":
            output = self._compute_row(input_ids_T, token_type_ids_T, lengths)
            start_T, end_T = output.start_logits[0], output.end_logits[0]
        else:
            real, output = self._compute_padded(input_ids_T, token_type_ids_T, lengths)
            start_T, end_T = output.start_logits[real], output.end_logits[real]
        return start_T.float(), end_T.float()

    def _compute_row(self, input_ids_T: torch.Tensor, token_type_ids_T: torch.Tensor, lengths: tuple[int, ...]) -> Any:
        cumulative = cumulative_lengths(lengths, input_ids_T.device)
        positions = position_ids(cumulative, len(input_ids_T)) + self._first_position
        inputs = {"token_type_ids": token_type_ids_T[None]} if self._takes_token_types else {}
        return self._call(
            input_ids=input_ids_T[None],
            position_ids=positions[None],
            cumulative=cumulative,
            longest=self._max_seq_length,
            **inputs,
        )

    def _compute_padded(
        self, input_ids_T: torch.Tensor, token_type_ids_T: torch.Tensor, lengths: tuple[int, ...]
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], Any]:
        """Row and column of every real token, both int64 [T], and the model's output."""
        width = self._padded_length or max(lengths)
        lengths_B = torch.tensor(lengths, device=input_ids_T.device)
        features = torch.arange(len(lengths), device=input_ids_T.device)
        rows_T = torch.repeat_interleave(features, lengths_B, output_size=len(input_ids_T))
        columns_T = position_ids(cumulative_lengths(lengths, input_ids_T.device), len(input_ids_T))
        if self._pads_left:
            columns_T = columns_T + (width - lengths_B)[rows_T]
        # Places as numbers: with a mask in their stead the device would have to say how many there are.
        real = rows_T, columns_T
        attention_mask_BL = torch.zeros(len(lengths), width, dtype=torch.long, device=input_ids_T.device)
        attention_mask_BL[real] = 1
        input_ids_BL = torch.full_like(attention_mask_BL, self._pad_token_id)
        input_ids_BL[real] = input_ids_T
        inputs = {"input_ids": input_ids_BL, "attention_mask": attention_mask_BL}
        if self._takes_token_types:
            token_type_ids_BL = torch.zeros_like(input_ids_BL)
            token_type_ids_BL[real] = token_type_ids_T
            inputs["token_type_ids"] = token_type_ids_BL
        return real, self._call(**inputs)

    @property
    def padded_length(self) -> int | None:
        """Length that every feature is padded to, if it is a fixed one."""
        return self._padded_length

    def compile_encoder(self, backend: str = "inductor") -> None:
        """Compile the model once for rows of any length.

        Shapes are symbolic and the boundaries of the features are data, so that a new batch does not compile again.
        """
        self._call = torch.compile(transformers_model(self.model).forward, dynamic=True, backend=backend)
        self._is_compiled = True

    @property
    def is_thread_safe(self) -> bool:
        """Whether several threads may call the model at once, in evaluation.

        Quantised layers of bitsandbytes keep what they computed last, and what is compiled may have to be again.
        """
        return not (self._is_compiled or getattr(transformers_model(self.model), "is_quantized", False))

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Name and tensor of every trainable parameter, in the model's order."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def blocks(self) -> list[nn.Module]:
        """The encoder's layers, from the first to the last."""
        lists = [part for part in transformers_model(self.model).modules() if isinstance(part, nn.ModuleList)]
        return list(max(lists, key=lambda part: sum(weight.numel() for weight in part.parameters()), default=()))

    def unmoved(self) -> list[str]:
        """Names of the trainable parameters whose gradient is set to zero, see `logit_biases`."""
        return list(logit_biases(self))


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """Features one behind the other, as tensors on one device.

    Attributes:
        indices: int64 [B] on the CPU, the features' places in their store.
        input_ids_T: int64 [T].
        token_type_ids_T: int64 [T].
        lengths: tokens of each feature.
        labels_B2: int64 [B, 2], start and end token.
        context_start_B: int64 [B], first context token.
        context_end_B: int64 [B], one past the last context token.
        cls_token_B: int64 [B], the token that stands for "no answer".
    """

    indices: Indices
    input_ids_T: torch.Tensor
    token_type_ids_T: torch.Tensor
    lengths: tuple[int, ...]
    labels_B2: torch.Tensor
    context_start_B: torch.Tensor
    context_end_B: torch.Tensor
    cls_token_B: torch.Tensor

    @classmethod
    def of(cls, store: FeatureStore, indices: Indices, device: torch.device) -> "FeatureBatch":
        """The features of a store at these places."""

        def column(*arrays: npt.NDArray[Any]) -> torch.Tensor:
            stacked = np.stack([array.astype(np.int64) for array in arrays], axis=-1)
            return torch.from_numpy(stacked).to(device, non_blocking=True)

        input_ids, token_type_ids = store.flat(indices)
        starts = store.context_start[indices]
        return cls(
            indices=indices,
            input_ids_T=column(input_ids).squeeze(-1),
            token_type_ids_T=column(token_type_ids).squeeze(-1),
            lengths=tuple(store.lengths[indices].tolist()),
            labels_B2=column(store.start_token[indices], store.end_token[indices]),
            context_start_B=column(starts).squeeze(-1),
            context_end_B=column(starts + store.context_length[indices]).squeeze(-1),
            cls_token_B=column(store.cls_token[indices]).squeeze(-1),
        )


@dataclass(frozen=True, slots=True)
class ParameterReport:
    """What is trained of a model, and what full fine-tuning would train."""

    trainable: int
    total: int
    before: int
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    def lines(self, *, structure: bool) -> list[str]:
        """The report as text; with `structure`, every trainable tensor and its shape."""
        rows = [("before", self.before, self.before), ("after", self.trainable, self.total)]
        text = [f"{'parameters':<12}{'trainable':>14}{'total':>14}{'share':>11}"]
        for name, trainable, total in rows:
            text.append(f"{name:<12}{trainable:>14,}{total:>14,}{100 * trainable / total:>9.4f} %")
        if structure:
            width = max(len(name) for name, _ in self.tensors)
            text += [f"  {name:<{width}}  {'x'.join(map(str, shape))}" for name, shape in self.tensors]
        return text


def parameter_report(model: SpanModel, before: int) -> ParameterReport:
    """Counts and shapes of what is trained; `before` counts the parameters before adapters were added."""
    trainable = model.trainable()
    return ParameterReport(
        trainable=sum(parameter.numel() for _, parameter in trainable),
        total=count_parameters(model),
        before=before,
        tensors=tuple((name, tuple(parameter.shape)) for name, parameter in trainable),
    )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trainable or not."""
    return sum(num_elements(parameter) for parameter in model.parameters())


def transformers_model(model: nn.Module) -> Any:
    """The transformers model inside `model`, which may be it or a peft model around it."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model else model


def head_names(model: Any) -> tuple[str, ...]:
    """Top-level modules of a question-answering model that are not its encoder: `qa_outputs`, `classifier`, ...

    Raises:
        ConfigError: The model has nothing but an encoder.
    """
    names = tuple(
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    )
    if not names:
        raise ConfigError([f"{type(model).__name__} has no question-answering head; choose an encoder that has one"])
    return names


def target_modules(model: Any, wanted: Sequence[str]) -> list[str]:
    """Names of the linear layers that get adapters, as peft's `target_modules`.

    Args:
        model: A transformers question-answering model.
        wanted: ("attention",), ("all-linear",) or names of modules.

    Raises:
        ConfigError: A name is no linear layer of the encoder, or the architecture's projections are unknown.
    """
    encoder = getattr(model, model.base_model_prefix)
    linear = sorted({name.rpartition(".")[2] for name, part in encoder.named_modules() if isinstance(part, nn.Linear)})
    if tuple(wanted) == ("all-linear",):
        return linear
    if tuple(wanted) == ("attention",):
        if model.config.model_type not in ATTENTION_PROJECTIONS:
            raise ConfigError(
                [
                    f"--lora_target_modules attention is unknown for a {model.config.model_type} model; "
                    f"use all-linear or some of {', '.join(linear)}"
                ]
            )
        return list(ATTENTION_PROJECTIONS[model.config.model_type])
    unknown = [name for name in wanted if name not in linear]
    if unknown:
        raise ConfigError(
            [f"--lora_target_modules {', '.join(unknown)}: no such linear layer; the encoder has {', '.join(linear)}"]
        )
    return list(wanted)


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    max_seq_length: int,
    gradient_checkpointing: bool = False,
    torch_compile: bool = False,
    tokenizer_pads_left: bool = False,
    device: torch.device = CPU,
) -> tuple[SpanModel, ParameterReport]:
    """The model as training starts with it, and the report of what it trains.

    New weights (the head's, the adapters') are drawn from `seed`, so every rank builds the same ones. Quantised weights
    are on `device` already, everything else is on the CPU.

    Raises:
        UserError: The model cannot be loaded, or an option does not fit it.
    """
    torch.manual_seed(seed)
    base, fresh, padding, notes = _load_base(config, config.model_name_or_path, max_seq_length, device)
    before = count_parameters(base)
    span_model = _finished(
        base,
        fresh,
        config,
        padding=padding,
        max_seq_length=max_seq_length,
        gradient_checkpointing=gradient_checkpointing,
        tokenizer_pads_left=tokenizer_pads_left,
        notes=notes,
    )
    if torch_compile:
        # It fuses the masks of its own dropout into what surrounds them.
        span_model.compile_encoder()
    elif not torch.cuda.is_available():
        use_cheap_dropout(span_model)
    return span_model, parameter_report(span_model, before)


def build_outline(
    config: ModelConfig, *, max_seq_length: int, gradient_checkpointing: bool = False, device: torch.device = CPU
) -> SpanModel:
    """The model that `build_model` would build for `device`, all shapes and no numbers: its tensors are on "meta".

    Only the configuration of a checkpoint is read.

    Raises:
        UserError: There is no such model, or an option does not fit it.
    """
    name = config.model_name_or_path
    with torch.device("meta"):
        with _loading(name), _quiet():
            model_config, padding, notes = _configured(config, name, max_seq_length)
            base = _from_configuration(model_config, padding)
            outline_quantized(base, config.quantization, head_names(base))
        span_model = _finished(
            base,
            (),
            config,
            padding=padding,
            max_seq_length=max_seq_length,
            gradient_checkpointing=gradient_checkpointing,
            tokenizer_pads_left=False,
            notes=notes,
        )
    if device.type == "cpu":
        use_cheap_dropout(span_model)
    return span_model


def _finished(
    base: Any,
    fresh: Sequence[str],
    config: ModelConfig,
    *,
    padding: Padding,
    max_seq_length: int,
    gradient_checkpointing: bool,
    tokenizer_pads_left: bool,
    notes: Sequence[str],
) -> SpanModel:
    """A transformers model with its adapters and all else that training adds; `fresh` names its new parameters."""
    model = _add_adapters(base, config) if config.tuning == "lora" else base
    span_model = SpanModel(
        model,
        padding=padding,
        max_seq_length=max_seq_length,
        tokenizer_pads_left=tokenizer_pads_left,
        notes=notes,
    )
    if gradient_checkpointing:
        # Reentrant checkpoints need an input that requires a gradient, which a frozen embedding does not give.
        plain = transformers_model(model)
        # Transformers 5.2x renamed it.
        enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    _check_trainable(span_model, fresh)
    for bias in logit_biases(span_model).values():
        bias.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
    return span_model


def load_trained(
    config: ModelConfig,
    directory: str,
    *,
    max_seq_length: int,
    tokenizer_pads_left: bool,
    device: torch.device = CPU,
) -> SpanModel:
    """The model that a run saved into `directory`: its adapter on the base model, or the whole model.

    Raises:
        UserError: The directory holds no such model, or the base model cannot be loaded.
    """
    from peft import PeftModel

    if config.model_config is not None:
        if config.tuning == "lora":
            raise CheckpointError(
                f"the adapter in {directory} belongs to random weights (--model_config), which are not kept; train on "
                "a checkpoint to use the result"
            )
        config = dataclasses.replace(config, model_config=None)
    try:
        if config.tuning == "full":
            model, fresh, padding, notes = _load_base(config, directory, max_seq_length, device)
        else:
            check_adapter(directory)
            base, fresh, padding, notes = _load_base(config, config.model_name_or_path, max_seq_length, device)
            with _quiet():
                model = PeftModel.from_pretrained(base, directory)
            fresh = _unfilled(model, fresh, Path(directory) / "adapter_model.safetensors")
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the library raises a dozen unrelated types for what is wrong with a folder
        first = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the model in {directory} cannot be loaded ({first}); give a folder that training wrote"
        ) from error
    if fresh:
        named = f"{', '.join(fresh[:3])}{' and others' if len(fresh) > 3 else ''}"
        raise CheckpointError(f"{directory} lacks {named}, which would be random; give a folder that training wrote")
    return SpanModel(
        model,
        padding=padding,
        max_seq_length=max_seq_length,
        tokenizer_pads_left=tokenizer_pads_left,
        notes=notes,
    ).eval()


def _unfilled(model: Any, fresh: Sequence[str], weights: Path) -> list[str]:
    """Tensors of a peft model that its adapter's file should hold and does not: adapters and heads.

    Args:
        model: The model with the adapter.
        fresh: Names of parameters that the base model's checkpoint left random.
        weights: The adapter's file.

    Raises:
        CheckpointError: The file holds tensors that the model has no place for.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        stored = set(file.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    strange = sorted(stored - expected - set(model.state_dict()))
    if strange:
        raise CheckpointError(
            f"{weights} holds {strange[0]}, for which the model has no place; give the adapter the base model that it "
            "was trained on"
        )
    filled = {name.removeprefix("base_model.model.") for name in stored}
    return sorted(expected - stored) + sorted(name for name in fresh if name not in filled)


def check_vocabulary(model: SpanModel, store: FeatureStore) -> None:
    """Refuse features with token ids that the model has no embedding for.

    Raises:
        ConfigError: The features were made by the tokenizer of another model.
    """
    size = int(transformers_model(model.model).get_input_embeddings().weight.shape[0])
    if store.largest_token_id >= size:
        raise ConfigError(
            [
                f"the tokenizer gives token ids up to {store.largest_token_id} but the model has {size} embeddings; "
                "leave --tokenizer_name out, or name the tokenizer of this model"
            ]
        )


def model_configuration(config: ModelConfig) -> Any:
    """The transformers configuration of the model that an option names, before anything is set in it.

    Raises:
        UserError: There is none under that name.
    """
    from transformers import AutoConfig, BertConfig

    name = config.model_config
    if name in CONFIGURATIONS:
        return BertConfig(**CONFIGURATIONS[name])
    if name is not None and not Path(name).expanduser().exists():
        raise ConfigError(
            [f"--model_config {name} is neither a folder with a config.json nor one of {', '.join(CONFIGURATIONS)}"]
        )
    wanted = resolve_model_path(config.model_name_or_path) if name is None else str(Path(name).expanduser())
    try:
        found = AutoConfig.from_pretrained(
            wanted, revision=config.model_revision, cache_dir=config.cache_dir, trust_remote_code=False
        )
    except Exception as error:  # the library raises a dozen unrelated types for what is wrong with a file
        raise loading_error("configuration of the model", name or config.model_name_or_path, error) from error
    if getattr(found, "transformers_weights", None) is not None:
        raise UserError(
            f"the configuration of {name or config.model_name_or_path} names a file of weights (transformers_weights); "
            "only model.safetensors is read: rename the file, and take the line out"
        )
    # A configuration may name a kernel on the hub, which is code.
    found._attn_implementation = None
    return found


def _load_base(
    config: ModelConfig, name: str, max_seq_length: int, device: torch.device
) -> tuple[Any, list[str], Padding, list[str]]:
    """A transformers model, the names of its newly initialised parameters, its padding, and notes for the user."""
    from transformers import AutoModelForQuestionAnswering

    with _loading(name), _quiet():
        model_config, padding, notes = _configured(config, name, max_seq_length)
        if config.model_config is not None:
            model = _from_configuration(model_config, padding)
            notes.append(f"all weights of {config.model_config} are random: good for measuring, not for answers")
            # As of a checkpoint without a head; that the rest is random was asked for.
            heads = head_names(model)
            fresh = [name for name, _ in model.named_parameters() if name.partition(".")[0] in heads]
            return model, sorted(fresh), padding, notes
        heads = () if config.quantization == "no" else _heads_of(model_config)
        model, info = AutoModelForQuestionAnswering.from_pretrained(
            weights_folder(name, config),
            config=model_config,
            dtype=torch.float32,
            attn_implementation=_attention(padding),
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **quantization_options(config.quantization, heads, device),
        )
        require_quantized(model, config.quantization, heads)
    return model, sorted(info["missing_keys"]), padding, notes


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Make one sentence of whatever a library raises about a model."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the library raises a dozen unrelated types for what is wrong with a folder
        first = " ".join(str(error).split())[:300]
        raise UserError(
            f"--model_name_or_path {name} cannot be loaded as a question-answering encoder ({first}); give a local "
            "folder of a transformers model, package:NAME/FOLDER, or a hub id that is reachable or cached"
        ) from error


def _configured(config: ModelConfig, name: str, max_seq_length: int) -> tuple[Any, Padding, list[str]]:
    """The configuration of a transformers model as training sets it, its padding, and notes for the user."""
    model_config = model_configuration(dataclasses.replace(config, model_name_or_path=name))
    padding, notes = _choose_padding(config, model_config)
    _check_length(model_config, max_seq_length)
    _set_dropout(model_config, config.model_dropout, unpadded=padding == "unpadded", notes=notes)
    model_config.num_labels = 2
    if padding == "unpadded":
        register()
    return model_config, padding, notes


def _attention(padding: Padding) -> str | None:
    return UNPADDED if padding == "unpadded" else None


def _from_configuration(model_config: Any, padding: Padding) -> Any:
    """The transformers model that a configuration describes, with new weights."""
    from transformers import AutoModelForQuestionAnswering

    return AutoModelForQuestionAnswering.from_config(
        model_config, dtype=torch.float32, attn_implementation=_attention(padding), trust_remote_code=False
    )


def _heads_of(model_config: Any) -> tuple[str, ...]:
    """`head_names` of the model that a configuration describes, without loading it."""
    from transformers import AutoModelForQuestionAnswering

    with torch.device("meta"):
        return head_names(
            AutoModelForQuestionAnswering.from_config(copy.deepcopy(model_config), trust_remote_code=False)
        )


def _choose_padding(config: ModelConfig, model_config: Any) -> tuple[Padding, list[str]]:
    possible = model_config.model_type in MODEL_TYPES_UNPADDED
    if config.padding == "auto":
        if possible:
            return "unpadded", []
        return "sorted", [
            f"{model_config.model_type} computes attention in its own way: padded batches, sorted by length"
        ]
    if config.padding == "unpadded" and not possible:
        raise ConfigError(
            [
                f"--padding unpadded does not work for a {model_config.model_type} model, only for "
                f"{', '.join(MODEL_TYPES_UNPADDED)}; use --padding auto or sorted"
            ]
        )
    return config.padding, []


def _check_length(model_config: Any, max_seq_length: int) -> None:
    longest = getattr(model_config, "max_position_embeddings", None)
    if longest is None:
        return
    if model_config.model_type in _OFFSET_POSITIONS:
        longest -= model_config.pad_token_id + 1
    if max_seq_length > longest:
        raise ConfigError(
            [f"--max_seq_length {max_seq_length} is more than the {longest} positions of this model; lower it"]
        )


def _set_dropout(model_config: Any, probability: float | None, *, unpadded: bool, notes: list[str]) -> None:
    """Set every dropout probability of the encoder; on the unpadded path, attention has none."""
    for name, value in list(model_config.to_dict().items()):
        if "dropout" not in name or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        wanted = value if probability is None else probability
        if unpadded and name in _ATTENTION_DROPOUTS and wanted:
            notes.append(f"unpadded attention has no dropout: {name} is 0 instead of {wanted}")
            wanted = 0.0
        setattr(model_config, name, float(wanted))


def _add_adapters(base: Any, config: ModelConfig) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    heads = head_names(base)
    lora = LoraConfig(
        task_type=TaskType.QUESTION_ANS,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules(base, config.lora_target_modules),
        # A head may share layer names with the encoder (ModernBERT's `head.dense`); it is trained whole instead.
        exclude_modules=rf"({'|'.join(heads)})(\..*)?",
        modules_to_save=list(heads),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )
    with _quiet():
        model = get_peft_model(base, lora)
    # peft notes the folder that a package or the hub cache happens to have on this machine.
    model.peft_config["default"].base_model_name_or_path = config.model_name_or_path
    return model


def _check_trainable(model: SpanModel, fresh: Sequence[str]) -> None:
    """Refuse a model in which a newly initialised parameter would stay as random as it is."""
    trained = {name for name, _ in model.trainable()}
    frozen = [name for name in fresh if not any(_same_parameter(name, candidate) for candidate in trained)]
    if frozen:
        raise ConfigError(
            [
                f"{', '.join(frozen[:3])}{' and others' if len(frozen) > 3 else ''} are new in this checkpoint but "
                "would not be trained; use a checkpoint that has them, or --tuning full"
            ]
        )


def _same_parameter(plain: str, trained: str) -> bool:
    """Whether the trained parameter's name is the plain model's, with peft's wrappers taken off."""
    stripped = trained.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    return stripped == plain


def head_parameters(model: SpanModel) -> list[str]:
    """Names of the head's trainable parameters, as in `SpanModel.trainable`."""
    heads = head_names(transformers_model(model.model))
    return [name for name, _ in model.trainable() if name.removeprefix("base_model.model.").split(".")[0] in heads]


def logit_biases(model: SpanModel) -> dict[str, nn.Parameter]:
    """The head's two trainable biases that shift all start, or all end, logits of a feature alike.

    The softmax over the tokens does not change with such a shift, so their gradient is zero but for rounding - and Adam
    divides a gradient by its own size, which would turn that rounding into steps as long as any other.
    """
    heads = set(head_parameters(model))
    return {name: weight for name, weight in model.trainable() if name in heads and tuple(weight.shape) == (2,)}


class GradientCheck:
    """Makes sure that every adapter and head tensor has had a non-zero gradient by the second update.

    Before the first update LoRA's A matrices have none, because B starts at zero (Hu et al. 2022, section 4.1). The
    biases of the logits never have one, see `logit_biases`.
    """

    def __init__(self, model: SpanModel) -> None:
        heads, never = set(head_parameters(model)), logit_biases(model)
        self._pending = [
            name for name, _ in model.trainable() if ("lora_" in name or name in heads) and name not in never
        ]
        self._without = self._pending
        self._num_updates = 0

    def observe(self, has_gradient: Callable[[str], bool]) -> None:
        """Look at the gradients of a step, before the optimiser clears them.

        Args:
            has_gradient: Whether the gradient of a parameter, by name, is there and not zero.
        """
        self._without = [name for name in self._pending if not has_gradient(name)]

    def updated(self) -> None:
        """The step that was observed has updated the weights, which one that overflows in float16 does not.

        Raises:
            TrainingError: It was the second one and a tensor never had a gradient; the message names it.
        """
        self._pending = self._without
        self._num_updates += 1
        if self._num_updates >= 2 and self._pending:
            raise TrainingError(
                f"no gradient has reached {', '.join(self._pending[:5])} in two steps: "
                f"{len(self._pending)} tensors would never be trained"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from listing newly initialised weights, and peft from using what transformers deprecated."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            # They are looked for here, and are an error.
            warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def span_loss(
    start_T: torch.Tensor, end_T: torch.Tensor, lengths: Sequence[int], labels_B2: torch.Tensor
) -> torch.Tensor:
    """Loss of every feature, float32 [B]: the mean of the cross-entropies of its start and end token.

    Args:
        start_T: Start logits, float32 [T], the features one behind the other.
        end_T: End logits, float32 [T].
        lengths: Tokens of each feature.
        labels_B2: int64 [B, 2], start and end token inside the feature.
    """
    widths = list(lengths)
    start_BL, end_BL = (
        nn.utils.rnn.pad_sequence(list(torch.split(logits, widths)), batch_first=True, padding_value=-math.inf)
        for logits in (start_T, end_T)
    )
    start_loss = nn.functional.cross_entropy(start_BL, labels_B2[:, 0], reduction="none")
    end_loss = nn.functional.cross_entropy(end_BL, labels_B2[:, 1], reduction="none")
    return (start_loss + end_loss) / 2
