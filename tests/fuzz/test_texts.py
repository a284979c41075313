"""Hostile corpora: lines, bytes, packing, Parquet, what is no file; and a token cache that was tampered with."""

import gzip
import json

import pyarrow
import pytest
import zstandard
from artifacts import CONVERSATIONS, RECORDS, TEXTS, json_lines, packed, parquet
from harness import CASES, case_directory, cases, make_what_is_no_file, result_or_user_error
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import changed_bytes, changed_json, changed_json_file, dumped
from small_tokenizer import write_tokenizer

from elo.data.conversation_records import read_conversation_records, read_language, read_messages
from elo.data.documents import MalformedError, read_documents
from elo.data.finding import find_files
from elo.data.shards import TokenShard, tokenize

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp949", "latin-1", "shift-jis"]


def read(path, skip):
    """All documents of a file; their text is text."""
    for text in read_documents(find_files([path]), skip_malformed=skip):
        assert text.encode("utf-8").strip()


@st.composite
def lines(draw, records):
    """Lines of JSON, some of them hostile, in some encoding, with some ends."""
    made = []
    for record in draw(st.lists(st.sampled_from(records), min_size=1, max_size=6)):
        if draw(st.booleans()):
            record = draw(changed_json(record, most=2))
        line = dumped(record)
        if draw(st.integers(0, 4)) == 0:
            line = draw(changed_bytes(line, most=2))
        encoding = draw(st.sampled_from(["utf-8"] * 12 + ENCODINGS))
        if encoding != "utf-8":
            line = line.decode("utf-8", "replace").encode(encoding, "replace")
        special = [
            b"",
            b"\0",
            b"[" * 50_000,
            b'{"text": 1e999}',
            b'{"text": "\\ud83d"}',
            b"9" * 5000,
            b'{"text": null}',
        ]
        made.append(draw(st.sampled_from([line] * 15 + special)))
    return draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\r", b"\n\n\0\n", b"\xe2\x80\xa8"])).join(made)


@cases(60, share=1.3)
@given(lines(RECORDS), st.booleans(), st.sampled_from(["a.jsonl", "a.ndjson.gz", "a.json.zst", "a.txt", "a.txt.gz"]))
@example(b"", False, "a.jsonl")
@example(b"\xef\xbb\xbf", False, "a.txt")
def test_lines(data, skip, name):
    with case_directory() as directory:
        (directory / name).write_bytes(packed(data, name))
        result_or_user_error(lambda: read(directory / name, skip))


@cases(40)
@given(changed_json_file(RECORDS), st.booleans(), st.sampled_from(["a.json", "a.json.gz", "a.json.zst"]))
@example(b"[" * 10**6, True, "a.json")
@example(b'[{"text": "' + b'\\"' * 10**7, True, "a.json.gz")
@example(b"[{}, " + b"\0" * 10**8, True, "a.json.zst")
def test_arrays(data, skip, name):
    with case_directory() as directory:
        (directory / name).write_bytes(packed(data, name))
        result_or_user_error(lambda: read(directory / name, skip))


