"""What every entry point does around its work: exit codes and errors that read like sentences."""

import os
import sys
import time
from collections.abc import Callable

from qa_dist.errors import UserError
from qa_dist.nodes import host_name

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
SECONDS_FOR_RANK_0 = 3.0


def run(program: str, work: Callable[[], int]) -> int:
    """The exit code of `work`, or that of the mistake that ended it.

    A `UserError` becomes one line on standard error and code 2. Ctrl-C gives 130, and a reader of standard output that
    went away (`| head`) gives 141, both without a traceback, as shells expect. Other exceptions pass.

    Args:
        program: name that the error message starts with, such as "qa_dist.score".
        work: does everything and returns the exit code.
    """
    try:
        code = work()
        sys.stdout.flush()
    except UserError as error:
        where = ""
        if rank := int(os.environ.get("RANK", "0")):
            # The ranks of a run mostly find the same mistake. Rank 0 says it, and its end makes the launcher end the
            # others before they repeat it; what only this rank found is still said.
            time.sleep(SECONDS_FOR_RANK_0)
            if error.on_all_ranks and os.environ.get("LOCAL_RANK", "0") != "0":
                return EXIT_USER_ERROR
            where = f" (rank {rank} on {host_name()})"
        sys.stderr.write(f"{program}: error: {error}{where}\n")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # What is still buffered would fail again when the interpreter shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return code
