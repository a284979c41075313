"""JSON files and typed access to their fields, with errors that name the file and the field."""

import json
import os
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from elo.common.errors import UserError
from elo.common.files import read_file

LARGEST = 16 * 2**20  # bytes of a file; hostile JSON needs 25 times as much memory. The largest real ones have 10 MB
FIGURES = (".png", ".pdf", ".svg")
RESULTS = {"files", "results", "categories", "models", "plans", "rows", "kind"}  # by which --json's files are known
DEEPEST = 64  # lists and objects in each other; far fewer than Python can read, but not compare, print or write again

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 2, 80, 80, 40


def shown(value: object) -> str:
    """`repr` for a message, short whatever the value is; a value may be nested too deep for `repr` itself."""
    return _short.repr(value)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a UserError that names the file."""
    try:
        data = read_file(path, LARGEST)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return json_object(data, path)


def json_object(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that a file holds, or a UserError that names the file."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object, not a {type(value).__name__}")
    check_depth(value, path)
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json's object_pairs_hook for records: ValueError for a name that is there twice, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(max(names, key=names.count))} is there twice")
    return found


def check_depth(value: dict[str, Any], where: object) -> None:
    """Raises UserError for what could not be shown, compared or written any more."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner = [value for holder in level for value in (holder.values() if isinstance(holder, dict) else holder)]
        level = [value for value in inner if isinstance(value, dict | list)]
    if level:
        raise UserError(f"{where}: more than {DEEPEST} lists and objects in each other")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Readable JSON. A lone surrogate, as in the name of a file that is not UTF-8, becomes JSON's escape for it."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def replace_json(path: Path, content: dict[str, Any]) -> None:
    """`write_json` by way of PATH.new, a rename of which a kill leaves the file before or all of this one."""
    aside = path.with_name(f"{path.name}.new")
    write_json(aside, content)
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def check_output(option: str, path: str | Path | None, inputs: Iterable[str | Path] = ()) -> None:
    """Before any work: raises UserError for a file that could not be written after it, or that is an input.

    Inputs may be directories. What lies in one is an input too, unless it is a result of an earlier run or a figure.
    """
    if path is None:
        return
    where, real = f"{option} {path}", os.path.realpath(path)
    if os.path.isdir(real) or str(path).endswith(os.sep):
        raise UserError(f"{where}: this is a directory; give a file")
    try:
        exists = bool(os.stat(path))
    except FileNotFoundError:
        exists = False
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    if not os.path.isdir(os.path.dirname(real)):
        raise UserError(f"{where}: its directory does not exist")
    if not os.access(path if exists else os.path.dirname(real), os.W_OK):
        raise UserError(f"{where}: cannot be written there")
    for source in inputs:
        held = os.path.realpath(source)
        is_same = held == real or (exists and os.path.exists(source) and os.path.samefile(source, path))
        inside = exists and os.path.isdir(held) and real.startswith(os.path.join(held, "")) and not _is_result(real)
        if is_same or inside:
            raise UserError(f"{where}: this is an input{f', of {source}' if inside else ''}; give another file")


def _is_result(path: str) -> bool:
    if path.lower().endswith(FIGURES):
        return True
    try:
        return bool(read_json_object(Path(path)).keys() & RESULTS)
    except UserError:
        return False


class Fields:
    """Typed access to a JSON object; null counts as missing. `where` goes in front of the complaints.

    A default of None: the field has to be there.
    """

    def __init__(self, fields: dict[str, Any], where: object) -> None:
        self.fields, self.where = fields, str(where)

    def given(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def _read(self, name: str, default: Any, fits: Callable[[Any], bool], what: str) -> Any:
        value = self.fields[name] if self.given(name) else default
        if not fits(value):
            raise UserError(f"{self.where}: {name} must be {what}, not {shown(self.fields.get(name))}")
        return value

    def integer(self, name: str, default: int | None = None, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        what = f"a whole number from {minimum} to {maximum}"
        return self._read(name, default, lambda value: type(value) is int and minimum <= value <= maximum, what)

    def number(self, name: str, default: float | None = None, minimum: float = 0.0) -> float:
        what = f"a number above {minimum}"
        return float(self._read(name, default, lambda value: is_number(value) and minimum < value < 1e30, what))

    def boolean(self, name: str, default: bool) -> bool:
        return self._read(name, default, lambda value: type(value) is bool, "true or false")

    def string(self, name: str, allow_empty: bool = True) -> str:
        return self._read(name, None, lambda value: isinstance(value, str) and bool(value or allow_empty), "a text")

    def strings(self, name: str) -> list[str]:
        return self._read(name, None, is_texts, "a list of texts")

    def array(self, name: str, default: list[Any] | None = None) -> list[Any]:
        return self._read(name, default, lambda value: isinstance(value, list), "a list")

    def object(self, name: str, default: dict[str, Any] | None = None) -> "Fields":
        value = self._read(name, default, lambda value: isinstance(value, dict), "an object")
        return Fields(value, f"{self.where}: {name}")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
