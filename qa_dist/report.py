"""One page about runs, to read, keep and send: `qa-dist report RUN [RUN ...] --output report.html`.

The page holds what was run, curves, scores with intervals, slices, calibration, and answers in their contexts. It loads
nothing from anywhere. Runs that still go on, or were killed, are shown as far as they came. docs/report.md explains it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qa_dist.common import command
from qa_dist.common.errors import ConfigError
from qa_dist.common.files import require_writable, staged
from qa_dist.reporting.flags import add_score_flags

PROG = "qa_dist.report"


def build_parser() -> argparse.ArgumentParser:
    """The flags of this entry point."""
    parser = command.Parser(
        prog=PROG,
        description="One HTML page about runs: what was run, curves, scores with 95 %% intervals, slices, calibration, "
        "and answers in their contexts. It loads nothing from anywhere, and needs no script.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        type=os.path.expanduser,
        help="output folders of runs, also of one that still goes on or was killed; several are compared",
    )
    parser.add_argument(
        "--output",
        default="report.html",
        metavar="FILE",
        type=os.path.expanduser,
        help="the page, which appears whole and replaces one of that name (default: report.html)",
    )
    parser.add_argument(
        "--references",
        metavar="FILE",
        type=os.path.expanduser,
        help="the questions that were answered, in any layout that training reads (default: the validation data that "
        "the config.yaml of a run names)",
    )
    add_score_flags(parser, of_seed="the resamples, and of the questions that are shown by chance")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command.run_command(PROG, lambda: _report(build_parser().parse_args(argv)))


def _report(options: argparse.Namespace) -> int:
    # Only now: --help and mistakes in the flags should not wait for it.
    from qa_dist.reporting.analysis import Resampling
    from qa_dist.reporting.drawings import require_matplotlib
    from qa_dist.reporting.report_page import page
    from qa_dist.reporting.report_scores import scored
    from qa_dist.reporting.run_folders import read_runs

    output = Path(options.output)
    require_matplotlib()
    if output.is_dir():
        raise ConfigError([f"--output {output} is a folder; name a file, as {output / 'report.html'}"])
    require_writable(output.parent, "the folder of --output")
    runs = read_runs(options.runs)
    found = scored(runs, options.references, options.answer_normalization, Resampling(options.resamples, options.seed))
    text = page(runs, found)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with staged(output) as aside:
            aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"--output {output} cannot be written: {error.strerror}; name another file"]) from error
    for note in (*(f"{run.name}: {note}" for run in runs for note in run.notes), *found.notes):
        sys.stderr.write(f"{PROG}: note: {note}\n")
    sys.stdout.write(f"{output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
