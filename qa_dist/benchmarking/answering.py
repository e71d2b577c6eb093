"""Questions a second, beside other readers: `python -m qa_dist.bench answering --model DIR --validation_file FILE`.

Answers the same questions of a SQuAD file with the same model in processes of their own, in turns: `reader`
(`qa_dist.Reader`), `registered` (the pipeline of `qa_dist.register_pipeline`), `loop` (a plain loop over questions)
and, where the Python of an environment with them is named, `pipeline` (of transformers 4) and `haystack` (its
TransformersExtractiveReader); `exported_float32` and `exported_int8` are `qa_dist.Reader` on what `qa-dist export`
wrote. Loading and a first few questions are not timed. Prints medians of questions per second and of processor time per
question, peak memory, EM and F1, and in how many questions an answer is another one than that of `reader`.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from qa_dist.answering.exported import ONNX_FILES
from qa_dist.benchmarking import neighbours
from qa_dist.common.errors import ConfigError, UserError
from qa_dist.common.libraries import shortened
from qa_dist.config.options import DataConfig, option
from qa_dist.config.parsing import parse
from qa_dist.config.texts import whole_number
from qa_dist.data.records import Example
from qa_dist.data.sources import load_examples
from qa_dist.evaluation.scoring import score_v1
from qa_dist.machine.environment import git_commit, hardware

OURS = "reader"
_SCRIPT = Path(__file__).with_name("answering_sides.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweringConfig:
    """What answers, and what."""

    model: str | None = option(None, "folder of a whole model, such as qa-dist merge writes", required=True)
    validation_file: str | None = option(None, "SQuAD v1.1 questions", required=True)
    exported: str | None = option(None, "folder that qa-dist export wrote of the model; none: it is left out")
    transformers_python: str | None = option(
        None, "Python of an environment with transformers 4; none: its pipeline is left out"
    )
    haystack_python: str | None = option(
        None, "Python of an environment with transformers-haystack; none: it is left out"
    )
    num_questions: int = option(500, "questions, evenly spread over the file", minimum=1)
    threads: tuple[str, ...] = option(("1",), "numbers of threads, separated by commas")
    repeats: int = option(3, "how often each side answers", minimum=1)

    def problems(self) -> Iterable[str]:
        for name in ("model", "exported"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                yield f"--{name} {folder} is not a folder; name one that holds a model"
        for name in ("transformers_python", "haystack_python"):
            python = getattr(self, name)
            if python is not None and not os.access(python, os.X_OK):
                yield f"--{name} {python} cannot be run; give the path of an interpreter, as .venv/bin/python"
        if any(whole_number(number) < 1 for number in self.threads):
            yield f"--threads {','.join(self.threads)} are not numbers of 1 or more"


def main(argv: Sequence[str], prog: str) -> int:
    """Measure, and print JSON."""
    _, options = parse(argv, prog=prog, description=__doc__ or "", groups=(), entry=AnsweringConfig)
    examples = _chosen(str(options.validation_file), options.num_questions)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        questions = Path(folder) / "questions.json"
        asked = [{"question": example.question, "context": example.context} for example in examples]
        questions.write_text(json.dumps(asked), encoding="utf-8")
        results = {threads: _measured(options, questions, threads) for threads in options.threads}
    figures = {
        "machine": hardware(),
        "commit": git_commit(),
        "num_questions": len(examples),
        "threads": {threads: _figures(found, examples) for threads, found in results.items()},
    }
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    return 0


def _chosen(path: str, count: int) -> list[Example]:
    """Questions with answers, evenly spread over a file.

    Raises:
        UserError: It cannot be read, or has none.
    """
    examples = [each for each in load_examples(DataConfig(validation_file=path), "validation")[0] if each.answers]
    if not examples:
        raise ConfigError([f"--validation_file {path} has no question with an answer; give SQuAD v1.1 questions"])
    count = min(count, len(examples))
    return [examples[place * len(examples) // count] for place in range(count)]


def _measured(options: AnsweringConfig, questions: Path, threads: str) -> dict[str, list[dict[str, Any]]]:
    """What each side gave, in turns."""
    model = str(options.model)
    sides = {OURS: (sys.executable, OURS, model), "registered": (sys.executable, "registered", model)}
    sides["loop"] = (sys.executable, "loop", model)
    if options.transformers_python:
        sides["pipeline"] = (options.transformers_python, "pipeline", model)
    if options.haystack_python:
        sides["haystack"] = (options.haystack_python, "haystack", model)
    if options.exported:
        for precision, file in ONNX_FILES.items():
            if (Path(options.exported) / file).is_file():
                name = f"exported_{precision}"
                sides[name] = (sys.executable, name, options.exported)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(1, options.repeats + 1):
        for name, (python, side, folder) in sides.items():
            words = [python, "-P", str(_SCRIPT), side, folder, str(questions), threads]
            result = neighbours.undisturbed_result(lambda words=words: _answered(words, threads))  # type: ignore[misc]
            rate = len(result["answers"]) / result["seconds"]
            noted = neighbours.in_words(result)
            sys.stderr.write(f"{threads} threads, repeat {number}: {name} {rate:.1f} questions/s{noted}\n")
            found[name].append(result)
    return found


def _answered(words: Sequence[str], threads: str) -> dict[str, Any]:
    """What a side prints.

    Raises:
        UserError: It failed.
    """
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HAYSTACK_TELEMETRY_ENABLED": "False"}
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": threads}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise UserError(
            f"{words[3]} with {words[0]} failed ({shortened(last)}); see that it runs there, or leave it out"
        )
    result: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return result


def _figures(
    found: Mapping[str, Sequence[Mapping[str, Any]]], examples: Sequence[Example]
) -> dict[str, dict[str, Any]]:
    """What is printed of each side."""
    references = {example.id: [answer.text for answer in example.answers] for example in examples}
    ours = found[OURS][0]["answers"]
    figures = {}
    for name, results in found.items():
        counted = neighbours.undisturbed(results)
        answers = results[0]["answers"]
        scores = score_v1(references, dict(zip(references, answers, strict=True)))
        figures[name] = {
            "questions_per_second": median(len(answers) / result["seconds"] for result in counted),
            # Beside other work the clock says little, and this more.
            "processor_ms_per_question": median(
                1000 * result["processor_seconds"] / len(answers) for result in counted
            ),
            "peak_memory_mib": max(result["peak_memory_mib"] for result in results),
            "exact_match": scores["exact_match"],
            "f1": scores["f1"],
            "other_answers": sum(one != other for one, other in zip(answers, ours, strict=True)),
            "num_disturbed": sum(map(neighbours.is_disturbed, results)),
            "versions": results[0]["versions"],
        }
    return figures
