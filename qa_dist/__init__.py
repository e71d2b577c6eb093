"""qa_dist: training and use of extractive question answerers, on one processor or many.

Importing this package does nothing and pulls in no heavy library: every entry point imports what it needs, and so does
a name of `__all__` when it is first looked at.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qa_dist.answering.pipeline import register_pipeline
    from qa_dist.answering.reader import Reader
    from qa_dist.answering.records import Answer
    from qa_dist.common.errors import UserError
    from qa_dist.config.options import RunConfig
    from qa_dist.config.parsing import configure
    from qa_dist.data.sources import subset
    from qa_dist.evaluation.results import Evaluation
    from qa_dist.evaluation.scoring import metric_path
    from qa_dist.reporting.inspection import inspect_example
    from qa_dist.reporting.report_file import write_report
    from qa_dist.reporting.run_folders import read_runs
    from qa_dist.training.calls import build_model, count_parameters, evaluate_model, load_data, train_model

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Evaluation",
    "Reader",
    "RunConfig",
    "UserError",
    "__version__",
    "build_model",
    "configure",
    "count_parameters",
    "evaluate_model",
    "inspect_example",
    "load_data",
    "metric_path",
    "read_runs",
    "register_pipeline",
    "subset",
    "train_model",
    "write_report",
]

_PLACES = {
    "Answer": "qa_dist.answering.records",
    "Evaluation": "qa_dist.evaluation.results",
    "Reader": "qa_dist.answering.reader",
    "RunConfig": "qa_dist.config.options",
    "UserError": "qa_dist.common.errors",
    "build_model": "qa_dist.training.calls",
    "configure": "qa_dist.config.parsing",
    "count_parameters": "qa_dist.training.calls",
    "evaluate_model": "qa_dist.training.calls",
    "inspect_example": "qa_dist.reporting.inspection",
    "load_data": "qa_dist.training.calls",
    "metric_path": "qa_dist.evaluation.scoring",
    "read_runs": "qa_dist.reporting.run_folders",
    "register_pipeline": "qa_dist.answering.pipeline",
    "subset": "qa_dist.data.sources",
    "train_model": "qa_dist.training.calls",
    "write_report": "qa_dist.reporting.report_file",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
