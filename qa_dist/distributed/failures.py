"""How a rank fails: which one did, in a line, and without waiting for the others."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from qa_dist.common.command import EXIT_BROKEN_PIPE, EXIT_FAILURE, OutputClosedError, drop_output, note_exit
from qa_dist.common.errors import LocalTrainingError, TrainingError, UserError
from qa_dist.common.secrets import masked
from qa_dist.common.signals import Stopped
from qa_dist.distributed.launch_variables import require_consistent_launch

_SIGNS_OF_A_LOST_PEER = (
    # gloo
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    # NCCL: its name for the error, its explanation (ncclGetErrorString), and what torch's watchdog of it says.
    "ncclRemoteError",
    "remote process exited",
    "communicator was aborted",
)


def is_lost_peer(error: Exception) -> bool:
    """Whether this is only the consequence of another rank's end."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PEER)


def launched_rank() -> int:
    """Rank of this process as the launcher set it, before any process group exists; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def failures_named() -> Iterator[None]:
    """Say which rank failed, and let it fail: the launcher then ends the others.

    A rank that merely lost its peers says so in a line, so that the one traceback in the log is the culprit's. A
    `TrainingError` explains itself: all ranks raise it alike, and rank 0 prints it without a traceback, or the one rank
    that knows of it does.

    Raises:
        ConfigError: The launcher's variables do not describe a process of a run.
    """
    require_consistent_launch()
    rank, world_size = launched_rank(), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        yield
    except (UserError, Stopped):
        raise
    except TrainingError as error:
        if rank == 0 or isinstance(error, LocalTrainingError):
            sys.stderr.write(f"[rank {rank} of {world_size}] the run stops: {error}\n")
        _leave(world_size)
    except OutputClosedError:
        if world_size == 1:
            raise
        drop_output()
        _leave(world_size, EXIT_BROKEN_PIPE)
    except Exception as error:
        if world_size == 1:
            raise
        text = str(error)
        if is_lost_peer(error):
            where = "; ".join(getattr(error, "__notes__", ()))
            sys.stderr.write(f"[rank {rank}] stops: another rank has gone; {where}\n")
            _leave(world_size)
        import traceback

        text = f"[rank {rank}] failed: {type(error).__name__}: {text}\n{traceback.format_exc()}"
        sys.stderr.write(masked(text))
        _leave(world_size)


def _leave(world_size: int, code: int = EXIT_FAILURE) -> NoReturn:
    """Exit, now if there are other ranks: destructors of the process group would wait for them."""
    note_exit(code)
    if world_size == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
