"""The `qa-dist` command: every command under one name."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from qa_dist.machine.allocator import LONG_RUNNING, start_with_flat_heap


class Command(NamedTuple):
    """A module with `PROG`, its name in help and errors, and `main(argv)`, which returns the exit code.

    Attributes:
        module: The module.
        summary: What it does.
        guides: Sections of docs/ that tell more.
    """

    module: str
    summary: str
    guides: tuple[str, ...]


COMMANDS = {
    "train": Command("qa_dist.train", "trains, in one process or behind a launcher", ("training.md", "options.md")),
    "sweep": Command("qa_dist.sweep", "trains many ways side by side, and says which learns most", ("sweeps.md",)),
    "split": Command("qa_dist.split", "splits questions off a data set, by article", ("sweeps.md#split",)),
    "cloze": Command(
        "qa_dist.cloze", "makes questions of texts alone, to pre-train on", ("training.md#pre-train-on-the-texts",)
    ),
    "prepare": Command(
        "qa_dist.prepare",
        "tokenises a data set into its feature store, ahead of a job",
        ("training.md#prepared-features",),
    ),
    # A file inspect.py would stand before the module of Python where a file beside it is run by its path.
    "inspect": Command(
        "qa_dist.inspect_command",
        "shows a data set in numbers, what scores it allows, and examples token by token",
        ("inspect.md",),
    ),
    "evaluate": Command(
        "qa_dist.evaluate", "scores a trained model on a data set", ("after-training.md#evaluate-again",)
    ),
    "calibrate": Command(
        "qa_dist.calibrate",
        "fits the probabilities of a trained model, and when it answers nothing, to data",
        ("analysis.md#calibrate-a-model",),
    ),
    "predict": Command("qa_dist.predict", "answers files of questions of any size", ("predicting.md",)),
    "score": Command(
        "qa_dist.score",
        "scores a predictions file as the official SQuAD scripts do",
        ("after-training.md#score-any-predictions",),
    ),
    "analyze": Command(
        "qa_dist.analyze",
        "says how sure scores and differences are, and where answers go wrong",
        ("analysis.md",),
    ),
    "card": Command("qa_dist.card", "writes the model card of a run, with the hub's metadata", ("publishing.md",)),
    "publish": Command(
        "qa_dist.publish", "publishes a trained model on the hub, in one commit", ("publishing.md#publish",)
    ),
    "report": Command(
        "qa_dist.report",
        "writes one page about runs: options, curves, scores, slices, calibration and answers",
        ("report.md",),
    ),
    "convert": Command(
        "qa_dist.convert", "writes questions in any layout as plain SQuAD JSON", ("data.md#convert-to-squad",)
    ),
    "merge": Command("qa_dist.merge", "folds an adapter into its base model", ("after-training.md#merge-the-adapter",)),
    "average": Command(
        "qa_dist.average", "makes one model of runs with several seeds", ("after-training.md#average-several-runs",)
    ),
    "export": Command("qa_dist.export", "writes a model as ONNX, for programs without torch", ("exporting.md",)),
    "ask": Command("qa_dist.ask", "answers questions about a text, at a terminal or in a pipe", ("answering.md#ask",)),
    "serve": Command("qa_dist.serve", "answers questions over HTTP, with a page for people", ("serving.md",)),
    "estimate": Command(
        "qa_dist.estimate",
        "says what a run will take in memory, and which token budget fits",
        ("clusters.md#estimate-the-memory",),
    ),
    "doctor": Command(
        "qa_dist.doctor",
        "looks at this machine: devices, versions, network, disks, limits",
        ("clusters.md#look-before-a-long-run",),
    ),
    # qa_dist/recipes is the folder of the recipes themselves.
    "recipes": Command(
        "qa_dist.recipe_command",
        "lists, shows, copies and checks recipes, launcher configurations and scripts",
        ("training.md#recipes",),
    ),
    "bench": Command("qa_dist.bench", "measures speed and memory beside transformers' Trainer", ("benchmarks.md",)),
}
"""Every command by name: `--help`, README's table, the options in docs/ and a test of the floor plan follow from it."""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None and words and f"qa_dist.{words[0]}" in LONG_RUNNING:
        start_with_flat_heap(os.environ, sys.orig_argv)
    if words and words[0] in COMMANDS:
        code: int = importlib.import_module(COMMANDS[words[0]].module).main(words[1:])
        return code
    if not words or words[0] in ("-h", "--help"):
        listing = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
        sys.stdout.write(
            f"usage: qa-dist COMMAND [options]\n\n{listing}\n\nqa-dist COMMAND --help lists the options of a command.\n"
        )
        return 0
    sys.stderr.write(f"qa-dist: error: {words[0]!r} is no command; use one of {', '.join(COMMANDS)}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
