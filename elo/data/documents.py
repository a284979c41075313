"""Files of text to documents, in a stream: .txt, .jsonl, .ndjson and .json (plain, .gz, .zst), and .parquet.

Reading has two halves, so that the slower one can run in other processes: `read_records` cuts a file into raw
records, and `Record.texts` makes documents of one record.

- .jsonl, .ndjson, .json: one object a line, or an array of them, its text in one field; blank lines mean nothing.
- .parquet: one document a row, its text in one column.
- .txt: one document a file; its Windows line ends become "\n". In the other formats the text stays as it is.
- A byte order mark at the start of a file is dropped. NUL and other control characters are text.
- No document is longer than `MAX_DOCUMENT`: a longer one becomes several, cut after a line end if it has any.
  It keeps memory small, and the two languages of a mixture close to their shares.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from elo.common.errors import UserError
from elo.common.fields import unique
from elo.data.json_records import BYTE_ORDER_MARK, JSON_ENDINGS, MalformedError, place, read_json_records
from elo.data.parquet import read_texts
from elo.data.unpacking import PACKINGS, unpacked

TEXT_ENDINGS = tuple(".txt" + packing for packing in PACKINGS)
DOCUMENT_ENDINGS = (*TEXT_ENDINGS, *JSON_ENDINGS, ".parquet")
SUPPORTED = ".txt, .jsonl, .ndjson, .json (each also as .gz or .zst) and .parquet"
MAX_DOCUMENT = 512 * 1024  # bytes of UTF-8


class Record(NamedTuple):
    """A line, a row, an element or a piece of text as it stands in the file, not yet decoded."""

    line: int  # from 1; the row in a Parquet file, the number in an array of JSON
    raw: bytes | MalformedError
    kind: Literal["json", "row", "text"]
    position: int  # bytes of the file read so far, for a progress bar

    def texts(self, text_field: str) -> list[str]:
        """The documents of this record, one unless it is long. Raises `MalformedError`."""
        if isinstance(self.raw, MalformedError):
            raise self.raw
        try:
            text = self.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = self.line + (self.raw.count(b"\n", 0, error.start) if self.kind == "text" else 0)
            raise MalformedError("invalid UTF-8", f"byte 0x{self.raw[error.start]:02x}", line) from None
        if self.kind == "json":
            text = _field(text, text_field, self.line)
        elif text.count("\0") * 3 > len(text):  # it is valid UTF-8
            raise MalformedError("UTF-16 or UTF-32, not UTF-8", line=self.line)
        try:
            encoded = text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can write "\ud800", which no UTF-8 can hold
            raise MalformedError("a lone surrogate, which is not text", line=self.line) from None
        texts = [text]
        if len(encoded) > MAX_DOCUMENT:
            texts = [piece.decode("utf-8") for _, piece in _pieces(io.BytesIO(encoded))]
        texts = [text for text in texts if text and not text.isspace()]
        if not texts:
            raise MalformedError("empty document", line=self.line)
        return texts


def read_documents(
    paths: Sequence[str | Path], text_field: str = "text", skip_malformed: bool = False
) -> Iterator[str]:
    """The documents of files, in order, in bounded memory.

    A malformed record is a `UserError` with file and line unless `skip_malformed`. A file that cannot be read, is
    damaged or ends too early is one in any case.
    """
    for path in paths:
        for record in read_records(path, text_field):
            try:
                yield from record.texts(text_field)
            except MalformedError as malformed:
                if not skip_malformed:
                    raise UserError(f"{place(path, malformed.line)}: {malformed}") from None


def read_records(path: str | Path, text_field: str) -> Iterator[Record]:
    """The raw records of one file. `text_field` is for Parquet, where only that column is read."""
    name = str(path).lower()
    if name.endswith(".parquet"):
        for row, (raw, position) in enumerate(read_texts(path, text_field), start=1):
            null = MalformedError(f"field {text_field!r} is null", line=row)
            yield Record(row, null if raw is None else raw, "row", position)
    elif name.endswith(JSON_ENDINGS):
        for line, raw, position in read_json_records(path):
            yield Record(line, raw, "json", position)
    elif name.endswith(TEXT_ENDINGS):
        with unpacked(path) as (stream, file):
            yield from _text(stream, file)
    else:
        raise UserError(f"{path}: not a text file; supported are {SUPPORTED}")


def _field(text: str, text_field: str, line: int) -> str:
    """The text in one line of JSON."""
    try:
        # Behind a line end the column in an error would be another line's.
        value = json.loads(text.rstrip(), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise MalformedError("not valid JSON", f"{error.msg}, column {error.pos + 1}", line) from None
    except (ValueError, RecursionError) as error:  # a name twice, a number of 5,000 digits, 100,000 brackets
        raise MalformedError("not usable JSON", str(error), line) from None
    if not isinstance(value, dict):
        raise MalformedError("not a JSON object", line=line)
    if text_field not in value:
        names = ", ".join(map(repr, list(value)[:5]))
        raise MalformedError(f"no field {text_field!r}", f"it has {names or 'no fields'}", line)
    if not isinstance(value[text_field], str):
        raise MalformedError(f"field {text_field!r} is not a string", line=line)
    return value[text_field]


def _text(stream: BinaryIO, file: BinaryIO) -> Iterator[Record]:
    """The text of a .txt file. Windows line ends are replaced here, before anyone counts their bytes."""
    is_blank = True
    for number, (line, raw) in enumerate(_pieces(stream)):
        if number == 0:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        # Blank pieces are passed over: the last line ends of a long file are no malformed document.
        if raw and not raw.decode("utf-8", "replace").isspace():
            is_blank = False
            yield Record(line, raw.replace(b"\r\n", b"\n"), "text", file.tell())
    if is_blank:
        yield Record(1, b"", "text", file.tell())


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
