"""The difference between a user's mistake and a defect of ours.

A mistake in a file or an option ends in one line on stderr and exit status 2. Everything else keeps its traceback.
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

LONGEST = 2000  # characters of a message; the values in it come from files, which may hold megabytes
# Never a defect of the program, wherever they come from.
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.EMFILE}


class UserError(Exception):
    """Something outside of the program is wrong: the message names the file or option and says what is right."""


def message_line(error: Exception) -> str:
    """The message in one line, cut if it is long, with escapes for what a terminal could not show or would obey."""
    line = " ".join(str(error).split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 500]} [...] {line[-480:]}"


def exit_status(main: Callable[[], None]) -> NoReturn:
    """Run `main` and leave the process: 0, or 2 with one line on stderr for a `UserError`."""
    # Names of files need not be text, and a terminal need not know Korean: neither ends a run.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        fail(message_line(error))
    except OSError as error:
        if error.errno not in MACHINE:
            raise
        fail(message_line(error))
    sys.exit(0)


def fail(line: str) -> NoReturn:
    # Under torchrun every process finds the same mistake. Rank 0 reports it at once and torchrun then ends the
    # others; they speak only if the mistake was theirs alone.
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(5)
    print("error: " + line, file=sys.stderr, flush=True)
    sys.exit(2)
