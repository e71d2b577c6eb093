"""Fold an adapter into its base model: `python -m qa_dist.merge --adapter DIR --merged_dir DIR`.

The result is a plain transformers checkpoint that needs neither peft nor qa_dist. It is read back and compared with the
adapter's own logits before anything is called done.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qa_dist.common.command import run_command
from qa_dist.common.errors import CheckpointError
from qa_dist.common.files import require_writable, staged
from qa_dist.config.given import peek, refuse_trained_options, refuse_without_effect, require_named
from qa_dist.config.options import DataConfig, option
from qa_dist.config.parsing import parse
from qa_dist.model.folder import LENGTHS, adapter_problems, base_options, load_tokenizer_of
from qa_dist.model.pretrained import ADAPTER_CONFIG, MODEL_CONFIG

PROG = "qa_dist.merge"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeConfig:
    """What is merged, and where it goes."""

    adapter: str | None = option(None, "folder of an adapter that training wrote", required=True)
    merged_dir: str | None = option(None, "folder for the merged model; it must not exist yet", required=True)

    def problems(self) -> Iterable[str]:
        yield from adapter_problems(self.adapter)
        folder = Path(self.adapter or "")
        if self.adapter and (folder / MODEL_CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file():
            yield f"--adapter {self.adapter} holds a whole model; there is nothing to merge"
        if self.merged_dir and os.path.lexists(self.merged_dir):
            yield f"--merged_dir {self.merged_dir} exists already; name a folder that does not"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(PROG, lambda: _merge(sys.argv[1:] if argv is None else argv))


def _merge(argv: Sequence[str]) -> int:
    refuse_trained_options(argv)
    of_data = [field.name for field in dataclasses.fields(DataConfig) if field.name not in LENGTHS]
    refuse_without_effect(argv, of_data, "merging reads no data")
    refuse_without_effect(argv, ("padding", "quantization"), "the merged model has no padding and no quantization")
    base = base_options(peek(argv, "adapter"))
    config, options = parse(
        argv,
        prog=PROG,
        description=__doc__ or "",
        groups=("data", "model"),
        entry=MergeConfig,
        base=base,
    )
    require_named(options.adapter, argv, "adapter")
    others = [name for name in LENGTHS if name in base and getattr(config.data, name) != base[name]]
    refuse_without_effect(argv, others, "the merged model keeps the lengths of the run")
    merged_dir = Path(str(options.merged_dir))
    require_writable(merged_dir.absolute().parent, "the folder of --merged_dir")
    try:
        # Libraries greet on standard output, which belongs to the result.
        with staged(merged_dir) as aside, contextlib.redirect_stdout(sys.stderr):
            from qa_dist.model.merging import merge, quantization_notes

            tokenizer, notes = load_tokenizer_of(str(options.adapter), config.model)
            sys.stderr.writelines(f"{PROG}: {note}\n" for note in (*notes, *quantization_notes(config)))
            difference = merge(config, str(options.adapter), tokenizer, aside)
    except OSError as error:
        raise CheckpointError(f"--merged_dir {merged_dir} cannot be written: {error.strerror or error}") from error
    sys.stdout.write(json.dumps({"merged_dir": str(merged_dir), "largest_difference": difference}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
