"""Every option of a run: what it means, which values it may have, and which of them contradict each other.

Options live in four frozen dataclasses, a file each, which also print `--help` and the tables of the documentation.
`problems` of a group yields one sentence for each contradiction between its options, that of the run for those between
groups; `option` holds the range of one. `parsing` reads flags and a recipe into them.

This room imports neither torch nor transformers, so that `--help` and mistakes answer at once.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qa_dist.common.notebook import ShownAsText
from qa_dist.config.data_options import DataConfig
from qa_dist.config.evaluation_options import EvaluationConfig
from qa_dist.config.model_options import ModelConfig
from qa_dist.config.option import option
from qa_dist.config.training_options import TrainingConfig

__all__ = [
    "GROUPS",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "RunConfig",
    "TrainingConfig",
    "defaults",
    "option",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(ShownAsText):
    """The options of one run, in four groups; `configure` makes it from a recipe and single options."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    def __repr__(self) -> str:
        # The call of `qa_dist.configure` that gives it.
        return f"configure({', '.join(f'{name}={value!r}' for name, value in self._chosen().items())})"

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self._chosen().items())

    def _chosen(self) -> dict[str, Any]:
        """The options that are not as their defaults."""
        usual = RunConfig().flat()
        return {name: value for name, value in self.flat().items() if value != usual[name]}

    def problems(self) -> Iterable[str]:
        model, training = self.model, self.training
        if model.quantization != "no" and training.residual_dtype == "bf16":
            yield (
                f"--residual_dtype bf16 rounds what norms give and --quantization {model.quantization} leaves them "
                "in float32; drop one"
            )
        if model.padding not in ("auto", "unpadded") and training.residual_dtype == "bf16":
            yield (
                f"--residual_dtype bf16 is for rows without padding and --padding is {model.padding}; drop one of them"
            )

    def flat(self) -> dict[str, Any]:
        """All options under their flag names, as plain YAML and JSON types."""
        merged: dict[str, Any] = {}
        for group in dataclasses.fields(self):
            for name, value in dataclasses.asdict(getattr(self, group.name)).items():
                merged[name] = list(value) if isinstance(value, tuple) else value
        return merged

    def fixed(self) -> dict[str, Any]:
        """The options that decide what each step computes, by flag name: a resumed run must repeat them."""
        names = {item.name for group in GROUPS.values() for item in dataclasses.fields(group) if item.metadata["fixed"]}
        return {name: value for name, value in self.flat().items() if name in names}


GROUPS: dict[str, type[Any]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
}


def defaults(group: type[Any]) -> dict[str, Any]:
    """Default of each option of a group."""
    return {item.name: item.default for item in dataclasses.fields(group)}


def usual_stride(max_seq_length: int) -> int:
    """The stride for a model that comes without one: the default, or half a window where that is less."""
    stride: int = defaults(DataConfig)["doc_stride"]
    return min(stride, max_seq_length // 2)
