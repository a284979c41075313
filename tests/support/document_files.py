"""Files of documents in every format, and what reading one gives."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from elo.common.errors import UserError
from elo.data.documents import MalformedError, read_documents, read_records

TEXTS = ["첫째 문서.\n둘째 줄.", "A second one, with \r\n and \0 and 😀.", "\ufeffthird"]


def json_lines(texts, field="text"):
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


def write_parquet(path, texts, field="text", kind=None, **options):
    table = pyarrow.table({"id": list(range(len(texts))), field: pyarrow.array(texts, kind)})
    pyarrow.parquet.write_table(table, path, **options)


def write_all_formats(directory):
    """The same texts in every format that holds many documents; the names of the files."""
    packed = json_lines(TEXTS)
    (directory / "a.jsonl").write_bytes(packed)
    (directory / "b.jsonl.gz").write_bytes(gzip.compress(packed))
    (directory / "c.jsonl.zst").write_bytes(zstandard.compress(packed))
    write_parquet(directory / "d.parquet", TEXTS)
    return ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"]


def texts_of(path, **options):
    return list(read_documents([path], **options))


def places_of(path):
    """(line, text) of every document, and (line, what is wrong) of every malformed record."""
    found = []
    for record in read_records(path, "text"):
        try:
            found += [(record.line, text) for text in record.texts("text")]
        except MalformedError as error:
            found.append((error.line, str(error)))
    return found


def error_of(path, **options):
    with pytest.raises(UserError) as caught:
        list(read_documents([path], **options))
    return str(caught.value).removeprefix(str(path))
