"""Files of every format to documents, and what is wrong with a file named with its line."""

import base64
import gzip
import io
import json
import sys
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from elo.common.errors import UserError
from elo.data import documents
from elo.data.documents import MAX_DOCUMENT, Document, MalformedError, read_documents
from elo.data.json_records import LARGEST_RECORD

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
    return [document.text for document in read_documents([path], **options)]


def error_of(path, **options):
    with pytest.raises(UserError) as caught:
        list(read_documents([path], **options))
    return str(caught.value).removeprefix(str(path))


# ---- formats


def test_every_format_gives_the_same_documents(tmp_path):
    for name in write_all_formats(tmp_path):
        path = tmp_path / name
        expected = [Document(text, str(path), line) for line, text in enumerate(TEXTS, start=1)]
        assert list(read_documents([path])) == expected, name


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfFirst line.\r\nSecond\0 line.\rStill the second.\n")
    assert list(read_documents([path])) == [Document("First line.\nSecond\0 line.\rStill the second.\n", str(path), 1)]


def test_json_lines_with_mark_blank_lines_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two", "more": [1, NaN]}\n{"text": "three"}')
    assert [(found.text, found.line) for found in read_documents([path])] == [("one", 1), ("two", 4), ("three", 5)]


def test_another_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS, "body"))
    write_parquet(tmp_path / "b.parquet", TEXTS, "body")
    assert texts_of(tmp_path / "a.jsonl", text_field="body") == TEXTS
    assert texts_of(tmp_path / "b.parquet", text_field="body") == TEXTS


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
    write_parquet(tmp_path / "b.parquet", [b"a", b"\xff", None], kind="binary")
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


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_packed_text_files(tmp_path, packing):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing]
    (tmp_path / f"a.txt{packing}").write_bytes(pack(b"\xef\xbb\xbfone\r\ntwo\n"))
    assert texts_of(tmp_path / f"a.txt{packing}") == ["one\ntwo\n"]


def test_gzip_of_several_members(tmp_path):
    """As of `cat a.gz b.gz`; and cut short in its second one."""
    packed = b"".join(gzip.compress(json_lines([text])) for text in TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    assert texts_of(tmp_path / "a.jsonl.gz") == TEXTS
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-12])
    assert error_of(tmp_path / "a.jsonl.gz").startswith(": damaged or incomplete: ")


def zstd_long(data, window_log):
    """As `zstd --long` from a pipe, which does not say the size."""
    options = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=options).compressobj()
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("window_log", [28, 31])
def test_zst_with_a_long_window(tmp_path, window_log):
    packed = zstd_long(json_lines(TEXTS), window_log)
    assert zstandard.get_frame_parameters(packed).window_size == 2**window_log
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert texts_of(tmp_path / "a.jsonl.zst") == TEXTS
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-5])
    assert error_of(tmp_path / "a.jsonl.zst") == ": damaged or incomplete: the file ends within a frame"


def test_zst_that_cannot_be_unpacked_is_not_called_damaged(tmp_path, monkeypatch):
    header = zstd_long(b"x", 31)
    (tmp_path / "a.json.zst").write_bytes(header[:5] + b"\xb0" + header[6:])  # a window of 4 GiB
    advice = "; pack it again without a dictionary and with `--long=31` at most, which needs 2 GiB"
    too_much = ": zstd decompressor error: Frame requires too much memory for decoding"
    assert error_of(tmp_path / "a.json.zst") == too_much + advice
    dictionary = zstandard.train_dictionary(2**12, [json_lines([f"{number}" * 9]) for number in range(2**12)])
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(json_lines(TEXTS))
    (tmp_path / "b.json.zst").write_bytes(packed)
    assert error_of(tmp_path / "b.json.zst") == ": zstd decompressor error: Dictionary mismatch" + advice

    class NoMemory:
        def __init__(self, **_):
            raise MemoryError

    monkeypatch.setattr(zstandard, "ZstdDecompressor", NoMemory)
    assert error_of(tmp_path / "a.json.zst") == ": not enough memory" + advice


def test_zst_of_several_frames(tmp_path):
    """As `zstd` appends and `pzstd` writes, with a skippable frame between."""
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    frames = [zstandard.compress(json_lines([text])) for text in TEXTS]
    (tmp_path / "a.jsonl.zst").write_bytes(skippable.join(frames))
    assert texts_of(tmp_path / "a.jsonl.zst") == TEXTS


