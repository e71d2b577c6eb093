"""What is trained: it must be all that is new, and must get gradients."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qa_dist.common.errors import ConfigError, TrainingError
from qa_dist.common.notebook import ShownAsText
from qa_dist.model.precision import Precision
from qa_dist.model.span_model import (
    SpanModel,
    count_parameters,
    head_parameters,
    transformers_model,
)


@dataclass(frozen=True, slots=True)
class ParameterReport(ShownAsText):
    """What is trained of a model, and what full fine-tuning would train."""

    trainable: int
    total: int
    before: int
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    def __repr__(self) -> str:
        return f"ParameterReport(trainable={self.trainable}, total={self.total}, before={self.before})"

    def __str__(self) -> str:
        return "\n".join(self.lines(structure=False))

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


def check_vocabulary(model: SpanModel, largest_token_id: int) -> None:
    """Refuse features with token ids that the model has no embedding for.

    Raises:
        ConfigError: The features were made by the tokenizer of another model.
    """
    size = int(transformers_model(model.model).get_input_embeddings().weight.shape[0])
    if largest_token_id >= size:
        raise ConfigError(
            [
                f"the tokenizer gives token ids up to {largest_token_id} but the model has {size} embeddings; "
                "leave --tokenizer_name out, or name the tokenizer of this model"
            ]
        )


def check_trainable(model: SpanModel, newly_initialized: Sequence[str]) -> None:
    """Refuse a model in which a newly initialised parameter would stay as random as it is.

    Args:
        model: The model, with its adapters.
        newly_initialized: Names, in the transformers model, of parameters that its checkpoint does not have.

    Raises:
        ConfigError: One of them is not trained.
    """
    trained = {name for name, _ in model.trainable()}
    frozen = [name for name in newly_initialized if not any(_same_parameter(name, candidate) for candidate in trained)]
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


def least_weight(mixed_precision: Precision, lr_multipliers: Mapping[str, float]) -> float:
    """The sum of learning rates from which on weights that began at zero are none in products of a precision.

    Float16 rounds what is below 2^-25 to zero (IEEE 754 binary16, whose least number is 2^-24); eight times as much is
    asked for, since not every update of Adam's is a whole learning rate. Layers may learn slower by a factor.
    """
    return 2.0**-22 / min([1.0, *lr_multipliers.values()]) if mixed_precision == "fp16" else 0.0


class GradientCheck:
    """Makes sure that every adapter and head tensor has had a non-zero gradient by the second update.

    Before the first update LoRA's A matrices have none, because B starts at zero (Hu et al. 2022, section 4.1). The
    biases of the logits never have one, see `SpanModel.shift_invariant_biases`.

    Products of float16 take B for zero for longer, if the warm-up is: after an update of Adam's it is as large as the
    learning rate.
    """

    def __init__(self, model: SpanModel, *, least_weight: float = 0.0) -> None:
        """Look at a model that has had no update.

        Args:
            model: The model with its adapters.
            least_weight: How large B must be for A to have a gradient; `least_weight` of its precision.
        """
        heads, never = set(head_parameters(model)), model.shift_invariant_biases()
        self._pending = [
            name for name, _ in model.trainable() if ("lora_" in name or name in heads) and name not in never
        ]
        self._without = self._pending
        self._num_updates = 0
        self._least_weight = least_weight
        self._moved = 0.0

    def observe(self, have_gradients: Callable[[Sequence[str]], Sequence[bool]]) -> None:
        """Look at the gradients of a step, before the optimiser clears them.

        Args:
            have_gradients: Whether the gradients of parameters, by name, are there and not zero.
        """
        if self._pending:
            found = have_gradients(self._pending)
            self._without = [name for name, is_there in zip(self._pending, found, strict=True) if not is_there]

    def updated(self, learning_rate: float) -> None:
        """The step that was observed has updated the weights, which one that overflows in float16 does not.

        Args:
            learning_rate: That of the step.

        Raises:
            TrainingError: It was the second one or a later one, B had become large enough before it, and a tensor never
                had a gradient; the message names it.
        """
        self._pending = self._without
        # What was observed is of the weights before this update.
        was_large_enough = self._num_updates > 0 and self._moved >= self._least_weight
        self._num_updates += 1
        self._moved += learning_rate
        if was_large_enough and self._pending:
            raise TrainingError(
                f"no gradient has reached {', '.join(self._pending[:5])} in {self._num_updates} steps: "
                f"{len(self._pending)} tensors would never be trained"
            )
