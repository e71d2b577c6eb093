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

__version__ = "0.1.0"

__all__ = ["Answer", "Reader", "__version__", "register_pipeline"]

_PLACES = {
    "Answer": "qa_dist.answering.records",
    "Reader": "qa_dist.answering.reader",
    "register_pipeline": "qa_dist.answering.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