def test_a_long_text_is_cut_after_line_ends(tmp_path):
    lines = [f"line {number} " + "글" * 50 + "\n" for number in range(10_000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    (tmp_path / "b.jsonl").write_bytes(json_lines(["".join(lines)]))
    from_text = list(read_documents([tmp_path / "a.txt"]))
    assert len(from_text) > 2
    assert "".join(found.text for found in from_text) == "".join(lines)
    for found in from_text:
        assert len(found.text.encode()) <= MAX_DOCUMENT
        assert found.text.startswith(f"line {found.line - 1} ")
    assert texts_of(tmp_path / "b.jsonl") == [found.text for found in from_text]


@given(st.text(alphabet="a글😀\n \u3000", max_size=60), st.integers(4, 12))
def test_cutting_loses_nothing(text, longest):
    """The property that matters for any text, with documents of a few bytes instead of half a megabyte."""
    encoded = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "MAX_DOCUMENT", longest)
        pieces = list(documents._pieces(io.BytesIO(encoded)))
    assert b"".join(piece for _, piece in pieces) == encoded
    for _, piece in pieces:
        piece.decode()  # no character is cut
        assert 0 < len(piece) <= longest
    position = 0
    for line, piece in pieces:
        assert line == 1 + encoded[:position].count(b"\n")
        position += len(piece)


def test_a_text_file_may_end_in_many_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("text\n" + "\n" * 2 * MAX_DOCUMENT)
    assert "".join(texts_of(tmp_path / "a.txt")).startswith("text\n")


# ---- malformed records


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", ":3: not valid JSON (Expecting property name enclosed in double quotes, column 2)"),
        (b'{"text": "a"} {"text": "b"}', ":3: not valid JSON (Extra data, column 15)"),
        (b'"text"', ":3: not a JSON object"),
        (b"[]", ":3: not a JSON object"),
        (b'{"body": "a", "id": 3}', ":3: no field 'text' (it has 'body', 'id')"),
        (b"{}", ":3: no field 'text' (it has no fields)"),
        (b'{"text": null}', ":3: field 'text' is not a string"),
        (b'{"text": ["a"]}', ":3: field 'text' is not a string"),
        (b'{"text": ""}', ":3: empty document"),
        (b'{"text": " \\n\\u3000"}', ":3: empty document"),
        (b'{"text": "\xff"}', ":3: invalid UTF-8 (byte 0xff)"),
        ('{"text": "글"}'.encode("cp949"), ":3: invalid UTF-8 (byte 0xb1)"),
        ('{"text": "a"}'.encode("utf-16"), ":3: invalid UTF-8 (byte 0xff)"),
        (b'{"text": "\\ud800"}', ":3: a lone surrogate, which is not text"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", ":3: not usable JSON (Exceeds the limit"),
        (b'{"text": ' + b"[" * 100_000, ":3: not usable JSON (maximum recursion depth"),
        (b'{"text": "' + b"a" * LARGEST_RECORD + b'"}', f":3: a line of more than {LARGEST_RECORD} bytes"),
    ],
    ids=lambda value: value[4:] if isinstance(value, str) else "",
)
def test_a_malformed_line_is_named_or_passed_over(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    assert error_of(path).startswith(message)
    passed_over = []
    texts = texts_of(path, on_malformed=lambda path, error: passed_over.append((path, error.line)))
    assert (texts, passed_over) == (["one", "two"], [(str(path), 3)])


def test_malformed_parquet_rows(tmp_path):
    path = tmp_path / "a.parquet"
    not_utf8 = pyarrow.array([b"one", None, b"", b"\xff", b"two"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": not_utf8}), path)
    assert error_of(path) == ":2: field 'text' is null"
    found: list[MalformedError] = []
    assert texts_of(path, on_malformed=lambda _, error: found.append(error)) == ["one", "two"]
    assert [f"{error.line}: {error}" for error in found] == [
        "2: field 'text' is null",
        "3: empty document",
        "4: invalid UTF-8 (byte 0xff)",
    ]


def test_malformed_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf \r\n\n")
    assert error_of(tmp_path / "a.txt") == ":3: invalid UTF-8 (byte 0xff)"
    assert error_of(tmp_path / "b.txt") == ":1: empty document"
    assert error_of(tmp_path / "c.txt") == ":1: empty document"


# ---- files that cannot be read


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst", "d.parquet"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_a_file_that_was_cut_short(tmp_path, name, kept):
    write_all_formats(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * kept)])
    assert error_of(tmp_path / name).startswith(": damaged or incomplete: ")


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst", "d.parquet"])
def test_a_file_that_is_something_else(tmp_path, name):
    (tmp_path / name).write_bytes(json_lines(TEXTS))
    assert error_of(tmp_path / name).startswith(": damaged or incomplete: ")


def test_files_that_cannot_be_read(tmp_path):
    assert error_of(tmp_path / "a.jsonl") == ": cannot be read: No such file or directory"
    assert error_of(tmp_path / "a.parquet") == ": cannot be read: No such file or directory"
    (tmp_path / "b.txt").mkdir()
    assert error_of(tmp_path / "b.txt") == ": cannot be read: Is a directory"
    (tmp_path / "c.csv").touch()
    assert error_of(tmp_path / "c.csv").startswith(": not a text file; supported are .txt, .jsonl, ")


def test_parquet_without_the_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, "body")
    assert error_of(tmp_path / "a.parquet") == ": needs one column 'text', and has id, body"
    assert error_of(tmp_path / "a.parquet", text_field="id") == ": column 'id' holds int64, not strings"


@pytest.mark.parametrize(("name", "package"), [("c.jsonl.zst", "zstandard"), ("d.parquet", "pyarrow")])
def test_the_package_to_install_is_named(tmp_path, monkeypatch, name, package):
    write_all_formats(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    assert error_of(tmp_path / name).endswith(f"needs `pip install {package}`")


# ---- memory


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_line_of_a_gigabyte_stays_out_of_memory(tmp_path, pack):
    """A few kilobytes on disk that unpack to one endless line."""
    name = "a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst"
    (tmp_path / name).write_bytes(pack(bytes(1 << 27)) * 2 + pack(b'\n{"text": "one"}\n'))
    tracemalloc.start()
    texts = texts_of(tmp_path / name, on_malformed=lambda path, error: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["one"]
    assert peak < 120e6
