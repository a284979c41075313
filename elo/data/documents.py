"""Files of text to documents, in a stream: .txt, .jsonl (plain, .gz, .zst) and .parquet.

Reading has two halves, so that the slower one can run in other processes: `read_records` cuts a file into raw
records, and `Record.texts` makes documents of one record.

- .jsonl: one object a line, its text in one field; blank lines mean nothing.
- .parquet: one document a row, its text in one column.
- .txt: one document a file; its Windows line ends become "\n". In the other formats the text stays as it is.
- A byte order mark at the start of a file is dropped. NUL and other control characters are text.
- No document is longer than `MAX_DOCUMENT`: a longer one becomes several, cut after a line end if it has any.
  It keeps memory small, and the two languages of a mixture close to their shares.
"""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from elo.common.errors import UserError
from elo.common.files import open_file

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_DOCUMENT = 512 * 1024  # bytes of UTF-8
MAX_LINE = 16 * 1024 * 1024  # bytes of one .jsonl line; a hostile line of JSON needs 30 times as much memory
PARQUET_ROWS = 8  # rows that are in memory at a time; a dictionary may repeat one of many megabytes in all of them


@dataclass(frozen=True)
class Document:
    """A text and where it stands: the line (from 1) on which it starts, or its row in a Parquet file."""

    text: str
    path: str
    line: int


class MalformedError(Exception):
    """A record that is no document: its `line`, the `kind` of mistake, in `detail` what only this one has."""

    def __init__(self, line: int, kind: str, detail: str = "") -> None:
        super().__init__(line, kind, detail)
        self.line, self.kind, self.detail = line, kind, detail

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


class Record(NamedTuple):
    """A line, a row or a piece of text as it stands in the file, not yet decoded."""

    line: int
    raw: bytes | MalformedError
    is_json: bool
    position: int  # bytes of the file read so far, for a progress bar

    def texts(self, text_field: str) -> list[str]:
        """The documents of this record, one unless it is long. Raises `MalformedError`."""
        if isinstance(self.raw, MalformedError):
            raise self.raw
        try:
            text = self.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = self.line + self.raw.count(b"\n", 0, error.start)
            raise MalformedError(line, "invalid UTF-8", f"byte 0x{self.raw[error.start]:02x}") from None
        if self.is_json:
            text = _field(text, text_field, self.line)
        try:
            encoded = text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can write "\ud800", which no UTF-8 can hold
            raise MalformedError(self.line, "a lone surrogate, which is not text") from None
        texts = [text]
        if len(encoded) > MAX_DOCUMENT:
            texts = [piece.decode("utf-8") for _, piece in _pieces(io.BytesIO(encoded))]
        texts = [text for text in texts if text and not text.isspace()]
        if not texts:
            raise MalformedError(self.line, "empty document")
        return texts


def find_files(patterns: Sequence[str | Path]) -> list[Path]:
    """The text files that files, directories and globs (`**` too) name, sorted, each once.

    Directories are searched to any depth, without hidden entries and without following links to directories;
    other files in them, or in a glob, are passed over. A pattern without any text file is a `UserError`.
    """
    found: dict[str, Path] = {}
    for pattern in map(str, patterns):
        is_glob = not os.path.exists(pattern)
        names = glob.glob(pattern, recursive=True) if is_glob else [pattern]
        if not names:
            raise UserError(f"{pattern}: no such file or directory")
        files = [file for name in names for file in _files_in(name)]
        if not files:
            raise UserError(f"{pattern}: no text file there; supported are {', '.join(ENDINGS)}")
        found.update((os.path.abspath(file), Path(file)) for file in files)
    if not found:
        raise UserError("no text files were given")
    return [found[path] for path in sorted(found)]


def read_documents(
    paths: Sequence[str | Path],
    text_field: str = "text",
    on_malformed: Callable[[str, MalformedError], None] | None = None,
) -> Iterator[Document]:
    """The documents of files, in order, in bounded memory.

    A malformed record is a `UserError` with file and line, or goes to `on_malformed(path, error)` and is
    passed over. A file that cannot be read, is damaged or ends too early is a `UserError` in any case.
    """
    for path in paths:
        for record in read_records(path, text_field):
            try:
                texts = record.texts(text_field)
            except MalformedError as malformed:
                if on_malformed is None:
                    raise UserError(f"{path}:{malformed.line}: {malformed}") from None
                on_malformed(str(path), malformed)
            else:
                yield from (Document(text, str(path), record.line) for text in texts)


def read_records(path: str | Path, text_field: str) -> Iterator[Record]:
    """The raw records of one file. `text_field` is for Parquet, where only that column is read."""
    name = str(path).lower()
    try:
        if name.endswith(".parquet"):
            yield from _rows(path, text_field)
            return
        with open_file(path) as file:
            if name.endswith((".gz", ".zst")) and not os.path.getsize(path):
                raise EOFError("it is empty")  # which gzip takes for a packed empty file
            if name.endswith(".jsonl"):
                yield from _lines(file, file)
            elif name.endswith(".jsonl.gz"):
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield from _lines(unpacked, file)
            elif name.endswith(".jsonl.zst"):
                yield from _lines(io.BufferedReader(_ZstdFile(file), 1 << 17), file)
            elif name.endswith(".txt"):
                yield from _text(file)
            else:
                raise UserError(f"{path}: not a text file; supported are {', '.join(ENDINGS)}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or incomplete: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _files_in(name: str) -> Iterator[str]:
    if not os.path.isdir(name):
        if name.lower().endswith(ENDINGS):
            yield name
        return

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}")

    for folder, folders, files in os.walk(name, onerror=fail):
        folders[:] = [entry for entry in folders if not entry.startswith(".")]
        for entry in files:
            if entry.lower().endswith(ENDINGS) and not entry.startswith("."):
                yield os.path.join(folder, entry)


