"""The exceptions qa_dist raises, and who is to act on each.

A `UserError` says in one sentence what was found, what is allowed and what to do; entry points print that sentence
and exit with code 2, without a traceback. Everything else is a fault of the run or of the program and keeps its
traceback.
"""

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake the user can mend: the message is one clear sentence, shown without a traceback.

    Attributes:
        on_all_ranks: whether every rank of the run raises it with the same words; one rank of a machine then says it.
    """

    on_all_ranks = False


class ConfigError(UserError):
    """One or more problems in the configuration, reported together."""

    def __init__(self, problems: Sequence[str], *, on_all_ranks: bool = False) -> None:
        self.problems = tuple(problems)
        self.on_all_ranks = on_all_ranks
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            listed = "\n".join(f"  - {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} problems in the configuration:\n{listed}")


class DataError(UserError):
    """Input data that cannot be used as it is."""


class StoreError(UserError):
    """A prepared feature store that is damaged or does not belong to the data at hand."""


class ScoringError(UserError):
    """Predictions and references that do not belong together."""


class CheckpointError(UserError):
    """A checkpoint or adapter that is incomplete, damaged or of another run."""


class TrainingError(RuntimeError):
    """A run that must not go on: a non-finite loss, a parameter without a gradient."""


class DivergedError(TrainingError):
    """A run whose loss or gradient is no longer finite."""


class LocalTrainingError(TrainingError):
    """A run that must not go on, for a reason that this rank alone knows and has to tell."""
