"""Benchmark files as published: JSON lines, CSV, TSV and Parquet to records with typed fields.

Every complaint is one line that names the file and the line or row.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import Fields, shown
from elo.common.files import read_file_lines
from elo.common.terminal import note
from elo.data.parquet import read_rows
from eval.jsonl import LARGEST, LONGEST_LINE, read_lines

TABLE_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # .json: JSON lines too, as JGLUE names them


class Record(Fields):
    """One row of a file; `where` names it in complaints. Each getter takes a field's names in different editions."""

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def get(self, *names: str) -> Any:
        for name in names:
            if name in self.fields:
                return self.fields[name]
        wanted = " or ".join(map(repr, names))
        raise UserError(f"{self.where}: no column {wanted}; it has {', '.join(map(repr, self.fields)) or 'none'}")

    def text(self, *names: str) -> str:
        return self._checked(self.get(*names), names[0])

    def texts(self, name: str, count: int) -> list[str]:
        """A field that is a list of `count` texts."""
        value = self.get(name)
        if not isinstance(value, list) or len(value) != count:
            raise UserError(f"{self.where}: {name!r} must be a list of {count} texts, not {shown(value)}")
        return [self._checked(text, name) for text in value]

    def _checked(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise UserError(f"{self.where}: {name!r} must be text, not {shown(value)}")
        return value

    def label(self, labels: Sequence[str], *names: str) -> int:
        """The index of the right choice: the field is one of `labels`, or, where these are words, the index itself."""
        value = self.get(*names)
        indices = [] if labels[0].isdigit() else list(map(str, range(len(labels))))
        for known in (labels, indices):
            if (text := str(value).strip()) in known:
                return known.index(text)
        raise UserError(
            f"{self.where}: the label {names[0]!r} is {shown(value)}; it should be one of {', '.join(labels)}"
            + (f" (or 0 to {len(labels) - 1})" if indices else "")
        )


def find(data: Path, stems: Sequence[str]) -> list[Path]:
    """The file of one split, or its Parquet shards, below `data`; [] if there is none.

    stems: where it may be, without its ending. `a/test` is found as a/test.jsonl (.json, .csv, .tsv, .parquet), and in
    the Hugging Face layouts a/test-00000-of-00001.parquet and a/test/0000.parquet.
    """
    found: list[list[Path]] = []
    for stem in stems:
        path = data / stem
        found += [[file] for ending in TABLE_ENDINGS if (file := path.with_name(path.name + ending)).is_file()]
        shards = sorted(path.parent.glob(f"{path.name}-*-of-*.parquet"))
        numbers = {int(of) for shard in shards for of in re.findall(r"-of-(\d{1,9})", shard.name)}
        if shards and numbers != {len(shards)}:
            raise UserError(f"{shards[0]}: {len(shards)} shards of {path.name} are there, not as many as it says")
        found += [shards, sorted(path.glob("*.parquet"))]
    found = [files for files in found if files]
    if len(found) > 1 and not found[0][0].samefile(found[1][0]):  # the same where case does not count
        raise UserError(f"{found[0][0]} and {found[1][0]} are the same split twice; keep one of them")
    return found[0] if found else []


def read(paths: Sequence[Path], columns: Sequence[str] = ()) -> list[Record]:
    """All records of the files of a split. columns: the names of a CSV file's columns, which has no header then."""
    records = []
    for path in paths:
        reader = {".parquet": _parquet, ".csv": _table, ".tsv": _table}.get(path.suffix, _json_lines)
        records += reader(path, columns)
    if not records:
        raise UserError(f"{paths[0]}: it has no records")
    return records


def _json_lines(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    return (Record(line.record, line.where) for line in read_lines(path))


def _table(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """CSV, or TSV with a header, of which rows with an empty cell are passed over, as by skt/kobest_v1's loader."""
    tsv = path.suffix == ".tsv"
    names = [] if tsv else list(columns)
    lines = (line.decode("utf-8") for line in read_file_lines(path, LARGEST, LONGEST_LINE))
    lines = (line.removeprefix("\ufeff") if number == 0 else line for number, line in enumerate(lines))
    rows = csv.reader(lines, delimiter="\t" if tsv else ",")
    try:
        for row in rows:
            if not row:
                continue
            if not names:
                names = [name.strip() for name in row]
                if twice := [name for name in names if name and names.count(name) > 1]:
                    raise UserError(f"{path}:{rows.line_num}: two columns are named {shown(twice[0])}")
                continue
            where = f"{path}:{rows.line_num}"
            if tsv and (len(row) < len(names) or not all(row)):
                note(f"{where}: passed over, since a cell is empty")
                continue
            if len(row) != len(names):
                raise UserError(f"{where}: {len(row)} columns instead of {len(names)} ({', '.join(names)})")
            yield Record(dict(zip(names, row, strict=True)), where)
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{rows.line_num + 1}: not UTF-8 text: {error}") from None


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    rows = enumerate(read_rows(path, largest=LARGEST), start=1)
    return (Record(fields, f"{path}: row {number}") for number, fields in rows)
