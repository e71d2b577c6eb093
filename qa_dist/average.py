"""Make one model of several runs by averaging their weights: `qa-dist average MODEL MODEL ... --output_dir DIR`.

The result is a plain transformers checkpoint that needs neither peft nor qa_dist. Standard output has how far apart the
models were, as JSON.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from qa_dist.common import command
from qa_dist.common.errors import CheckpointError, ConfigError
from qa_dist.common.files import require_writable, staged

PROG = "qa_dist.average"


def build_parser() -> argparse.ArgumentParser:
    """The flags of this entry point."""
    parser = command.Parser(
        prog=PROG,
        description="Make one model of several that were trained from the same base model, as runs with other seeds "
        "are: the mean of their weights, with the tokenizer and the options of the first.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        type=os.path.expanduser,
        help="a folder of an adapter, a merged or a whole model; two or more",
    )
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        required=True,
        type=os.path.expanduser,
        help="folder for the model; it must not exist yet",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command.run_command(PROG, lambda: _average(build_parser().parse_args(argv)))


def _average(options: argparse.Namespace) -> int:
    folder = Path(options.output_dir)
    if problems := list(_problems(options.models, folder)):
        raise ConfigError(problems)
    require_writable(folder.absolute().parent, "the folder of --output_dir")
    # Libraries greet on standard output, which belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        from qa_dist.answering.opening import configuration_of, fitted
        from qa_dist.model.averaging import Trained, average, option_notes

        def notice(text: str) -> None:
            sys.stderr.write(f"{PROG}: note: {text}\n")

        models = [Trained(name, fitted(name, configuration_of(name, {}), ())) for name in options.models]
        mean = average(models, notice)
        for note in option_notes(models):
            notice(note)
        # Only now, so that models that have no mean leave no folder.
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with staged(folder) as aside:
                aside.mkdir()
                mean.write(aside)
        except OSError as error:
            raise CheckpointError(f"--output_dir {folder} cannot be written: {error.strerror or error}") from error
    found = {"output_dir": str(folder), "num_models": len(models), "spread": mean.spread}
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return 0


def _problems(models: Sequence[str], output_dir: Path) -> Iterator[str]:
    if len(models) < 2:
        yield f"{models[0]} is the only model; name two or more"
    seen: dict[str, str] = {}
    for name in models:
        if not os.path.isdir(name):
            yield f"{name} is not a folder; name those of trained models"
        elif (first := seen.setdefault(os.path.realpath(name), name)) is not name:
            yield f"{first} and {name} are one folder; name each model once"
    if os.path.lexists(output_dir):
        yield f"--output_dir {output_dir} exists already; name a folder that does not"


if __name__ == "__main__":
    sys.exit(main())
