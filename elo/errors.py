"""The difference between a user's mistake and a defect of ours.

A mistake in a file or an option ends in one line on stderr and exit status 2. Everything else keeps its traceback.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something outside of the program is wrong: the message names the file or option and says what is right."""


def exit_status(main: Callable[[], None]) -> NoReturn:
    """Run `main` and leave the process: 0, or 2 with one line on stderr for a `UserError`."""
    try:
        main()
    except UserError as error:
        # Under torchrun every process finds the same mistake. Rank 0 reports it at once and torchrun then ends
        # the others; they speak only if the mistake was theirs alone.
        rank = int(os.environ.get("RANK", 0))
        if rank:
            time.sleep(5)
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(0)
