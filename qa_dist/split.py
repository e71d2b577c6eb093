"""Split questions off a data set, by article: `qa-dist split IN --rest REST --off OFF`.

No article is on both sides. Standard output has the counts as JSON.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from qa_dist.common import command
from qa_dist.common.errors import ConfigError, DataError
from qa_dist.data.squad_files import new_squad_file, write_squad_parts

PROG = "qa_dist.split"


def build_parser() -> argparse.ArgumentParser:
    """The flags of this entry point."""
    parser = command.Parser(
        prog=PROG,
        description="Split questions off a data set to choose settings on: whole articles, drawn at random. Both files "
        "are SQuAD JSON.",
        allow_abbrev=False,
    )
    count = command.whole_number(1, 10**9)
    parser.add_argument("input", metavar="IN", help="a file or folder of questions, in any layout that training reads")
    parser.add_argument("--off", metavar="FILE", required=True, help="the file for what is split off; must not exist")
    parser.add_argument("--rest", metavar="FILE", required=True, help="the file for the other articles; must not exist")
    parser.add_argument("--questions", type=count, default=1000, help="how many are split off (default: 1000)")
    parser.add_argument("--per_article", type=count, help="the most that are taken of an article (default: all)")
    parser.add_argument(
        "--seed", type=command.whole_number(0, 2**63 - 1), default=42, help="what the articles are drawn with"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command.run_command(PROG, lambda: _split(build_parser().parse_args(argv)))


def _split(options: argparse.Namespace) -> int:
    # Both before either is written.
    off, rest = new_squad_file(options.off), new_squad_file(options.rest)
    if os.path.realpath(off) == os.path.realpath(rest):
        raise ConfigError([f"--off {off} and --rest {rest} are one file; name two"])
    # Imported here, so that --help and mistakes in the options do not wait for it.
    from qa_dist.data.checking import validate
    from qa_dist.data.sources import file_source
    from qa_dist.data.splitting import split_articles

    source = file_source(options.input, "train")
    reading = source.records()
    examples, report = validate(reading, for_training=False)
    if report.problems:
        raise DataError(f"{source.name}: {report.text()}. Mend them, or leave them out with qa-dist convert")
    if report.is_worth_telling:
        sys.stderr.write(f"{PROG}: note: {source.name}: {report.text()}\n")
    parts = split_articles(examples, options.questions, per_article=options.per_article, seed=options.seed)
    version_2 = bool(report.num_unanswerable) or bool(reading.is_version_2)
    write_squad_parts({off: parts.off, rest: parts.rest}, version_2=version_2)
    counts = {
        "off": str(off),
        "rest": str(rest),
        "num_off": len(parts.off),
        "num_rest": len(parts.rest),
        "num_left_out": parts.num_left_out,
        "articles_off": list(parts.titles),
    }
    sys.stdout.write(json.dumps(counts, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
