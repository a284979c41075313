"""Files that come from outside: regular files only, and never more of them than a limit; and locks.

A link to a file is as good as a file: the directories in Hugging Face's cache consist of links, and people keep models
on other disks. But a name that is *written in* a file must not lead out of that file's directory: see
`elo.model.checkpoint`. Pipes and devices are refused, since reading them may take for ever, or more memory than there
is.
"""

import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from elo.common.errors import UserError
from elo.common.terminal import note


def lock(descriptor: int, path: str | Path) -> bool:
    """Lock an open file or directory until it is closed: False if another process has. Notes where there are no locks.

    The lock ends with the process, also with one that is killed.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        note(f"{path}: it cannot be locked ({error.strerror}), so nothing would stop a second run there")
    return True


def is_file(path: str | Path) -> bool:
    """Whether there is a regular file, or a link to one; False too for a name that cannot be one."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # ValueError: NUL or a lone surrogate in the name
        return False


def open_file(path: str | Path, largest: int | None = None) -> BinaryIO:
    """A regular file, opened for reading. Raises OSError, and UserError for a pipe, a device, or more bytes."""
    status = os.stat(path)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # that a directory is none says `open`
        raise UserError(f"{path}: not a file, but a pipe or a device")
    if largest is not None and status.st_size > largest:
        raise UserError(f"{path}: {status.st_size:,} bytes; such a file has at most {largest:,}")
    return open(path, "rb")


def read_file(path: str | Path, largest: int) -> bytes:
    """The content of a regular file. Raises OSError, and UserError for more than `largest` bytes."""
    with open_file(path, largest) as file:
        return file.read(largest)


def read_file_lines(path: str | Path, largest: int, longest: int) -> Iterator[bytes]:
    """The lines of a regular file of at most `largest` bytes, each of at most `longest`, with their ends.

    Raises UserError for more, and if it cannot be read.
    """
    try:
        with open_file(path, largest) as file:
            for number, line in enumerate(iter(lambda: file.readline(longest + 1), b""), start=1):
                if len(line) > longest:
                    raise UserError(f"{path}:{number}: a line of more than {longest:,} bytes")
                yield line
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def samples(path: Path) -> Iterator[bytes]:
    """A large file's name, size and 256 samples of 4 KiB from the beginning on: any training of weights shows there."""
    size = path.stat().st_size
    yield f"{path.name} {size} ".encode()
    with open(path, "rb") as file:
        for start in sorted({size * sample // 256 // 4096 * 4096 for sample in range(256)}):
            file.seek(start)
            yield file.read(4096)
