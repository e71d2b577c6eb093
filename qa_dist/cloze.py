"""Make questions of the texts of a data set, to train on before its own questions: `qa-dist cloze IN OUT`.

Standard output has the counts as JSON.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from qa_dist.common import command
from qa_dist.common.errors import ConfigError, DataError
from qa_dist.data.squad_files import new_squad_file, write_squad

PROG = "qa_dist.cloze"


def build_parser() -> argparse.ArgumentParser:
    """The flags of this entry point."""
    parser = command.Parser(
        prog=PROG,
        description="Make questions of English texts, of a data set or a .txt file: a sentence with a gap asks for "
        "what stood in it. Questions and answers of a data set are checked and not used. The output is SQuAD JSON.",
        allow_abbrev=False,
    )
    count, seed = command.whole_number(1, 10**9), command.whole_number(0, 2**63 - 1)
    parser.add_argument(
        "input",
        metavar="IN",
        help="a file or folder of questions, in any layout that training reads, or a .txt or .txt.gz file with empty "
        "lines between its texts, or a folder of such files",
    )
    parser.add_argument("output", metavar="OUT", help="the file to write, compressed if it ends in .gz; must not exist")
    parser.add_argument(
        "--per_context", type=count, default=3, help="how many questions are made of a text (default: 3)"
    )
    parser.add_argument("--seed", type=seed, default=42, help="what they are drawn with (default: 42)")
    parser.add_argument(
        "--max_train_samples", type=count, help="take the texts of so many questions, as training with this option does"
    )
    parser.add_argument(
        "--subset_seed",
        type=seed,
        help="what the questions of --max_train_samples are drawn with; none: the first ones",
    )
    parser.add_argument(
        "--on_invalid",
        choices=("error", "drop"),
        help="what to do with records that fail validation (default: error)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command.run_command(PROG, lambda: _cloze(build_parser().parse_args(argv)))


def _cloze(options: argparse.Namespace) -> int:
    output = new_squad_file(options.output)
    if options.subset_seed is not None and options.max_train_samples is None:
        raise ConfigError(["--subset_seed draws a subset but --max_train_samples asks for none; add or drop it"])
    # Imported here, so that --help and mistakes in the options do not wait for it.
    from qa_dist.data.cloze import cloze_examples

    titles = _titles(options)
    made = cloze_examples(titles, options.per_context, seed=options.seed)
    if not made:
        raise DataError(
            f"{options.input}: no sentence of its texts has five words and a number, a name or a phrase to ask for, as "
            "English sentences have; name English texts"
        )
    write_squad(made, output, version_2=False)
    counts = {
        "output": str(output),
        "num_contexts": len(titles),
        "num_questions": len(made),
    }
    sys.stdout.write(json.dumps(counts, indent=2) + "\n")
    return 0


def _is_text(path: str) -> bool:
    return path.lower().removesuffix(".gz").endswith(".txt") and os.path.isfile(path)


def _titles(options: argparse.Namespace) -> dict[str, str]:
    """The title of each text of the input, by the text.

    Raises:
        UserError: The input cannot be used.
    """
    from qa_dist.config.options import DataConfig
    from qa_dist.data.cloze import read_texts
    from qa_dist.data.sources import load_examples

    path = os.path.expanduser(options.input)
    inside = [path]
    if os.path.isdir(path):
        # Hidden files are the system's or an editor's.
        inside = sorted(os.path.join(path, name) for name in os.listdir(path) if not name.startswith("."))
    if texts := [each for each in inside if _is_text(each)]:
        if others := [each for each in inside if each not in texts]:
            raise ConfigError([f"{path} holds texts and {others[0]}; keep .txt files in a folder of their own"])
        for flag in ("max_train_samples", "on_invalid"):
            if getattr(options, flag) is not None:
                raise ConfigError([f"--{flag} is about questions and a .txt file has none; drop it"])
        return _first_titles(pair for each in texts for pair in read_texts(Path(each)).items())
    data = DataConfig(
        train_file=path,
        max_train_samples=options.max_train_samples,
        subset_seed=options.subset_seed,
        on_invalid=options.on_invalid or "error",
    )
    return _first_titles((example.context, example.title) for example in load_examples(data, "train")[0])


def _first_titles(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The first title of each text, of pairs of a text and a title."""
    titles: dict[str, str] = {}
    for text, title in pairs:
        titles.setdefault(text, title)
    return titles


if __name__ == "__main__":
    sys.exit(main())
