"""JSON lines that are written as results come, so that a killed run goes on where it was."""

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from elo.common.errors import UserError
from elo.common.fields import Fields, check_depth, unique
from elo.common.files import lock, open_file, read_file_lines

LARGEST = 2**28  # bytes of a file; what FastChat has published has up to 50 MB
LONGEST_LINE = 2**22  # hostile JSON needs 30 times as much memory


class Line(NamedTuple):
    """One object of a file; `where` is its file and line, for complaints."""

    where: str
    record: dict[str, Any]

    @property
    def fields(self) -> Fields:
        return Fields(self.record, self.where)


def read_lines(path: Path, torn: bool = False) -> list[Line]:
    """The objects of a file; blank lines and byte order marks mean nothing.

    torn: the last line may have been cut short by a kill, and is then passed over. UserError for all else that is no
    JSON object, for what is no file, and for more than a file of results can have.
    """
    return parse_lines(path, read_file_lines(path, LARGEST, LONGEST_LINE), torn)


def parse_lines(path: Path, lines: Iterable[bytes], torn: bool = False) -> list[Line]:
    """The same of lines with their ends."""
    found = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8").strip().lstrip("\ufeff")
            if not text:
                continue
            record = json.loads(text, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            if torn and not line.endswith(b"\n"):
                break
            what = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else "a line of JSON"
            raise UserError(f"{where}: not {what}: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON object was expected, found {type(record).__name__}")
        check_depth(record, where)
        if r"\ud" in text.lower():  # JSON can write "\ud800", which no UTF-8 can hold
            try:
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise UserError(f"{where}: a lone surrogate, which is not text") from None
        found.append(Line(where, record))
    return found


def digest(*values: object) -> str:
    """Tells apart what results were made from, and how."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


class JsonLines:
    """A file of results that belongs to this run alone: what it has already, and a way to add to it.

    Opening removes a last line that was cut short, if it begins with the field `first` as each line does. `append`
    returns when the lines are on the disk; any thread may call it. UserError if another run has the file open, if it
    cannot be written, or if its end is none of a line of results.
    """

    def __init__(self, path: Path, first: str = "question_id") -> None:
        self.path, self.first = path, first
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                open_file(path).close()  # a pipe would wait for its other end
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  closed by __exit__
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        try:
            self.lines = self._take_over()
        except BaseException:
            self._file.close()
            raise

    def _take_over(self) -> list[Line]:
        if not lock(self._file.fileno(), self.path):
            raise UserError(f"{self.path}: another run is writing it")
        raw = list(read_file_lines(self.path, LARGEST, LONGEST_LINE))
        lines = parse_lines(self.path, raw, torn=True)
        if raw and not raw[-1].endswith(b"\n"):
            start = f'{{"{self.first}": '.encode()
            if not (raw[-1].startswith(start) or start.startswith(raw[-1])):
                raise UserError(f"{self.path}:{len(raw)}: not a line of results; give another name")
            if parse_lines(self.path, raw[-1:], torn=True):
                self._file.write(b"\n")  # complete but for its end
            else:
                self._file.truncate(sum(map(len, raw[:-1])))
        return lines

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def clear(self) -> None:
        """Forget what the file has."""
        self._file.truncate(0)
        self.lines = []

    def append(self, *records: dict[str, Any]) -> None:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        rest = "".join(lines).encode("utf-8", "replace")
        with self._lock:
            end = self._file.seek(0, os.SEEK_END)
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError as error:
                self._file.truncate(end)  # no other line may follow half of this one
                raise UserError(f"{self.path}: {error.strerror}") from None
