"""calibration.json in a model's folder: what makes its probabilities and its silence trustworthy, and on what data.

It is written by the end of a training run and by `qa-dist calibrate`, and goes wherever the model goes. Neither torch
nor numpy is imported.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from qa_dist.common.errors import CheckpointError
from qa_dist.common.files import write_json
from qa_dist.common.reading import read_json_object

FILE = "calibration.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was tuned for a model, after its training.

    Attributes:
        temperature: scores are divided by it before the softmax that gives probabilities; above 0.
        null_score_diff_threshold: null odds above which there is no answer; None: as the run's options say.
        answer_normalization: whose rules said which answers are right.
        tuned_on: the data: `data` (a name), `fingerprint` (of its feature store), `part` ("all" or "half"), and counts.
        reported_on: the same of the data of the report: that which it was tuned on, or the other half of its contexts.
        report: errors of calibration and scores, before and after, in percent. `calibration` has `not_kept` where the
            temperature is 1 because the fitted one did not lower the error of the data that it was fitted on, or was
            the last that is tried (`is_at_end`), and `null_threshold` has `is_chosen` where none was tuned because the
            run had one of its own.
    """

    temperature: float
    null_score_diff_threshold: float | None
    answer_normalization: str
    tuned_on: Mapping[str, Any]
    reported_on: Mapping[str, Any]
    report: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """As the file has it."""
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    def write(self, folder: Path) -> Path:
        """Write the file into a model's folder; returns its path."""
        write_json(folder / FILE, self.as_dict())
        return folder / FILE

    @property
    def origin(self) -> str:
        """What it was tuned on, for people."""
        count, name = self.tuned_on.get("num_questions"), self.tuned_on.get("data")
        number = f"{count:,} " if isinstance(count, int) else ""
        if self.tuned_on.get("part") == "half":
            return f"the {number}questions about one half of the contexts of {name}"
        # Perhaps not all of them (--max_eval_samples, answers that are not known).
        return f"{number}questions of {name}"

    def lines(self) -> Iterator[str]:
        """What it is and what it brings, for people."""
        part = self.reported_on.get("part")
        where = "on the same questions, which flatters" if part == "all" else "on the other half"
        found = self.report["calibration"]
        before, after = (f"{found[when]['ece']:.2f}" for when in ("before", "after"))
        if "not_kept" in found:
            without, fitted = (f"{found['not_kept'][when]:.2f}" for when in ("before", "after"))
            why = "does not lower their expected calibration error, which is"
            if found["not_kept"].get("is_at_end"):
                why = "is the last of those that are tried and no fit; their expected calibration error is"
            yield (
                f"no temperature is kept: the one fitted on {self.origin}, {found['not_kept']['temperature']:.3f}, "
                f"{why} {without} without and {fitted} with it"
                + ("" if part == "all" else f"; {before} {where} without it")
            )
        else:
            yield (
                f"temperature {self.temperature:.3f}, fitted on {self.origin}: expected calibration error {before} "
                f"before, {after} after, {where}"
            )
        found = self.report["null_threshold"]
        if found is None:
            return
        before, after = (f"{found[when]['f1']:.2f}" for when in ("before", "after"))
        if self.null_score_diff_threshold is not None:
            yield (
                f"null threshold {self.null_score_diff_threshold:.6g}, tuned on {self.origin}: F1 {after} {where}, "
                f"{before} with a threshold of {found['before']['threshold']:g}"
            )
        elif found["before"]["threshold"] == 0 and not found.get("is_chosen"):
            yield "no null threshold is kept: none is better than never to answer"


def read_calibration(folder: str | Path) -> Calibration | None:
    """The calibration of the model in a folder; None where there is none.

    Raises:
        UserError: It cannot be read or used, or is of another version.
    """
    path = Path(folder) / FILE
    # Not Path.is_file, which raises for a name that no file can have.
    if not os.path.isfile(path):
        return None
    value = dict(read_json_object(path))
    version = value.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version} but this program reads {FORMAT_VERSION}; remove it, or write it anew with "
            "qa-dist calibrate"
        )
    temperature, threshold = value.get("temperature"), value.get("null_score_diff_threshold")
    parts = [value.get(name) for name in ("tuned_on", "reported_on", "report")]
    is_damaged = (
        set(value) != {item.name for item in dataclasses.fields(Calibration)}
        or not (_is_number(temperature) and temperature > 0)
        or not (threshold is None or _is_number(threshold))
        or not all(isinstance(part, dict) for part in parts)
        or not isinstance(value["answer_normalization"], str)
    )
    try:
        found = None if is_damaged else Calibration(**value)
        # What it says is shown in several places, none of which should meet a number that is none.
        is_damaged = found is None or not list(found.lines())
    except (KeyError, TypeError, ValueError):
        found = None
    if found is None or is_damaged:
        raise CheckpointError(
            f"{path} is not as it was written (temperature {temperature}, threshold {threshold}); remove it, or write "
            "it anew with qa-dist calibrate"
        )
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
