"""The page about runs in a file: what `qa-dist report` does, as a call."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qa_dist.common.errors import ConfigError
from qa_dist.common.notebook import ShownAsText
from qa_dist.reporting.analysis import FEWEST_RESAMPLES, Resampling
from qa_dist.reporting.drawings import require_matplotlib
from qa_dist.reporting.pages import require_page, straight, write_page
from qa_dist.reporting.report_page import page
from qa_dist.reporting.report_scores import scored
from qa_dist.reporting.run_folders import read_runs


@dataclass(frozen=True, slots=True)
class WrittenReport(ShownAsText):
    """A page that was written.

    Attributes:
        path: the file.
        notes: what is missing in it, in sentences.
    """

    path: Path
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join((str(self.path), *(f"note: {note}" for note in self.notes)))


def write_report(
    runs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    output: str | os.PathLike[str] = "report.html",
    *,
    references: str | os.PathLike[str] | None = None,
    answer_normalization: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> WrittenReport:
    """Write one HTML page about runs: what was run, curves, scores with 95 % intervals, slices and answers.

    Args:
        runs: Output folders of runs, also of one that still goes on or was killed; several are compared.
        output: The page, which appears whole and replaces one of that name.
        references: The questions that were answered; None: the validation data that the config.yaml of a run names.
        answer_normalization: Whose rules say which answers are the same; None: those of the runs, else squad's.
        resamples: Resamples of each interval and p-value.
        seed: Of the resamples, and of the questions that are shown by chance.

    Raises:
        UserError: No run is named or a folder is none, a number is out of range, the questions cannot be used, or the
            page cannot be written.
    """
    output = Path(os.path.expanduser(output))
    if not isinstance(runs, (str, os.PathLike)) and not runs:
        raise ConfigError(["runs is empty; name the output folders of one run or of several"])
    for name, value, least in (("resamples", resamples, FEWEST_RESAMPLES), ("seed", seed, 0)):
        if value < least:
            raise ConfigError([f"{name} {value} is out of range; it must be at least {least}"])
    require_matplotlib()
    require_page(output, "--output")
    read = read_runs(runs)
    asked = None if references is None else os.fspath(references)
    found = scored(read, asked, answer_normalization, Resampling(resamples, seed))
    text = page(read, found)
    write_page(text, output, "--output")
    notes = (*(f"{run.name}: {note}" for run in read for note in run.notes), *found.notes)
    return WrittenReport(output, tuple(map(straight, notes)))
