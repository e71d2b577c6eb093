"""Whether the layers of a run's model are compiled: as `--torch_compile` says, or where that pays and is right."""

import time
from collections.abc import Callable

from qa_dist.common.errors import ConfigError
from qa_dist.config.options import RunConfig
from qa_dist.distributed.ranks import Ranks
from qa_dist.model.compiling import obstacle, try_layers
from qa_dist.model.span_model import SpanModel, transformers_model
from qa_dist.training.step_inputs import StepInputs

SECONDS = 100.0
"""What compiling and comparing takes at the start of a run; about, and on a slow host.

On an H100 whose host is slow the first step of bert-base took 70 s, with an empty cache of torch's; a second run finds
most of it there. Comparing and evaluation are graphs of their own.
"""

SAVED_SECONDS = 5e-11
"""What compiled layers save for each number of a hidden state, of each layer, in a step.

3.2 ms of a step with 6,799 tokens, 12 layers and hidden states of 768 numbers: the time of the device on that H100,
bf16, LoRA. It is memory that is not read and written, so that it grows with all three.
"""


def saved_seconds(num_tokens: float, num_layers: int, hidden_size: int) -> float:
    """About what compiled layers save of a run's time, in seconds, if a rank computes so many tokens in all."""
    return SAVED_SECONDS * num_tokens * num_layers * hidden_size


def compile_and_verify(
    config: RunConfig, ranks: Ranks, model: SpanModel, inputs: StepInputs, notice: Callable[[str], object]
) -> None:
    """Compile the layers of a model if `--torch_compile` says so, and see that they compute what they did.

    With `auto`, what speaks against it becomes one of the model's notes, and they stay as they are; on a CPU, `auto`
    does nothing. All ranks do the same, and must call this together: when the model is on its device, with its weights
    in the types that they train in, and before the memory of a pass is measured.

    Raises:
        ConfigError: `--torch_compile layers` cannot be done; on all ranks.
    """
    wanted = config.training.torch_compile
    if wanted in ("no", "model") or (wanted == "auto" and ranks.device.type == "cpu"):
        return
    begin = time.perf_counter()
    problem = obstacle(model, config, ranks.device, ranks.launch_config.strategy)
    if problem is None and wanted == "auto":
        problem = _too_short(model, inputs, ranks.world_size)
    if problem is None:
        problem = try_layers(model, config.training.mixed_precision, ranks.device)
    # Ranks that computed differently would still train one model; but each step would wait for the slowest.
    if not ranks.minimum(int(problem is None)):
        model.leave_layers()
        problem = problem or "another rank cannot"
    if problem is None:
        notice(f"layers compiled and compared in {time.perf_counter() - begin:.0f} s")
    elif wanted == "layers":
        raise ConfigError(
            [f"--torch_compile layers cannot be done here: {problem}; use --torch_compile no"], on_all_ranks=True
        )
    else:
        model.notes = (*model.notes, f"layers are not compiled: {problem}")


def _too_short(model: SpanModel, inputs: StepInputs, world_size: int) -> str | None:
    """Why compiling does not pay for this run, as a clause; None if it does."""
    settings = transformers_model(model.model).config
    num_tokens = inputs.mean_tokens * inputs.copies * inputs.num_steps / world_size
    saved = saved_seconds(num_tokens, len(model.blocks()), settings.hidden_size)
    if saved >= SECONDS:
        return None
    return f"that takes about {SECONDS:.0f} s and would save about {saved:.0f} s of this run"
