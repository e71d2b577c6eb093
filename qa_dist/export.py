"""Write a trained model as ONNX, and check it: `qa-dist export MODEL --output_dir DIR [--quantize int8]`.

The folder runs in onnxruntime, optimum and transformers.js, and qa_dist.Reader answers with it where torch is not
installed. What the ONNX model gives is compared with what the model itself gives before anything is called done.
Questions to compare on are those of --validation_file or --dataset_name, else of the embedded sample.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qa_dist.answering.options import with_model_named
from qa_dist.common.command import run_command
from qa_dist.common.errors import CheckpointError
from qa_dist.common.files import require_writable, staged
from qa_dist.config.given import asks_for_help, peek, refuse_trained_options, refuse_without_effect, require_named
from qa_dist.config.options import option
from qa_dist.config.parsing import parse
from qa_dist.machine.requirements import require_package
from qa_dist.model.folder import TRAINING_DATA, as_tuned, load_tokenizer_of, options_of_run
from qa_dist.model.hub import local_copy

PROG = "qa_dist.export"

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_OF_THE_RUN = (
    *("dataset_name", "dataset_config_name", "train_file", "validation_file", "max_train_samples", "max_eval_samples"),
    *("max_train_features", "max_eval_features", "subset_seed", "output_dir"),
)
"""Options of the run that trained the model that say nothing of its export."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """What is exported, as what, and where it goes."""

    model: str | None = option(
        None,
        "model, which may also be the first word of all: a folder of an adapter or a whole model, package:NAME/FOLDER, "
        "or a hub id",
        required=True,
    )
    format: Literal["onnx"] = option("onnx", "format of the file")
    output_dir: str | None = option(None, "folder for the exported model; it must not exist yet", required=True)
    quantize: Literal["no", "int8"] = option(
        "no",
        "int8 also writes model_quantized.onnx, with weights of 8 bits, and says how many answers and how much F1 that "
        "costs",
    )
    fuse_attention: bool = option(
        False,
        "make attention one operation of onnxruntime's own in model.onnx as well: less memory there, unknown to others",
    )

    def problems(self) -> Iterable[str]:
        if self.output_dir and os.path.lexists(self.output_dir):
            yield f"--output_dir {self.output_dir} exists already; name a folder that does not"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(PROG, lambda: _export(sys.argv[1:] if argv is None else argv))


def _export(argv: Sequence[str]) -> int:
    words = with_model_named(argv)
    named = peek(words, "model")
    name = None if named is None or asks_for_help(words) else local_copy(named)
    refuse_trained_options(words)
    refuse_without_effect(words, TRAINING_DATA, "no questions to train on are read here")
    refuse_without_effect(words, ("padding",), "an exported model pads, as onnxruntime computes batches")
    config, options = parse(
        words,
        prog=PROG,
        description=__doc__ or "",
        groups=("data", "model", "evaluation"),
        entry=ExportConfig,
        base=_base_options(name),
    )
    require_named(options.model, words, "model")
    refuse_without_effect(words, ("gather",), "all logits that are computed here are compared here")
    for package in _NEEDED:
        require_package(package, f"--format {options.format}")
    name, folder = str(name), Path(str(options.output_dir))
    require_writable(folder.absolute().parent, "the folder of --output_dir")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Libraries greet on standard output, which belongs to the result.
        with staged(folder) as aside, contextlib.redirect_stdout(sys.stderr):
            from qa_dist.answering.export import export, require_exportable
            from qa_dist.answering.opening import fitted
            from qa_dist.data.sources import load_examples
            from qa_dist.model.merging import quantization_notes

            lengths = [flag for flag in ("max_seq_length", "doc_stride") if peek(words, flag)]
            config = as_tuned(fitted(name, config, lengths), name)
            require_exportable(config.model, name)
            tokenizer, notes = load_tokenizer_of(name, config.model)
            sys.stderr.writelines(f"{PROG}: {note}\n" for note in (*notes, *quantization_notes(config)))
            examples, _, _ = load_examples(config.data, "validation")
            aside.mkdir()
            report = export(
                config,
                name,
                tokenizer,
                examples,
                aside,
                quantize=options.quantize == "int8",
                fuse=options.fuse_attention,
                called=options.model,
            )
    except OSError as error:
        raise CheckpointError(f"--output_dir {folder} cannot be written: {error.strerror or error}") from error
    sys.stdout.write(json.dumps({"output_dir": str(folder), **report}, indent=2) + "\n")
    return 0


def _base_options(model: str | None) -> dict[str, Any]:
    """Options of the run that made a model, but for those of its data."""
    found = {} if model is None else options_of_run(model)
    return {key: value for key, value in found.items() if key not in _OF_THE_RUN}


if __name__ == "__main__":
    sys.exit(main())
