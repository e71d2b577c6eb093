"""Look at an example as the model gets it: `qa-dist inspect --train_file train.json --id ID`.

Shows the record, its windows and every token with its id, characters and label. docs/inspect.md explains what is
printed. Features come from the same store that training uses, and are prepared if it is not there.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qa_dist.common.command import run_command
from qa_dist.common.errors import ConfigError
from qa_dist.config.options import RunConfig, option
from qa_dist.config.parsing import parse

if TYPE_CHECKING:
    from qa_dist.data.folders import Split

PROG = "qa_dist.inspect_command"


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectConfig:
    """What is looked at."""

    split: Literal["train", "validation"] | None = option(
        None, "part of the data; auto: train, or validation where there is no other"
    )
    id: str | None = option(None, "show the example of this id, with all its windows")
    feature: int | None = option(
        None, "show the feature of this number in its split, counted from 0, and the example it is of", minimum=0
    )
    json: bool = option(False, "print one JSON object instead of text")

    def problems(self) -> Iterable[str]:
        if self.id is not None and self.feature is not None:
            yield f"--id {self.id} and --feature {self.feature} each name what to show; keep one of them"
        if self.id is None and self.feature is None:
            yield "nothing says what to show; give --id ID or --feature N"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(PROG, lambda: _inspect(sys.argv[1:] if argv is None else argv))


def _inspect(argv: Sequence[str]) -> int:
    config, options = parse(
        argv, prog=PROG, description=__doc__ or "", groups=("data", "model", "evaluation"), entry=InspectConfig
    )
    # Only now: these imports take seconds, and --help and mistakes in the options should not.
    from qa_dist.answering.terminal import Style
    from qa_dist.features.building import prepare_store
    from qa_dist.model.pretrained import load_tokenizer
    from qa_dist.reporting.example_lines import example_lines
    from qa_dist.reporting.examples import chosen_features, example_view

    split = _split(config, options)
    tokenizer = load_tokenizer(config.model)
    store = prepare_store(config, split, tokenizer=tokenizer, progress=True)
    found = {"split": split, **example_view(store, tokenizer, chosen_features(store, options.id, options.feature))}
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        style = Style.of(sys.stdout, os.environ, shutil.get_terminal_size().columns)
        sys.stdout.writelines(f"{line}\n" for line in example_lines(found, style))
    return 0


def _split(config: RunConfig, options: InspectConfig) -> "Split":
    """The split that is asked for.

    Raises:
        UserError: The source has no such split, or cannot be read.
    """
    from qa_dist.data.sources import available_splits

    splits = available_splits(config.data)
    if options.split is not None and options.split not in splits:
        raise ConfigError(
            [f"--split {options.split}: the data has {' and '.join(splits)} only; name that, or more data"]
        )
    return options.split or splits[0]


if __name__ == "__main__":
    sys.exit(main())