WHOLE = {name: packed(json_lines(RECORDS), name) for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst")}
WHOLE["a.jsonl.gz"] += WHOLE["a.jsonl.gz"]
WHOLE["a.jsonl.zst"] += zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(b"{}")


@cases(50)
@given(st.data(), st.sampled_from(sorted(WHOLE)))
def test_bytes(data, name):
    with case_directory() as directory:
        (directory / name).write_bytes(data.draw(changed_bytes(WHOLE[name])))
        result_or_user_error(lambda: read(directory / name, data.draw(st.booleans())))


DOCUMENTS = parquet({"id": [1, 2, 3, 4, 5], "text": TEXTS}, compression="zstd", row_group_size=3)
TYPES = [
    pyarrow.array(["x", None, "y"]),
    pyarrow.array([b"x", b"\xff", None], pyarrow.binary()),
    pyarrow.array(["x", "y", "x"]).dictionary_encode(),
    pyarrow.array([["x"], [], None]),
    pyarrow.array([{"a": 1}, None, {"a": 2}]),
    pyarrow.array([1, 2, 3]),
    pyarrow.array([None, None, None]),
    pyarrow.array([10**18, 0, -(10**18)], pyarrow.timestamp("ns")),
    pyarrow.array(["x", "y", "z"], pyarrow.large_string()),
    pyarrow.array([b"\xff", b"ok", b"\xed\xa0\x80"], pyarrow.binary()).view(pyarrow.string()),
]


@cases(40, share=0.7)
@given(st.data())
def test_parquet(data):
    with case_directory() as directory:
        tail = len(DOCUMENTS) - int.from_bytes(DOCUMENTS[-8:-4], "little") - 8
        footer = changed_bytes(DOCUMENTS[tail:]).map(DOCUMENTS[:tail].__add__)
        changed = data.draw(st.one_of(changed_bytes(DOCUMENTS), footer))
        (directory / "a.parquet").write_bytes(changed)
        result_or_user_error(lambda: read(directory / "a.parquet", data.draw(st.booleans())))


@pytest.mark.parametrize("column", TYPES, ids=lambda column: str(column.type))
def test_parquet_types(column):
    with case_directory() as directory:
        (directory / "a.parquet").write_bytes(parquet({"text": column}))
        result_or_user_error(lambda: read(directory / "a.parquet", skip=True))


def gzip_bomb(megabytes, line):
    """A gzip file of so many megabytes, as one line or as lines that mean nothing."""
    block = (b" " * 99 + b"\n") * 10_486 if line else b" " * 2**20
    return gzip.compress(block) * megabytes


BOMBS = {
    "a line of 100 MB": ("a.jsonl", lambda: b'{"text": "' + b"x" * 10**8 + b'"}\n{"text": "ok"}'),
    "100 MB without a line end": ("a.txt", lambda: b"x" * 10**8),
    "100 MB of NUL": ("a.jsonl", lambda: b"\0" * 10**8),
    "10 MB of blank lines": ("a.jsonl", lambda: b"\n" * 10**7),
    "gzip, one line of 1 GB": ("a.jsonl.gz", lambda: gzip_bomb(1000, line=False)),
    "gzip, 300 MB of blank lines": ("a.jsonl.gz", lambda: gzip_bomb(300, line=True)),
    "zstd, one line of 2 GB": ("a.jsonl.zst", lambda: zstandard.compress(b" " * 10**8) * 20),
    "zstd, a window of 2 GB": ("a.jsonl.zst", lambda: b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\x00\x00" * 9),
    "16 MB of brackets": ("a.jsonl", lambda: b"[" * (15 << 20) + b"\n"),
    "16 MB of empty lists": ("a.jsonl", lambda: b'{"a": [' + b"[]," * (5 << 20) + b"[]]}\n"),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("skip", [False, True] if CASES else [True])
def test_bombs(name, skip):
    file, make = BOMBS[name]
    with case_directory() as directory:
        (directory / file).write_bytes(make())
        result_or_user_error(lambda: read(directory / file, skip))


def test_parquet_bomb():
    """A dictionary writes a text of megabytes once, for thousands of rows."""
    column = pyarrow.DictionaryArray.from_arrays([0] * 24, ["x" * (20 << 20)])
    with case_directory() as directory:
        (directory / "a.parquet").write_bytes(parquet({"text": column}, compression="zstd", store_schema=False))
        assert (directory / "a.parquet").stat().st_size < 10**6
        result_or_user_error(lambda: read(directory / "a.parquet", skip=True))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.zst", "a.txt", "a.parquet", "a.json"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "link to /dev/zero", "broken link", "loop"])
@pytest.mark.parametrize("within", [False, True], ids=["named", "in a directory"])
def test_what_is_no_file(name, kind, within):
    with case_directory() as directory:
        path = directory / name
        make_what_is_no_file(path, kind)
        result_or_user_error(lambda: read(directory if within else path, skip=True))
        result_or_user_error(lambda: list(read_conversation_records(str(path))))
        from elo.data.shards import _states

        result_or_user_error(lambda: _states([str(path)]))


# ---- conversations


def converse(path):
    for _, record in read_conversation_records(str(path)):
        try:
            read_language(record)
            read_messages(record, set())
        except MalformedError as error:
            str(error)


CHATS = parquet({"language": ["ko", "en"], "conversations": [CONVERSATIONS[1]["conversations"]] * 2})


@cases(60, share=1.5)
@given(st.data(), st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"]))
def test_conversations(data, name):
    with case_directory() as directory:
        if name == "a.json":
            content = data.draw(changed_json_file(CONVERSATIONS))
        elif name == "a.parquet":
            content = data.draw(changed_bytes(CHATS))
        else:
            content = packed(data.draw(lines(CONVERSATIONS)), name)
        (directory / name).write_bytes(content)
        result_or_user_error(lambda: converse(directory / name))


@pytest.mark.parametrize("column", TYPES, ids=lambda column: str(column.type))
@pytest.mark.parametrize("name", ["language", "messages"])
def test_columns_of_conversations(column, name):
    turns = pyarrow.array([CONVERSATIONS[0]["messages"]] * 3)
    with case_directory() as directory:
        columns = {"language": column, "messages": turns} if name == "language" else {"messages": column}
        (directory / "a.parquet").write_bytes(parquet(columns))
        result_or_user_error(lambda: converse(directory / "a.parquet"))


# ---- the token cache


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@cases(30)
@given(st.data())
def test_token_cache(tokenizer, data):
    with case_directory() as directory:
        (directory / "a.jsonl").write_bytes(json_lines(RECORDS[:4]))

        def build():
            files = [str(directory / "a.jsonl")]
            return tokenize(files, tokenizer, directory / "cache", workers=1, progress=False)

        first = build()
        tokens, documents, digest = first.tokens.tolist(), first.documents.tolist(), first.digest
        del first  # it maps the files that are now written to
        (shard,) = (directory / "cache").iterdir()
        if data.draw(st.booleans()):
            meta = json.loads((shard / "meta.json").read_bytes())
            (shard / "meta.json").write_bytes(data.draw(changed_json_file(meta)))
        else:
            path = shard / data.draw(st.sampled_from(["tokens.bin", "documents.bin", "counts.bin"]))
            path.write_bytes(data.draw(st.sampled_from([b"", b"\0" * 7, b"\xff" * 5000])))
        again = result_or_user_error(build, writes=directory)
        if again is not None and again.digest == digest:
            assert isinstance(again, TokenShard)
            assert again.tokens.tolist() == tokens
            assert again.documents.tolist() == documents
            [again.place(number) for number in range(len(again.documents))]
            again.skipped_report()
