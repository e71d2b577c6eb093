"""The folder of an exported model: what is in it, and the description that a reader needs.

    <folder>/onnx/model.onnx            the model in float32
            /onnx/model_quantized.onnx  the same with weights of 8 bits, where that was asked for
            /config.json                as transformers writes it
            /tokenizer.json, ...        likewise
            /reader.json               the description

All but the last are laid out as optimum and transformers.js expect. Neither torch nor transformers is imported.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers

from qa_dist.common.errors import CheckpointError
from qa_dist.common.files import write_json
from qa_dist.common.parsers import ParseError, read_json
from qa_dist.features.tokenizer import TokenizerSpec

DESCRIPTION = "reader.json"
FORMAT_VERSION = 1

ExportPrecision = Literal["float32", "int8"]
ONNX_FILES: dict[ExportPrecision, str] = {"float32": "onnx/model.onnx", "int8": "onnx/model_quantized.onnx"}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""Names of what a model may read, all int64 [batch_size, sequence_length]; every model reads the first two."""
OUTPUTS = ("start_logits", "end_logits")
"""Names of what it gives, both float32 [batch_size, sequence_length]."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What is said of an exported model.

    Attributes:
        tokenizer: what its features are made with.
        inputs: those of `INPUTS` that it reads.
        pad_token_id: the token to pad with.
        longest_feature: tokens of the longest feature that it can read; None: any number.
        options: options of the run that count for a reader, by flag name, such as `max_seq_length`.
        provenance: where it comes from, with what versions it was made, and what was compared.
    """

    tokenizer: TokenizerSpec
    inputs: tuple[str, ...]
    pad_token_id: int
    longest_feature: int | None
    options: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write the description into a folder."""
        write_json(folder / DESCRIPTION, {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "Exported":
        """The description in a folder.

        Raises:
            CheckpointError: It cannot be read, is of another version, or was damaged or edited since.
        """
        path = folder / DESCRIPTION
        try:
            value = read_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); export the model again") from error
        except ParseError as error:
            raise CheckpointError(f"{path} is not JSON that can be used: {error}; export the model again") from error
        version = value.pop("format_version", None) if isinstance(value, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {version} but this program reads {FORMAT_VERSION}; export the model again"
            )
        lacking = sorted({item.name for item in dataclasses.fields(cls)} - set(value))
        try:
            tokenizer = TokenizerSpec(**value.pop("tokenizer"))
            read = cls(tokenizer=tokenizer, inputs=tuple(value.pop("inputs")), **value)
        except (KeyError, TypeError) as error:
            what = f"lacks {', '.join(lacking)}" if lacking else "is not as it was written"
            raise CheckpointError(f"{path} {what}; export the model again") from error
        if name := read._first_misfit():
            raise CheckpointError(f"{path} has no `{name}` that a reader can use; export the model again")
        return read

    def _first_misfit(self) -> str | None:
        """The first part that is of another kind than exports have it; None if all is as it should be."""
        fits = {
            "inputs": all(name in INPUTS for name in self.inputs) and all(name in self.inputs for name in INPUTS[:2]),
            "pad_token_id": _is_count(self.pad_token_id),
            "longest_feature": self.longest_feature is None or _is_count(self.longest_feature),
            "options": isinstance(self.options, Mapping),
            "provenance": isinstance(self.provenance, Mapping),
            "tokenizer": _is_tokenizer(self.tokenizer),
        }
        return next((name for name, does_fit in fits.items() if not does_fit), None)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_tokenizer(spec: TokenizerSpec) -> bool:
    if not isinstance(spec.backend, str) or spec.padding_side not in ("left", "right"):
        return False
    if not all(value is None or _is_count(value) for value in (spec.cls_token_id, spec.bos_token_id)):
        return False
    if not isinstance(spec.has_token_types, bool) or not isinstance(spec.has_exact_offsets, bool):
        return False
    try:
        tokenizers.Tokenizer.from_str(spec.backend)
    except Exception:  # the library raises nothing more special
        return False
    return True


def is_exported(folder: str | Path) -> bool:
    """Whether a folder holds an exported model."""
    return (Path(folder) / DESCRIPTION).is_file()
