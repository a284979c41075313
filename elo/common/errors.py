"""The difference between a user's mistake, a run that is asked to end, and a defect of ours.

A mistake in a file or an option ends in one line on stderr and exit status 2. Being asked to end is no mistake: one
line on stdout and exit status 0. Everything else keeps its traceback.
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from elo.common.terminal import printable, say, show

LONGEST = 2000  # characters of a message; the values in it come from files, which may hold megabytes
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.EMFILE}


class UserError(Exception):
    """Something outside of the program is wrong: the message names the file or option and says what is right."""

    at_once = False  # leave without waiting for threads, which may wait for a process that is gone


class ProcessLostError(UserError):
    """Another process of this run has ended, or cannot be reached any more."""


class EarlyExit(BaseException):  # noqa: N818  not an error, so that nothing that handles errors takes it for one
    """There is nothing left to do, or a signal asks to do it later. The message says which."""

    at_once = False


def is_machines(error: Exception) -> bool:
    """Whether the machine fails: never a defect of the program, wherever it comes from."""
    return error.errno in MACHINE if isinstance(error, OSError) else is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    """Also of torch, which is not imported for it: on a GPU it has a class for that, on a CPU only words."""
    is_gpus = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or is_gpus or "DefaultCPUAllocator: can't allocate memory" in str(error)


def message_line(error: Exception) -> str:
    """The message in one line, cut if it is long."""
    line = printable(" ".join(str(error).split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 500]} [...] {line[-480:]}"


def exit_status(main: Callable[[], None]) -> NoReturn:
    """Run `main` and leave the process: 0, or 2 with one line on stderr for a `UserError`."""
    # Names of files need not be text, and a terminal need not know Korean: neither ends a run.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    rank, status, at_once = int(os.environ.get("RANK", 0)), 0, False
    try:
        main()
    except EarlyExit as exit_:
        if rank == 0:
            say(str(exit_))
        at_once = exit_.at_once
    except Exception as error:
        if not isinstance(error, UserError) and not is_machines(error):
            raise
        # Under torchrun every process finds the same mistake. Rank 0 reports it at once and torchrun then ends
        # the others; they speak only if the mistake was theirs alone.
        if rank and not isinstance(error, ProcessLostError):
            time.sleep(5)
        show("error: " + (message_line(error) or "out of memory"), file=sys.stderr)
        status, at_once = 2, getattr(error, "at_once", False)
    if at_once:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
