"""Files to the bytes that they hold: plain, .gz (of any number of members) and .zst (of any number of frames)."""

import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from elo.common.errors import UserError
from elo.common.files import open_file

PACKINGS = ("", ".gz", ".zst")  # the last ending of a name
LARGEST_WINDOW = 2**31  # bytes, of `zstd --long=31`. So much memory is needed only for texts of that size


@contextmanager
def unpacked(path: str | Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(stream, file): what a file holds, and the file itself, whose position says how much of it is read.

    UserError, also while the stream is read, for a file that cannot be read, is damaged or ends too early.
    """
    name = str(path).lower()
    try:
        with open_file(path) as file:
            if name.endswith((".gz", ".zst")) and not os.fstat(file.fileno()).st_size:
                raise EOFError("it is empty")  # which gzip takes for a packed empty file
            if name.endswith(".gz"):
                with gzip.GzipFile(fileobj=file) as stream:
                    yield stream, file
            elif name.endswith(".zst"):
                yield io.BufferedReader(_ZstdFile(file), 1 << 17), file
            else:
                yield file, file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or incomplete: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


class _ZstdFile(io.RawIOBase):
    """A .zst file unpacked; zstandard's own reader takes a file that was cut short for a complete one."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{file.name}: reading .zst needs `pip install zstandard`") from None
        self.zstandard, self.file = zstandard, file
        self.frame = None  # a file may be several frames in a row
        self.packed, self.unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.unpacked:
            # 1 KiB can unpack to 32 MiB, so no more than that at a time.
            self.packed = self.packed or self.file.read(1024)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            try:
                self.frame = (
                    self.frame or self.zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
                )
                self.unpacked = memoryview(self.frame.decompress(self.packed))
            except (self.zstandard.ZstdError, MemoryError) as error:
                # Whole files that this program cannot unpack are not called damaged.
                if isinstance(error, MemoryError) or re.search("memory|dictionary", str(error), re.IGNORECASE):
                    advice = "pack it again without a dictionary and with `--long=31` at most, which needs 2 GiB"
                    raise UserError(f"{self.file.name}: {str(error) or 'not enough memory'}; {advice}") from None
                raise EOFError(error) from None
            self.packed = b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        count = min(len(buffer), len(self.unpacked))
        buffer[:count] = self.unpacked[:count]
        self.unpacked = self.unpacked[count:]
        return count