def _field(text: str, text_field: str, line: int) -> str:
    """The text in one line of JSON."""
    try:
        value = json.loads(text.rstrip())  # behind a line end the column in an error would be another line's
    except json.JSONDecodeError as error:
        raise MalformedError(line, "not valid JSON", f"{error.msg}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
        raise MalformedError(line, "not usable JSON", str(error)) from None
    if not isinstance(value, dict):
        raise MalformedError(line, "not a JSON object")
    if text_field not in value:
        names = ", ".join(map(repr, list(value)[:5]))
        raise MalformedError(line, f"no field {text_field!r}", f"it has {names or 'no fields'}")
    if not isinstance(value[text_field], str):
        raise MalformedError(line, f"field {text_field!r} is not a string")
    return value[text_field]


def _lines(stream: BinaryIO, file: BinaryIO) -> Iterator[Record]:
    """The lines of a .jsonl `stream` that unpacks `file` (or is it)."""
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            # Before the rest is passed over, for who wants no more of it: a packed file can hold a line of terabytes.
            yield Record(number, MalformedError(number, f"a line of more than {MAX_LINE} bytes"), True, file.tell())
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE)
            continue
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield Record(number, line, True, file.tell())


def _text(file: BinaryIO) -> Iterator[Record]:
    """A .txt file. Windows line ends are replaced here, before anyone counts their bytes."""
    is_blank = True
    for number, (line, raw) in enumerate(_pieces(file)):
        if number == 0:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        # Blank pieces are passed over: the last line ends of a long file are no malformed document.
        if raw and not raw.decode("utf-8", "replace").isspace():
            is_blank = False
            yield Record(line, raw.replace(b"\r\n", b"\n"), False, file.tell())
    if is_blank:
        yield Record(1, b"", False, file.tell())


def _pieces(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """UTF-8 text in pieces of at most `MAX_DOCUMENT`, each with the number of its first line."""
    line, raw = 1, file.read(MAX_DOCUMENT)
    while raw:
        raw += file.read(MAX_DOCUMENT - len(raw))
        cut = len(raw) if len(raw) < MAX_DOCUMENT else _cut(raw)
        yield line, raw[:cut]
        line += raw.count(b"\n", 0, cut)
        raw = raw[cut:] or file.read(MAX_DOCUMENT)


def _cut(raw: bytes) -> int:
    """Where to cut UTF-8 that goes on: after the last line end, or else between two characters."""
    if line_end := raw.rfind(b"\n") + 1:
        return line_end
    for cut in range(len(raw) - 1, len(raw) - 4, -1):
        if raw[cut] & 0b1100_0000 != 0b1000_0000:  # a byte that starts a character
            return cut
    return len(raw)  # not UTF-8: whoever decodes it says so


def _rows(path: str | Path, text_field: str) -> Iterator[Record]:
    """The rows of a Parquet file, a few at a time: row groups can hold gigabytes."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs `pip install pyarrow`") from None
    open_file(path).close()  # pyarrow would wait for a pipe
    size, row = os.path.getsize(path), 0
    try:
        # Without buffer_size a whole column of a row group is read at once.
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
            names = table.schema_arrow.names
            if names.count(text_field) != 1:
                raise UserError(f"{path}: needs one column {text_field!r}, and has {', '.join(names)}")
            column = table.schema_arrow.field(text_field).type
            if pyarrow.types.is_dictionary(column):
                column = column.value_type
            if not (pyarrow.types.is_string(column) or pyarrow.types.is_large_string(column)):
                raise UserError(f"{path}: column {text_field!r} holds {column}, not strings")
            rows = table.metadata.num_rows
            for batch in table.iter_batches(PARQUET_ROWS, columns=[text_field], use_threads=False):
                # As bytes: Parquet does not promise that its strings are UTF-8.
                for value in batch.column(0).cast(column).cast(pyarrow.large_binary()):
                    row, raw = row + 1, value.as_py()
                    null = MalformedError(row, f"field {text_field!r} is null")
                    yield Record(row, null if raw is None else raw, False, size * row // rows)
    # MemoryError: a text or a page that is said to be of gigabytes. OverflowError: sizes below 0.
    except (pyarrow.ArrowException, MemoryError, OverflowError) as error:
        raise UserError(f"{path}: damaged or incomplete: {error}") from None


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
            self.frame = self.frame or self.zstandard.ZstdDecompressor().decompressobj()
            try:
                self.unpacked = memoryview(self.frame.decompress(self.packed))
            except self.zstandard.ZstdError as error:
                raise EOFError(error) from None
            self.packed = b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        count = min(len(buffer), len(self.unpacked))
        buffer[:count] = self.unpacked[:count]
        self.unpacked = self.unpacked[count:]
        return count
