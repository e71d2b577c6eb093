"""When a run's layers are compiled, what is said where they are not, and that all ranks do the same."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qa_dist.common.errors import ConfigError
from qa_dist.config.options import RunConfig, TrainingConfig
from qa_dist.training import compile_choice
from qa_dist.training.compile_choice import SECONDS, compile_and_verify, saved_seconds

CUDA = torch.device("cuda", 0)


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns what was tried, the model's notes, what was said, and whether layers were left as they were."""

    def start(
        wanted: str,
        *,
        device: torch.device = CUDA,
        num_steps: int = 100_000,
        copies: int = 1,
        problem: str | None = None,
        others_can: bool = True,
        in_the_way: str | None = None,
    ) -> SimpleNamespace:
        seen = SimpleNamespace(tried=False, left=False, said=[], notes=())

        def try_layers(*_: Any) -> str | None:
            seen.tried = True
            return problem

        monkeypatch.setattr(compile_choice, "try_layers", try_layers)
        monkeypatch.setattr(compile_choice, "obstacle", lambda *_: in_the_way)
        monkeypatch.setattr(
            compile_choice, "transformers_model", lambda _: SimpleNamespace(config=SimpleNamespace(hidden_size=768))
        )
        model = SimpleNamespace(
            model=None,
            notes=(),
            blocks=lambda: [None] * 12,
            leave_layers=lambda: setattr(seen, "left", True),
        )
        ranks = SimpleNamespace(
            device=device,
            world_size=2,
            launch_config=SimpleNamespace(strategy="ddp"),
            minimum=lambda value: min(value, int(others_can)),
        )
        config = RunConfig(training=TrainingConfig(torch_compile=wanted))  # type: ignore[arg-type]
        inputs = SimpleNamespace(mean_tokens=5_460.0, num_steps=num_steps, copies=copies)
        compile_and_verify(config, ranks, model, inputs, seen.said.append)  # type: ignore[arg-type]
        seen.notes = model.notes
        return seen

    return start


def test_layers_of_a_long_run_are_compiled(choose: Any) -> None:
    seen = choose("auto")
    assert seen.tried
    assert not seen.left
    assert seen.notes == ()
    (said,) = seen.said
    assert said.startswith("layers compiled and compared in ")


def test_a_run_that_compiling_would_make_longer_is_left_as_it_is(choose: Any) -> None:
    steps = 2_767
    seen = choose("auto", num_steps=steps)
    saved = saved_seconds(5_460 * steps / 2, 12, 768)
    assert 3 < saved < SECONDS
    assert not seen.tried
    assert seen.notes == (
        f"layers are not compiled: that takes about 100 s and would save about {saved:.0f} s of this run",
    )
    # What R-Drop computes twice is saved twice.
    twice = choose("auto", num_steps=steps, copies=2).notes
    assert twice == tuple(note.replace(f"about {saved:.0f} s", f"about {2 * saved:.0f} s") for note in seen.notes)
    # Who asks for it gets it.
    assert choose("layers", num_steps=3).tried


@pytest.mark.parametrize(("wanted", "device"), [("no", CUDA), ("model", CUDA), ("auto", torch.device("cpu"))], ids=str)
def test_nothing_is_done_or_said(choose: Any, wanted: str, device: torch.device) -> None:
    seen = choose(wanted, device=device)
    assert not seen.tried
    assert not seen.said
    assert seen.notes == ()


@pytest.mark.parametrize(
    ("options", "clause"),
    [
        ({"problem": "the logits would differ"}, "the logits would differ"),
        ({"others_can": False}, "another rank cannot"),
        ({"in_the_way": "batches of this model are padded"}, "batches of this model are padded"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_speaks_against_it_is_a_note_or_an_error_on_all_ranks(
    choose: Any, options: dict[str, Any], clause: str
) -> None:
    seen = choose("auto", **options)
    assert seen.notes == (f"layers are not compiled: {clause}",)
    assert seen.left
    assert not seen.said
    with pytest.raises(ConfigError, match=f"--torch_compile layers cannot be done here: {clause}") as caught:
        choose("layers", **options)
    assert caught.value.on_all_ranks
