"""Publish a trained model on the hub, in one commit: `qa-dist publish RUN --repo_id me/model [--private] [--dry_run]`.

Adapter or whole model, tokenizer, card and the record of the run; nothing of this machine (docs/publishing.md).
"""

import argparse
import os
import sys
from collections.abc import Sequence

from qa_dist.common import command
from qa_dist.reporting.hub_ids import hub_id, repository

PROG = "qa_dist.publish"


def build_parser() -> argparse.ArgumentParser:
    """The flags of this entry point."""
    parser = command.Parser(
        prog=PROG,
        description="Publishes a trained model on the Hugging Face hub: weights, tokenizer, README.md and the record "
        "of its run, in one commit. The token is the hub library's: HF_TOKEN, or a login.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        type=os.path.expanduser,
        help="--output_dir of a run that has ended, or the folder of a merged model; with a README.md (qa-dist card)",
    )
    parser.add_argument("--repo_id", required=True, type=repository, metavar="ID", help="where, as me/model")
    parser.add_argument(
        "--base_model", type=hub_id, metavar="ID", help="hub id of the base model, if the run had it from a folder"
    )
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--dry_run", action="store_true", help="list files and sizes, and send nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return command.run_command(PROG, lambda: _publish(build_parser().parse_args(argv)))


def _publish(options: argparse.Namespace) -> int:
    # Imported here, so that --help and mistakes in the options do not wait for it.
    from qa_dist.reporting.hub import upload
    from qa_dist.reporting.publication import publication
    from qa_dist.reporting.run_record import read_run

    files = publication(read_run(options.run), options.repo_id, options.base_model)
    if not options.dry_run:
        sys.stdout.write(f"{upload(files, options.repo_id, private=options.private)}\n")
        return 0
    sys.stdout.writelines(f"{file.size:>15,}  {file.name}\n" for file in files)
    sys.stdout.write(f"{sum(file.size for file in files):>15,}  bytes in {len(files)} files for {options.repo_id}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
