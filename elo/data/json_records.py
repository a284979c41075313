"""Files of JSON to raw records, in bounded memory: one a line, or the elements of one array, as the content is.

A file is an array if its first line that is not blank begins like one of objects. It is cut where its commas are, and
nobody looks at what is between: mistakes there are the record's own, and are found by who decodes it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from elo.common.errors import UserError
from elo.data.unpacking import PACKINGS, unpacked

JSON_ENDINGS = tuple(name + packing for name in (".jsonl", ".ndjson", ".json") for packing in PACKINGS)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LARGEST_RECORD = 16 * 1024 * 1024  # bytes; a hostile record needs 30 times as much memory
CHUNK = 2**20  # bytes of an array that are read at a time

_ARRAY = re.compile(rb"\s*\[\s*([{\]]|$)")
# A string, with its closing quote if that is there yet; a bracket that opens or closes; a comma.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)|([\[{])|([\]}])|(,)', re.DOTALL)
_STRING, _OPENS, _CLOSES, _COMMA = 1, 2, 3, 4


class MalformedError(Exception):
    """A record that is no document: the `kind` of mistake, in `detail` what only this one has, and its line."""

    def __init__(self, kind: str, detail: str = "", line: int = 0) -> None:
        super().__init__(kind, detail, line)
        self.kind, self.detail, self.line = kind, detail, line

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


class Skipped(dict[str, list]):
    """Of each kind of malformed record [how many there are, the place of the first]."""

    def add(self, error: MalformedError, path: str, line: int, skip_malformed: bool) -> None:
        """Raises UserError unless such records are to be skipped."""
        if not skip_malformed:
            raise UserError(f"{place(path, line)}: {error}; --skip-malformed passes over such records") from None
        if error.kind not in self:
            self[error.kind] = [0, place(path, line)]
        self[error.kind][0] += 1


def read_json_records(path: str | Path) -> Iterator[tuple[int, bytes | MalformedError, int]]:
    """Of each record its line (in an array its number, from 1), its bytes, and how much of the file is read so far.

    A record of more than `LARGEST_RECORD` bytes is malformed. UserError for a file that cannot be read, is damaged or
    ends too early.
    """
    with unpacked(path) as (stream, file):
        is_first = True
        for number, line in _lines(stream):
            if is_first and _ARRAY.match(line):
                for number, element in enumerate(_elements(line, stream), start=1):
                    too_long = MalformedError(f"a record of more than {LARGEST_RECORD} bytes", line=number)
                    yield number, too_long if element is None else element, file.tell()
                return
            is_first = False
            too_long = MalformedError(f"a line of more than {LARGEST_RECORD} bytes", line=number)
            yield number, too_long if len(line) > LARGEST_RECORD else line, file.tell()


def place(path: str | Path, number: int) -> str:
    """Where a record is, from 1: `file:line`, `file:row` of Parquet, or `file record number` of an array in JSON."""
    if str(path).lower().endswith(JSON_ENDINGS):
        try:
            with unpacked(path) as (stream, _):
                if _ARRAY.match(next(_lines(stream), (0, b""))[1]):
                    return f"{path} record {number}"
        except UserError:  # no longer there
            pass
    return f"{path}:{number}"


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank with their numbers; of one that is too long its first LARGEST_RECORD + 1 bytes."""
    number = 0
    while line := stream.readline(LARGEST_RECORD + 1):
        number += 1
        is_long = len(line) > LARGEST_RECORD
        line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 and not is_long else line
        if is_long or line.strip():
            # Before the rest is passed over, for who wants no more of it: a packed file can hold a line of terabytes.
            yield number, line
        while is_long and line and not line.endswith(b"\n"):
            line = stream.readline(LARGEST_RECORD)


def _elements(data: bytes, stream: BinaryIO) -> Iterator[bytes | None]:
    """The elements of the array that begins in `data` and goes on in `stream`; None for one that is too long."""
    data = data[data.index(b"[") + 1 :]
    start = seen = depth = count = 0
    is_long = False
    while True:
        unfinished = b""  # a string that goes on: its quote, and an escape that is cut
        for token in _TOKEN.finditer(data, seen):
            kind = token.lastindex
            if kind == _STRING and not token[1]:
                unfinished, seen = b'"' + data[token.end() :], token.start()
                break
            if kind == _OPENS:
                depth += 1
            elif kind == _CLOSES and depth:
                depth -= 1
            elif not depth and (kind == _COMMA or token[0] == b"]"):
                element, start, is_last = data[start : token.start()].strip(), token.end(), kind == _CLOSES
                if not is_long and (element or count or not is_last):
                    yield element
                if is_last:
                    return _end(data[start:], stream)
                count, is_long = count + 1, False
        else:
            seen = len(data)
        data, start, seen = data[start:], 0, seen - start
        if len(data) > LARGEST_RECORD:
            if not is_long:
                yield None
            data, seen, is_long = unfinished, 0, True
        more = stream.read(max(CHUNK, len(data)))  # as much again, so that no string is scanned often
        if not more:
            raise EOFError("it ends within its array")
        data += more


def _end(rest: bytes, stream: BinaryIO) -> None:
    """Nothing may follow an array."""
    while rest:
        if rest.strip():
            raise EOFError(f"behind its array there is {rest.strip()[:20]!r}")
        rest = stream.read(CHUNK)
