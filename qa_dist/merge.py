"""Fold an adapter into its base model: `python -m qa_dist.merge --adapter DIR --merged_dir DIR`.

The result is a plain transformers checkpoint that needs neither peft nor qa_dist. It is read back and compared with the
adapter's own logits before anything is called done.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qa_dist.common.command import run_command
from qa_dist.common.errors import CheckpointError
from qa_dist.common.files import staged
from qa_dist.config.options import ModelConfig, RunConfig, option
from qa_dist.config.parsing import parse, peek
from qa_dist.model.folder import adapter_problems, base_options, load_tokenizer_of
from qa_dist.model.pretrained import ADAPTER_CONFIG

if TYPE_CHECKING:
    import torch

    from qa_dist.model.span_model import SpanModel

PROG = "qa_dist.merge"
TOLERANCE = 1e-4
"""Largest difference between the logits of adapter and merged model, as a share of the largest logit.

Adding B A to a weight rounds once in float32, at 6e-8 of the weight; twenty-four layers do not come near this.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeConfig:
    """What is merged, and where it goes."""

    adapter: str | None = option(None, "folder of an adapter that training wrote", required=True)
    merged_dir: str | None = option(None, "folder for the merged model; it must not exist yet", required=True)

    def problems(self) -> Iterable[str]:
        yield from adapter_problems(self.adapter)
        if self.adapter and Path(self.adapter).is_dir() and not (Path(self.adapter) / ADAPTER_CONFIG).is_file():
            yield f"--adapter {self.adapter} holds a whole model; there is nothing to merge"
        if self.merged_dir and Path(self.merged_dir).exists():
            yield f"--merged_dir {self.merged_dir} exists already; name a folder that does not"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(PROG, lambda: _merge(sys.argv[1:] if argv is None else argv))


def _merge(argv: Sequence[str]) -> int:
    config, options = parse(
        argv,
        prog=PROG,
        description=__doc__ or "",
        groups=("data", "model"),
        entry=MergeConfig,
        base=base_options(peek(argv, "adapter")),
    )
    merged_dir = Path(str(options.merged_dir))
    try:
        merged_dir.parent.mkdir(parents=True, exist_ok=True)
        # Libraries greet on standard output, which belongs to the result.
        with staged(merged_dir) as aside, contextlib.redirect_stdout(sys.stderr):
            aside.mkdir()
            difference = merge(config, str(options.adapter), aside)
    except OSError as error:
        raise CheckpointError(f"--merged_dir {merged_dir} cannot be written: {error.strerror or error}") from error
    sys.stdout.write(json.dumps({"merged_dir": str(merged_dir), "largest_difference": difference}, indent=2) + "\n")
    return 0


def merge(config: RunConfig, adapter: str, directory: Path) -> float:
    """Write the merged model and its tokenizer; returns the largest difference of a logit, as a share of the largest.

    Raises:
        UserError: The adapter or its base model cannot be loaded.
        CheckpointError: The merged model, read back, gives other logits than the adapter.
    """
    from qa_dist.model.saved import load_trained

    tokenizer, notes = load_tokenizer_of(adapter, config.model)
    sys.stderr.writelines(f"{PROG}: {note}\n" for note in notes)
    # A plain model: transformers' own attention, the base model's own dropout and its weights as they were published.
    model_config = dataclasses.replace(config.model, padding="max_length", model_dropout=None, quantization="no")

    def load(what: ModelConfig, folder: str) -> "SpanModel":
        length = config.data.max_seq_length
        left = tokenizer.padding_side == "left"
        return load_trained(what, folder, max_seq_length=length, tokenizer_pads_left=left)

    with_adapter = load(model_config, adapter)
    expected = _logits(with_adapter, len(tokenizer))
    peft_model: Any = with_adapter.model
    merged = peft_model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
    whole = dataclasses.replace(ModelConfig(), tuning="full", model_name_or_path=str(directory), padding="max_length")
    read_back = _logits(load(whole, str(directory)), len(tokenizer))
    difference = float((read_back - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the merged model's logits differ from the adapter's by {difference:.1e} of the largest, more than "
            f"{TOLERANCE:.0e}; nothing was written - use the adapter as it is, with qa_dist.evaluate --adapter"
        )
    return difference


def _logits(model: "SpanModel", vocabulary: int) -> "torch.Tensor":
    """Start and end logits of a few features of random tokens, float32 [2, T]; the same tokens at every call."""
    import torch

    lengths = (7, 16, 12, 16)
    generator = torch.Generator().manual_seed(0)
    input_ids_T = torch.randint(vocabulary, (sum(lengths),), generator=generator)
    with torch.inference_mode():
        return torch.stack(model(input_ids_T, torch.zeros_like(input_ids_T), lengths))


if __name__ == "__main__":
    sys.exit(main())
