"""JSON lines that are written as results come, so that a killed run goes on where it was."""

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

from elo.errors import UserError


class Line(NamedTuple):
    """One object of a file; `where` is its file and line, for complaints."""

    where: str
    record: dict[str, Any]


def read_lines(path: Path, torn: bool = False) -> list[Line]:
    """The objects of a file; blank lines and byte order marks mean nothing.

    torn: the last line may have been cut short by a kill, and is then passed over. UserError for all else that is no
    JSON object.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return parse_lines(path, data, torn)


def parse_lines(path: Path, data: bytes, torn: bool = False) -> list[Line]:
    lines = []
    pieces = data.split(b"\n")
    for number, piece in enumerate(pieces, start=1):
        where = f"{path}:{number}"
        try:
            text = piece.decode("utf-8").strip().lstrip("\ufeff")
            if not text:
                continue
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            if torn and number == len(pieces):
                break
            raise UserError(f"{where}: not a line of JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON object was expected, found {type(record).__name__}")
        if r"\ud" in text.lower():  # JSON can write "\ud800", which no UTF-8 can hold
            try:
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise UserError(f"{where}: a lone surrogate, which is not text") from None
        lines.append(Line(where, record))
    return lines


class JsonLines:
    """A file of results that belongs to this run alone: what it has already, and a way to add to it.

    Opening removes a last line that was cut short. `append` returns when the line is on the disk; any thread may call
    it. UserError if another run has the file open, or if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  closed by __exit__
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        try:
            self.lines = self._take_over()
        except BaseException:
            self._file.close()
            raise

    def _take_over(self) -> list[Line]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another run is writing it") from None
        self._file.seek(0)
        data = self._file.readall()
        lines = parse_lines(self.path, data, torn=True)
        if data and not data.endswith(b"\n"):
            last = data.rfind(b"\n") + 1
            if parse_lines(self.path, data[last:], torn=True):
                self._file.write(b"\n")  # complete but for its end
            else:
                self._file.truncate(last)
        return lines

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def clear(self) -> None:
        """Forget what the file has."""
        self._file.truncate(0)
        self.lines = []

    def append(self, record: dict[str, Any]) -> None:
        rest = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        with self._lock:
            end = self._file.seek(0, os.SEEK_END)
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError as error:
                self._file.truncate(end)  # no other line may follow half of this one
                raise UserError(f"{self.path}: {error.strerror}") from None
