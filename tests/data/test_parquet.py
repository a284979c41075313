"""Parquet files of documents: kinds of strings, encryption, malformed rows."""

import base64

import pyarrow
import pyarrow.parquet
import pytest
from document_files import TEXTS, error_of, places_of, texts_of, write_parquet

KINDS = [
    f"{size}{kind}{view}" for kind in ("string", "binary") for size, view in (("", ""), ("large_", ""), ("", "_view"))
]
DICTIONARIES = [pyarrow.dictionary(pyarrow.int32(), kind) for kind in ("string", "large_string", "binary")]


@pytest.mark.parametrize("kind", KINDS + DICTIONARIES, ids=str)
def test_parquet_string_types_and_row_groups(tmp_path, kind):
    """Also bytes, as of writers that do not say that theirs are UTF-8."""
    texts = [f"줄 {row % 7}" for row in range(500)]
    values = [text.encode() for text in texts] if "binary" in str(kind) else texts
    write_parquet(tmp_path / "a.parquet", values, kind=kind, row_group_size=150)
    assert texts_of(tmp_path / "a.parquet") == texts
    write_parquet(tmp_path / "b.parquet", [b"a", b"line\n\xff", None], kind="binary")
    assert error_of(tmp_path / "b.parquet") == ":2: invalid UTF-8 (byte 0xff)"


@pytest.mark.parametrize("plaintext_footer", [False, True])
def test_encrypted_parquet(tmp_path, plaintext_footer):
    encryption = pytest.importorskip("pyarrow.parquet.encryption", reason="pyarrow was built without encryption")

    class Client(encryption.KmsClient):
        def __init__(self, _):
            encryption.KmsClient.__init__(self)

        def wrap_key(self, key, _):
            return base64.b64encode(key)

    how = encryption.EncryptionConfiguration("f", column_keys={"t": ["text"]}, plaintext_footer=plaintext_footer)
    keys = encryption.CryptoFactory(Client).file_encryption_properties(encryption.KmsConnectionConfig(), how)
    table = pyarrow.table({"text": ["a"]})
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", table.schema, encryption_properties=keys) as writer:
        writer.write_table(table)
    assert error_of(tmp_path / "a.parquet").startswith(": it is encrypted; write it again without: ")


def test_malformed_parquet_rows(tmp_path):
    path = tmp_path / "a.parquet"
    not_utf8 = pyarrow.array([b"one", None, b"", b"\xff", b"two"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": not_utf8}), path)
    assert error_of(path) == ":2: field 'text' is null"
    wrong = [(2, "field 'text' is null"), (3, "empty document"), (4, "invalid UTF-8 (byte 0xff)")]
    assert places_of(path) == [(1, "one"), *wrong, (5, "two")]


def test_parquet_without_the_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, "body")
    assert error_of(tmp_path / "a.parquet") == ": needs one column 'text', and has id, body"
    assert error_of(tmp_path / "a.parquet", text_field="id") == ": column 'id' holds int64, not strings"
    for kind in (pyarrow.list_(pyarrow.string()), pyarrow.list_(pyarrow.string(), 1)):
        write_parquet(tmp_path / "b.parquet", [["a"]], kind=kind)
        assert error_of(tmp_path / "b.parquet").startswith(": column 'text' holds ")


def test_a_column_is_not_the_field_of_another_with_that_path(tmp_path):
    table = pyarrow.table({"data": [{"text": "x"}], "data.text": ["y"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", text_field="data.text") == ["y"]
