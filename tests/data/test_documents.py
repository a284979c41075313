"""Files of every format to documents, and what is wrong with a file named with its line."""

import io

import pytest
from document_files import TEXTS, error_of, json_lines, places_of, texts_of, write_all_formats, write_parquet
from hypothesis import given
from hypothesis import strategies as st

from elo.data import documents
from elo.data.documents import MAX_DOCUMENT
from elo.data.json_records import LARGEST_RECORD


def test_every_format_gives_the_same_documents(tmp_path):
    for name in write_all_formats(tmp_path):
        assert places_of(tmp_path / name) == list(enumerate(TEXTS, start=1)), name


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfFirst line.\r\nSecond\0 line.\rStill the second.\n")
    assert places_of(path) == [(1, "First line.\nSecond\0 line.\rStill the second.\n")]


def test_json_lines_with_mark_blank_lines_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two", "more": [1, NaN]}\n{"text": "three"}')
    assert places_of(path) == [(1, "one"), (4, "two"), (5, "three")]


def test_a_field_that_is_there_twice(tmp_path):
    """One of the two texts would be lost, and readers do not agree which one."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two", "text": "three"}\n')
    assert error_of(path) == ":2: not usable JSON ('text' is there twice)"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_utf_16_without_a_mark(encoding, tmp_path):
    """Of ASCII it is UTF-8 too, every other character NUL."""
    (tmp_path / "a.txt").write_bytes("First line.\nSecond.".encode(encoding))
    assert error_of(tmp_path / "a.txt") == ":1: UTF-16 or UTF-32, not UTF-8"


def test_another_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS, "body"))
    write_parquet(tmp_path / "b.parquet", TEXTS, "body")
    assert texts_of(tmp_path / "a.jsonl", text_field="body") == TEXTS
    assert texts_of(tmp_path / "b.parquet", text_field="body") == TEXTS


def test_a_long_text_is_cut_after_line_ends(tmp_path):
    lines = [f"line {number} " + "글" * 50 + "\n" for number in range(10_000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    (tmp_path / "b.jsonl").write_bytes(json_lines(["".join(lines)]))
    pieces = places_of(tmp_path / "a.txt")
    assert len(pieces) > 2
    assert "".join(text for _, text in pieces) == "".join(lines)
    for line, text in pieces:
        assert len(text.encode()) <= MAX_DOCUMENT
        assert text.startswith(f"line {line - 1} ")
    assert texts_of(tmp_path / "b.jsonl") == [text for _, text in pieces]


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
    assert texts_of(path, skip_malformed=True) == ["one", "two"]
    assert [line for line, _ in places_of(path)] == [1, 3, 4]


def test_malformed_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf \r\n\n")
    assert error_of(tmp_path / "a.txt") == ":3: invalid UTF-8 (byte 0xff)"
    assert error_of(tmp_path / "b.txt") == ":1: empty document"
    assert error_of(tmp_path / "c.txt") == ":1: empty document"


def test_files_that_cannot_be_read(tmp_path):
    assert error_of(tmp_path / "a.jsonl") == ": cannot be read: No such file or directory"
    assert error_of(tmp_path / "a.parquet") == ": cannot be read: No such file or directory"
    (tmp_path / "b.txt").mkdir()
    assert error_of(tmp_path / "b.txt") == ": cannot be read: Is a directory"
    (tmp_path / "c.csv").touch()
    assert error_of(tmp_path / "c.csv").startswith(": not a text file; supported are .txt, .jsonl, ")
