"""From the name of a model to what computes it, and to the settings that it was trained and evaluated with."""

import dataclasses
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qa_dist.answering.backend import Backend
from qa_dist.answering.exported import ExportPrecision, is_exported
from qa_dist.common.errors import ConfigError
from qa_dist.config.options import RunConfig, usual_stride
from qa_dist.config.parsing import parse
from qa_dist.machine.requirements import require_package
from qa_dist.model.calibration import read_calibration
from qa_dist.model.folder import load_tokenizer_of, options_of_run, was_evaluated_without_answers
from qa_dist.model.hub import local_copy

if TYPE_CHECKING:
    from qa_dist.model.precision import Precision

PYTHON_NAMES = {"eval_tokens_per_device": "tokens_per_batch"}
"""What a reader calls an option, where that is not the option's name."""


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model that is ready to answer.

    Attributes:
        backend: what computes it.
        config: the configuration of the run that trained it, with what the caller wants otherwise; the defaults where
            it was trained elsewhere.
        allows_no_answer: whether "no answer" was a choice in the run's evaluation.
        temperature: what scores are divided by before the softmax of probabilities, as it was fitted for the model.
    """

    backend: Backend
    config: RunConfig
    allows_no_answer: bool
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """How an exported model runs.

    Attributes:
        quantized: whether the file with weights of 8 bits computes; None: if there is one.
        num_threads: threads that compute; None: as many as OMP_NUM_THREADS says, else one for each core.

    Raises:
        ConfigError: One of them is of another kind.
    """

    quantized: bool | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        threads = self.num_threads
        if not isinstance(self.quantized, bool | None):
            raise ConfigError([f"quantized is {self.quantized!r}; give True, False or None"])
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ConfigError([f"num_threads is {threads!r}; give a whole number of 1 or more, or None"])


def open_model(
    name: str,
    *,
    device: str | None,
    mixed_precision: str | None,
    options: Mapping[str, Any],
    onnx: OnnxOptions = OnnxOptions(),
) -> OpenModel:
    """The model in a folder, of a package or on the hub, loaded.

    Args:
        name: Folder of an adapter, a whole or an exported model, package:NAME/FOLDER, or hub id.
        device: Where it computes; None: on the first GPU where there is one, else on the CPU.
        mixed_precision: Of matrix products; None: on a GPU that of the run, on a CPU float32.
        options: Options of the run that are to have other values, by their flag names; None stands for no change.
        onnx: How an exported model runs.

    Raises:
        UserError: There is no such model, or an option does not fit it.
    """
    name = local_copy(name)
    given = {option: value for option, value in options.items() if value is not None}
    if is_exported(name):
        return _opened_in_onnxruntime(name, given, device, mixed_precision, onnx)
    if asked := [option for option, value in dataclasses.asdict(onnx).items() if value is not None]:
        raise ConfigError([f"{' and '.join(asked)} can be set for an exported model only, and {name} is none"])
    require_package("torch", f"the model {name}, which is not exported,")
    config = configuration_of(name, given)
    return _opened_in_torch(name, fitted(name, config, given), device, mixed_precision)


def configuration_of(name: str, given: Mapping[str, Any]) -> RunConfig:
    """The configuration of the run that made a model, with what the caller gives instead.

    Raises:
        UserError: There is nothing under that name, it is no model, or an option does not fit.
    """
    return _configuration(options_of_run(name), given)


def _configuration(base: Mapping[str, Any], given: Mapping[str, Any]) -> RunConfig:
    words = [f"--{name}={value}" for name, value in given.items()]
    groups = ("data", "model", "evaluation")
    return parse(words, prog="Reader", description="", groups=groups, entry=None, base=base)[0]


def fitted(name: str, config: RunConfig, given: Collection[str]) -> RunConfig:
    """The configuration for the model of this name, with what the model itself decides.

    Args:
        name: Folder, package:NAME/FOLDER, or hub id.
        config: The configuration of its run, or the defaults.
        given: Names of the options that somebody set on purpose.
    """
    model = config.model
    if model.tuning == "full" and model.tokenizer_name is None and os.path.isdir(name):
        # A whole model needs no other folder.
        config = dataclasses.replace(config, model=dataclasses.replace(model, model_name_or_path=name))
    if not _is_run(name):
        config = dataclasses.replace(config, data=_lengths_that_fit(config, given))
    return config


def allows_no_answer(name: str, config: RunConfig) -> bool:
    """Whether "no answer" was a choice in the evaluation of the run that made the model of this name."""
    allows = config.data.version_2_with_negative
    return _is_run(name) and was_evaluated_without_answers(name) if allows is None else allows


def _temperature(name: str) -> float:
    """The temperature that was fitted for the model in a folder; 1 where none was."""
    found = read_calibration(name)
    return 1.0 if found is None else found.temperature


def _is_run(name: str) -> bool:
    return os.path.isfile(os.path.join(name, "config.yaml"))


def _opened_in_torch(name: str, config: RunConfig, device_name: str | None, mixed_precision: str | None) -> OpenModel:
    from qa_dist.answering.torch_backend import TorchBackend, chosen_device
    from qa_dist.features.tokenizer import TokenizerSpec
    from qa_dist.model.saved import load_as_trained

    device = chosen_device(device_name)
    tokenizer, notes = load_tokenizer_of(name, config.model)
    span_model = load_as_trained(config, name, tokenizer, device, fold=True)
    backend = TorchBackend(
        span_model,
        TokenizerSpec.of(tokenizer),
        device,
        mixed_precision=_precision(config, device.type, mixed_precision),
        notes=(*notes, *span_model.notes),
    )
    return OpenModel(backend, config, allows_no_answer(name, config), _temperature(name))


def _opened_in_onnxruntime(
    name: str, given: Mapping[str, Any], device: str | None, mixed_precision: str | None, onnx: OnnxOptions
) -> OpenModel:
    from qa_dist.answering.onnx_backend import OnnxBackend

    if device not in (None, "cpu"):
        raise ConfigError(
            [
                f"the device is {device}, but an exported model runs on the CPU; name that one, or hide the GPUs with "
                "CUDA_VISIBLE_DEVICES="
            ]
        )
    if mixed_precision not in (None, "no"):
        raise ConfigError(
            [f"mixed_precision is {mixed_precision}, but an exported model has a precision of its own; leave it out"]
        )
    precision: ExportPrecision | None = None
    if onnx.quantized is not None:
        precision = "int8" if onnx.quantized else "float32"
    backend = OnnxBackend(name, precision=precision, num_threads=onnx.num_threads)
    config = _configuration(backend.exported.options, given)
    longest = backend.exported.longest_feature
    if longest is not None and config.data.max_seq_length > longest:
        raise ConfigError(
            [f"--max_seq_length {config.data.max_seq_length} is more than the {longest} positions of {name}; lower it"]
        )
    return OpenModel(backend, config, bool(config.data.version_2_with_negative), _temperature(name))


def _lengths_that_fit(config: RunConfig, given: Collection[str]) -> Any:
    """The lengths for a model that comes without any: the usual ones, or less where it has fewer positions."""
    from qa_dist.model.building import longest_feature
    from qa_dist.model.pretrained import model_configuration

    data = config.data
    longest = longest_feature(model_configuration(config.model))
    if "max_seq_length" not in given and longest is not None:
        data = dataclasses.replace(data, max_seq_length=min(data.max_seq_length, longest))
    if "doc_stride" not in given:
        data = dataclasses.replace(data, doc_stride=usual_stride(data.max_seq_length))
    return data


def _precision(config: RunConfig, device_type: str, wanted: str | None) -> "Precision":
    """The precision of matrix products: as wanted, else as in training where the device is made for it.

    Raises:
        ConfigError: There is no such precision.
    """
    if wanted is None:
        return "no" if device_type == "cpu" else config.training.mixed_precision
    for known in ("no", "bf16", "fp16"):
        if wanted == known:
            return known
    raise ConfigError([f"mixed_precision {wanted!r} is none of no, bf16, fp16"])
