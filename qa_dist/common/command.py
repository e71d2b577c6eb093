"""What every entry point does around its work: exit codes and errors that read like sentences."""

import argparse
import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from qa_dist.common.errors import UserError
from qa_dist.common.hosts import host_name
from qa_dist.common.secrets import masked
from qa_dist.common.signals import Stopped

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
SECONDS_FOR_RANK_0 = 3.0
EXIT_FILE_VARIABLE = "QA_DIST_EXIT_FILE"


class OutputClosedError(BrokenPipeError):
    """Whoever read what a command writes has gone, as `head` does."""


class Parser(argparse.ArgumentParser):
    """A parser of flags whose complaints are a `UserError` like all others: a sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """The type of a flag whose value is a whole number of this range."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least:,} to {most:,}")
        return int(text)

    return read


def run_command(program: str, work: Callable[[], int]) -> int:
    """The exit code of `work`, or that of the mistake that ended it.

    A `UserError` becomes one line on standard error and code 2, without secrets that may be in it; a run that was asked
    to stop and did so gives the code that `Stopped` names. Ctrl-C gives 130, and a reader of standard output that went
    away (`| head`) gives 141, both without a traceback, as shells expect. Other exceptions pass.

    Args:
        program: name that the error message starts with, such as "qa_dist.score".
        work: does everything and returns the exit code.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    if sys.stdout is None:
        sys.stderr.write(f"{program}: error: standard output is closed; leave it open, or send it to {os.devnull}\n")
        return EXIT_USER_ERROR
    try:
        code = work()
        sys.stdout.flush()
    except UserError as error:
        where = ""
        rank = os.environ.get("RANK", "0")
        if rank.isdecimal() and int(rank):
            # The ranks of a run mostly find the same mistake. Rank 0 says it, and its end makes the launcher end the
            # others before they repeat it; what only this rank found is still said.
            time.sleep(SECONDS_FOR_RANK_0)
            if error.on_all_ranks and os.environ.get("LOCAL_RANK", "0") != "0":
                return EXIT_USER_ERROR
            where = f" (rank {rank} on {host_name()})"
        # A name of thousands of characters is somebody's mistake, and would bury what is said about it.
        message = re.sub(r"\S{500,}", lambda match: f"{match[0][:80]}...", masked(str(error)))
        sys.stderr.write(f"{program}: error: {message}{where}\n")
        return EXIT_USER_ERROR
    except Stopped as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        drop_output()
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if (reason := _full_output(error)) is not None:
            drop_output()
            sys.stderr.write(f"{program}: error: standard output takes no more ({reason}); make room\n")
            return EXIT_USER_ERROR
        text = "".join(traceback.format_exception(error))
        shown = masked(text)
        if shown == text:
            note_exit(EXIT_FAILURE)
            raise
        # A library's message quotes a token or a password, and logs are kept and shared.
        sys.stderr.write(shown)
        return EXIT_FAILURE
    return code


def _full_output(error: Exception) -> str | None:
    """Why a stream takes no more, if that is the error; one of a file has the file's name."""
    if not isinstance(error, OSError) or error.filename is not None:
        return None
    return error.strerror if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else None


def drop_output() -> None:
    """Let what is still buffered go nowhere: it would fail again when the interpreter shuts down."""
    # Not `sys.stdout`, which may be standard error for a while.
    os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.__stdout__ or sys.stdout).fileno())


def note_exit(code: int) -> int:
    """`code`, which rank 0 also writes as text into the file named by $QA_DIST_EXIT_FILE, if it is set.

    torchrun ends with 1 whatever its processes ended with. A script around it that tells a mistake (2) from a run that
    wants to go on later (85) reads this file; no file means that rank 0 did not end by itself.
    """
    name = os.environ.get(EXIT_FILE_VARIABLE)
    if name and os.environ.get("RANK", "0") == "0":
        try:
            Path(name).write_text(f"{code}\n", encoding="utf-8")
        except OSError as error:
            sys.stderr.write(f"the exit code {code} was not noted in {EXIT_FILE_VARIABLE}={name}: {error}\n")
    return code
