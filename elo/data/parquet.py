"""Parquet to rows, a few at a time: a file of kilobytes can unpack to gigabytes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elo.common.errors import UserError
from elo.common.files import open_file

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

ROWS = 8  # that are in memory at a time; a dictionary may repeat one of many megabytes in all of them
# Binary too, as writers leave it that do not say that their bytes are UTF-8.
TEXTS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def read_texts(path: str | Path, column: str) -> Iterator[tuple[bytes | None, int]]:
    """The texts of one column, and how much of the file is read so far; as bytes, since Parquet promises no UTF-8."""
    with _opened(path) as table:
        size, read, rows = os.path.getsize(path), 0, table.metadata.num_rows
        names = table.schema_arrow.names
        if names.count(column) != 1:
            raise UserError(f"{path}: needs one column {column!r}, and has {', '.join(names)}")
        kind = table.schema_arrow.field(column).type
        if str(kind.value_type if str(kind).startswith("dictionary") else kind) not in TEXTS:
            raise UserError(f"{path}: column {column!r} holds {kind}, not strings")
        for batch in table.iter_batches(ROWS, columns=[column], use_threads=False):
            for value in batch.column(column).cast("large_binary"):  # a field of that path in another may be there too
                read += 1
                yield value.as_py(), size * read // rows


def read_rows(
    path: str | Path, choose: Callable[[list[str]], list[str]] = list, largest: float = float("inf")
) -> Iterator[dict[str, Any]]:
    """The rows, with the columns that `choose` takes of those that are there.

    largest: UserError for a file that unpacks to more bytes.
    """
    with _opened(path) as table:
        size, names = 0, table.schema_arrow.names
        columns = choose(names)
        for column in columns:
            if names.count(column) > 1:
                raise UserError(f"{path}: column {column!r} is there twice")
        for batch in table.iter_batches(ROWS, columns=columns, use_threads=False):
            size += batch.nbytes
            if size > largest:
                raise UserError(f"{path}: more than {largest:,} bytes of text; such a file has fewer")
            yield from batch.to_pylist()


@contextmanager
def _opened(path: str | Path) -> Iterator["ParquetFile"]:
    """UserError for all that is wrong with the file, also while its rows are read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs `pip install pyarrow`") from None
    try:
        open_file(path).close()  # pyarrow would wait for a pipe
        # Without buffer_size a whole column of a row group is read at once.
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
            yield table
    # ValueError: a field twice in a struct. MemoryError: a text or a page that is said to be of gigabytes.
    # OverflowError: sizes below 0.
    except (pyarrow.ArrowException, ValueError, MemoryError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if "crypt" in str(error):
            raise UserError(f"{path}: it is encrypted; write it again without: {error}") from None
        raise UserError(f"{path}: damaged or incomplete: {error}") from None
