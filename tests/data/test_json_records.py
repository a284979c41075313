"""Files of JSON, lines and arrays, to records: where each is cut, what is malformed, what stays out of memory."""

import gzip
import io
import json
import tracemalloc

import pytest
import zstandard
from document_files import error_of, places_of, texts_of
from hypothesis import given
from hypothesis import strategies as st

from elo.data import json_records
from elo.data.json_records import LARGEST_RECORD, place, read_json_records

# As published: allenai/c4 (en/c4-train.00000-of-01024.json.gz) and allenai/dolma (v1_6).
C4 = {"text": 'Beginners BBQ Class!\nDo "you" want\u2026', "timestamp": "2019-04-25T12:57:54Z", "url": "http://a.b"}
DOLMA = {
    "id": "http://a.b", "text": "둘째 [문서, {1}]", "source": "common-crawl", "added": "2023-04-11",
    "created": "2020-01-17", "metadata": {"provenance": "a-0.json.gz:3", "tags": [[1, 2], []]},
}  # fmt: skip
RECORDS = [C4, DOLMA, {"text": "third \\"}]
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def write(path, data):
    path.write_bytes(PACK.get(path.suffix, bytes)(data))
    return path


@pytest.mark.parametrize("ending", [".json", ".ndjson", ".jsonl"])
@pytest.mark.parametrize("packing", PACK)
def test_lines_and_arrays(tmp_path, ending, packing):
    expected = [(number, record["text"]) for number, record in enumerate(RECORDS, start=1)]
    layouts = {
        "lines": "".join(json.dumps(record) + "\n" for record in RECORDS),
        "unescaped": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS),
        "array": json.dumps(RECORDS),
        "pretty": "\n \n" + json.dumps(RECORDS, indent=4, ensure_ascii=False) + "\n\n",
        "with a mark": "\ufeff" + json.dumps(RECORDS),
        "one line each": "[" + ",\n".join(map(json.dumps, RECORDS)) + "\n]",
        "an element a line": "[\r\n" + "\r\n, ".join(map(json.dumps, RECORDS)) + "\r\n]",
    }
    for name, text in layouts.items():
        path = write(tmp_path / f"{name}{ending}{packing}", text.encode())
        assert places_of(path) == expected, name


def test_an_array_without_elements(tmp_path):
    for text in (b"[]", b" [\n]\n", b""):
        assert texts_of(write(tmp_path / "a.json", text)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'[{"text": "a"}, 3]', " record 2: not a JSON object"),
        (b'[{"text": "a"},\n\n\n {"text": "b", "c": }]', " record 2: not valid JSON (Expecting value, column 20)"),
        (b'[{"text": "a"},]', " record 2: not valid JSON (Expecting value, column 1)"),
        (b'[{"text": "a"},,{"text": "b"}]', " record 2: not valid JSON"),
        (b'[{"text": "a"}, {"body": "b"}]', " record 2: no field 'text' (it has 'body')"),
        (b'[{"text": "a"},\n{"text":\n"\xff"}]', " record 2: invalid UTF-8 (byte 0xff)"),
        (b'[{"text": "a"}, {"text": "b"', ": damaged or incomplete: it ends within its array"),
        (b'[{"text": "a"}', ": damaged or incomplete: it ends within its array"),
        (b'[{"text": "a"},', ": damaged or incomplete: it ends within its array"),
        (b'[{"text": "a"}] \n [', ": damaged or incomplete: behind its array there is b'['"),
        (b'[{"text": "a"}, {"text": "b]', ": damaged or incomplete: it ends within its array"),
        (b"[[1]]", ":1: not a JSON object"),
        (b'{"text": "a"}\n[{"text": "a"}]', ":2: not a JSON object"),
        (b'{\n"text": "a"\n}', ":1: not valid JSON (Expecting property name enclosed in double quotes, column 2)"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    assert error_of(write(tmp_path / "a.json", text)).startswith(message)


def test_malformed_elements_are_passed_over(tmp_path):
    """Also one whose brackets do not match, and one that would not fit into memory."""
    long = b'{"text": "' + b"\\\\, ]" * (LARGEST_RECORD // 2) + b'\\""}'
    path = write(tmp_path / "a.json.gz", b'[{"text": "a"}, {"text": ["b"}, 1}, ' + long + b', {"text": "c"}]')
    tracemalloc.start()
    first, (second, _), third, last = places_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (first, second, last) == ((1, "a"), 2, (4, "c"))
    assert third == (3, f"a record of more than {LARGEST_RECORD} bytes")
    assert peak < 120e6


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a"\\[]{},글\n', max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a",]}', max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.lists(st.dictionaries(st.text(max_size=3), json_values, max_size=3), max_size=5), st.integers(1, 9), st.data()
)
def test_an_array_is_cut_between_its_elements(records, chunk, data):
    """Whatever strings hold, wherever a chunk ends, and behind elements that are too long."""
    options = {"indent": data.draw(st.none() | st.just(1)), "ensure_ascii": data.draw(st.booleans())}
    encoded = json.dumps(records, **options).encode()
    split = data.draw(st.integers(1, len(encoded)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "CHUNK", chunk)
        longest = data.draw(st.sampled_from([4, 10**6]))
        patch.setattr(json_records, "LARGEST_RECORD", longest)
        found = list(json_records._elements(encoded[:split], io.BytesIO(encoded[split:])))
    assert len(found) == len(records)
    for element, record in zip(found, records, strict=True):
        assert json.loads(element) == record if element is not None else longest == 4


def test_a_long_file_stays_out_of_memory(tmp_path):
    """100 MB of an array on one line."""
    element = json.dumps({"text": "x" * 10**6}).encode()
    path = write(tmp_path / "a.json.gz", b"[" + b",".join([element] * 100) + b"]")
    tracemalloc.start()
    total = sum(len(raw) for _, raw, _ in read_json_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 100 * len(element)
    assert peak < 80e6


def test_place(tmp_path):
    assert place(write(tmp_path / "a.json.gz", b'[{"text": "a"}]'), 7) == f"{tmp_path}/a.json.gz record 7"
    assert place(write(tmp_path / "b.json", b'{"text": "a"}'), 7) == f"{tmp_path}/b.json:7"
    assert place(tmp_path / "missing.json", 7) == f"{tmp_path}/missing.json:7"
    assert place(tmp_path / "c.parquet", 7) == f"{tmp_path}/c.parquet:7"
