"""Look at data as the model gets it: `qa-dist inspect --train_file train.json [--id ID]`.

Shows counts, lengths in tokens, and the best scores that any model could reach; with --id or --feature one example: its
record, its windows and every token with its id, characters and label. docs/inspect.md explains what is printed.
Features come from the same store that training uses, and are prepared if it is not there.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qa_dist.common.command import run_command
from qa_dist.common.errors import ConfigError
from qa_dist.config.given import peek, refuse_trained_options, require_named
from qa_dist.config.options import RunConfig, option
from qa_dist.config.parsing import parse
from qa_dist.model.folder import adapter_problems, as_tuned, base_options, for_data_of, load_tokenizer_of
from qa_dist.model.pretrained import load_tokenizer

if TYPE_CHECKING:
    from qa_dist.answering.terminal import Style
    from qa_dist.data.folders import Split
    from qa_dist.features.store import FeatureStore

PROG = "qa_dist.inspect_command"


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectConfig:
    """What is looked at."""

    split: Literal["train", "validation"] | None = option(
        None, "part of the data; auto: train, or validation where there is no other"
    )
    id: str | None = option(None, "show the example of this id, with all its windows; none: the data set")
    feature: int | None = option(
        None, "show the feature of this number in its split, counted from 0, and the example it is of", minimum=0
    )
    adapter: str | None = option(
        None,
        "folder of a trained adapter or model: show its start and end logits of each token, and its best answers, with "
        "--id or --feature",
    )
    suggest: bool = option(
        False,
        "list other values of --max_seq_length and --doc_stride with the windows and tokens of an epoch and the best "
        "scores that any model could reach, instead of describing the data set",
    )
    json: bool = option(False, "print one JSON object instead of text")
    html: str | None = option(
        None, "write the description of the data set as an HTML page into this file instead; none: print it"
    )

    def problems(self) -> Iterable[str]:
        yield from adapter_problems(self.adapter)

    def contradictions(self, example_id: str | None) -> Iterable[str]:
        """What of these options does not go together, given the word behind `--id`: an example may be called none."""
        if example_id is not None and self.feature is not None:
            yield f"--id {example_id} and --feature {self.feature} each name what to show; keep one of them"
        is_one = example_id is not None or self.feature is not None
        if self.adapter is not None and not is_one:
            yield f"--adapter {self.adapter} says something of one example; name it with --id or --feature"
        if self.html is not None and (is_one or self.suggest or self.json):
            other = "--json" if self.json else "--suggest" if self.suggest else "--id or --feature"
            yield f"--html {self.html} is a page about the data set, without {other}; keep one of them"
        if self.suggest and is_one:
            yield "--suggest is about all examples, and --id and --feature name one; keep one of them"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(PROG, lambda: _inspect(sys.argv[1:] if argv is None else argv))


def _inspect(argv: Sequence[str]) -> int:
    config, options = parse(
        argv,
        prog=PROG,
        description=__doc__ or "",
        groups=("data", "model", "evaluation"),
        entry=InspectConfig,
        base=for_data_of(base_options(peek(argv, "adapter")), argv),
    )
    require_named(options.adapter, argv, "adapter")
    if options.adapter is not None:
        refuse_trained_options(argv)
        config = as_tuned(config, options.adapter)
    example_id = peek(argv, "id") or options.id
    if problems := list(options.contradictions(example_id)):
        raise ConfigError(problems)
    # Imported here, as these take seconds: --help and mistakes in the options do not wait for them.
    from qa_dist.answering.terminal import Style
    from qa_dist.evaluation.normalization import normalization
    from qa_dist.features.building import prepare_store

    normalization(config.evaluation.answer_normalization)
    page = _page(options.html)
    split = _split(config, options)
    tokenizer, notes = _tokenizer(config, options)
    sys.stderr.writelines(f"{PROG}: note: {note}\n" for note in notes)
    store = prepare_store(config, split, tokenizer=tokenizer, progress=True)
    style = Style.of(sys.stdout, os.environ, shutil.get_terminal_size().columns)
    found, lines = _view(config, options, store, tokenizer, style, example_id)
    if page is not None:
        lines = _written_page(found, config, split, page)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines)
    return 0


def _view(
    config: RunConfig,
    options: InspectConfig,
    store: "FeatureStore",
    tokenizer: Any,
    style: "Style",
    example_id: str | None,
) -> tuple[dict[str, Any], Iterable[str]]:
    """What was asked for - suggestions, the data set, or an example - as JSON holds it and as lines of text."""
    split = _split(config, options)
    if options.suggest:
        from qa_dist.reporting.suggestions import suggestion_lines, suggestions

        found = {"split": split, "suggestions": suggestions(store, tokenizer, config)}
        return found, suggestion_lines(found, style)
    if example_id is None and options.feature is None:
        from qa_dist.reporting.data_set import data_set_view
        from qa_dist.reporting.data_set_lines import data_set_lines

        found = {"split": split, **data_set_view(store, tokenizer, config)}
        return found, data_set_lines(found, style)
    from qa_dist.reporting.example_lines import example_lines
    from qa_dist.reporting.examples import chosen_features, example_view

    features = chosen_features(store, example_id, options.feature)
    found = {"split": split, **example_view(store, tokenizer, features)}
    if options.adapter is not None:
        from qa_dist.reporting.example_logits import add_answers

        add_answers(found, store, config, options.adapter, tokenizer)
    return found, example_lines(found, style)


def _written_page(found: Mapping[str, Any], config: RunConfig, split: "Split", path: Path) -> Iterator[str]:
    """Write a data set's page; what is to be printed of that."""
    from qa_dist.reporting.data_set_page import data_set_page
    from qa_dist.reporting.pages import write_page

    data = config.data
    file = data.train_file if split == "train" else data.validation_file
    name = os.path.basename(os.path.normpath(file)) if file else data.source
    write_page(data_set_page({**found, "source": name}), path, "--html")
    return iter([str(path)])


def _tokenizer(config: RunConfig, options: InspectConfig) -> tuple[Any, Sequence[str]]:
    """The tokenizer of the features, and what the user should know of it."""
    if options.adapter is None:
        return load_tokenizer(config.model), ()
    return load_tokenizer_of(options.adapter, config.model)


def _page(html: str | None) -> Path | None:
    """The file of `--html`, if there will be one and it can be written."""
    if html is None:
        return None
    from qa_dist.reporting.drawings import require_matplotlib
    from qa_dist.reporting.pages import require_page

    page = Path(os.path.expanduser(html))
    require_matplotlib("a page")
    require_page(page, "--html")
    return page


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
