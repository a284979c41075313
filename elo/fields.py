"""JSON files and typed access to their fields, with errors that name the file and the field."""

import json
from pathlib import Path
from typing import Any

from elo.errors import UserError


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a UserError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object was expected, found {type(value).__name__}")
    return value


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Fields:
    """Typed access to a JSON object; null counts as missing. `where` goes in front of the complaints."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields, self.where = fields, where

    def given(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def integer(self, name: str, default: int | None = None, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        value = self.fields[name] if self.given(name) else default
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise UserError(
                f"{self.where}: {name} must be a whole number from {minimum} to {maximum}, "
                f"not {self.fields.get(name)!r}"
            )
        return value

    def number(self, name: str, default: float | None = None, minimum: float = 0.0) -> float:
        value = self.fields[name] if self.given(name) else default
        if not isinstance(value, int | float) or isinstance(value, bool) or not minimum < value < 1e30:
            raise UserError(f"{self.where}: {name} must be a number above {minimum}, not {self.fields.get(name)!r}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.fields[name] if self.given(name) else default
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {name} must be true or false, not {value!r}")
        return value
