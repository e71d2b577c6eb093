"""Write questions in any layout that training reads as plain SQuAD JSON: `qa-dist convert IN OUT`.

What was read, mended and left out is said on standard error; standard output has the counts as JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from qa_dist.common import command
from qa_dist.common.errors import DataError
from qa_dist.data.squad_files import new_squad_file, write_squad

PROG = "qa_dist.convert"


def build_parser() -> argparse.ArgumentParser:
    """The flags of this entry point."""
    parser = command.Parser(
        prog=PROG,
        description="Write questions as plain SQuAD JSON, v2.0 if some have no answer, with answers at their places. "
        "One that was not found has answer_start -1; a question of whose answer nothing is known has no answers.",
        allow_abbrev=False,
    )
    parser.add_argument("input", metavar="IN", help="a file or folder of questions, in any layout that training reads")
    parser.add_argument("output", metavar="OUT", help="the file to write, compressed if it ends in .gz; must not exist")
    parser.add_argument(
        "--split",
        choices=("train", "validation"),
        default="train",
        help="which split of a folder is read (default: train)",
    )
    parser.add_argument(
        "--on_invalid",
        choices=("error", "drop"),
        default="error",
        help="what to do with records that fail validation (default: error)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command.run_command(PROG, lambda: _convert(build_parser().parse_args(argv)))


def _convert(options: argparse.Namespace) -> int:
    output = new_squad_file(options.output)
    # Imported here, so that --help and mistakes in the options do not wait for it.
    from qa_dist.data.checking import validate
    from qa_dist.data.sources import file_source

    source = file_source(options.input, options.split)
    reading = source.records()
    # References without a place and questions without known answers are kept: they are somebody's test set.
    examples, report = validate(reading, for_training=False)
    if report.problems and options.on_invalid == "error":
        raise DataError(f"{source.name}: {report.text()}. Mend them, or pass --on_invalid drop to leave them out")
    if not examples:
        raise DataError(f"{source.name}: {report.text()}. There is nothing to write")
    if report.is_worth_telling:
        sys.stderr.write(f"{PROG}: note: {source.name}: {report.text()}\n")
    version_2 = bool(report.num_unanswerable) or bool(reading.is_version_2)
    write_squad(examples, output, version_2=version_2)
    counts = {
        "output": str(output),
        "num_examples": report.num_examples,
        "num_unanswerable": report.num_unanswerable,
        "num_mended": report.num_mended,
        "num_dropped": report.num_invalid,
        "num_without_references": report.num_without_references,
        "num_without_place": report.num_without_place,
    }
    sys.stdout.write(json.dumps(counts, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
