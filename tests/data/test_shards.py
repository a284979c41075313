"""Token shards: what is in them, that they are made once, and what is wrong with a corpus."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shard_files import TEXTS, error_of, finished_shards, write_json_lines
from small_tokenizer import write_tokenizer

from elo.data import encoding, shards
from elo.data.encoding import token_type_of
from elo.data.shards import tokenize
from elo.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_batches(monkeypatch):
    """A few kilobytes are then many batches, and enough work for several processes."""
    monkeypatch.setattr(encoding, "BATCH", 1000)
    monkeypatch.setattr(shards, "BATCH", 1000)


# ---- what is in a shard


def test_documents_end_to_end_with_their_places(tmp_path, build, tokenizer):
    first = write_json_lines(tmp_path / "a.jsonl", TEXTS[:2])
    (tmp_path / "b.txt").write_text(TEXTS[2])
    shard = build(tmp_path / "a.jsonl", tmp_path / "b.txt")

    reference = load_tokenizer(tokenizer)
    expected = [[*reference.encode(text), reference.eos_id] for text in TEXTS]
    assert shard.tokens.tolist() == sum(expected, [])
    assert shard.documents["tokens"].tolist() == [len(ids) for ids in expected]
    assert shard.documents["offset"].tolist() == [0, len(expected[0]), len(expected[0] + expected[1])]
    assert shard.documents["bytes"].tolist() == [len(text.encode()) for text in TEXTS]
    assert shard.bytes == sum(len(text.encode()) for text in TEXTS)
    assert [shard.place(number) for number in range(3)] == [f"{first}:1", f"{first}:2", f"{tmp_path / 'b.txt'}:1"]


def test_bos_where_the_family_has_one(tmp_path, build, tokenizer, monkeypatch):
    with_bos = load_tokenizer(tokenizer)
    with_bos.bos_id = 7
    monkeypatch.setattr(shards, "load_tokenizer", lambda directory: with_bos)
    shard = build(write_json_lines(tmp_path / "a.jsonl", TEXTS))
    assert shard.tokens[shard.documents["offset"]].tolist() == [7, 7, 7]
    assert shard.tokens[:-1][shard.tokens[1:] == 7].tolist() == [with_bos.eos_id] * 2


def test_tokens_take_two_bytes_while_they_fit(tokenizer):
    reference = load_tokenizer(tokenizer)
    sizes = {}
    for reference.vocab_size in (50_000, 65_536, 65_537, 152_000):
        sizes[reference.vocab_size] = token_type_of(reference).itemsize
    assert sizes == {50_000: 2, 65_536: 2, 65_537: 4, 152_000: 4}


def test_the_number_of_processes_changes_nothing(tmp_path, build, small_batches):
    for number in range(4):
        texts = [f"{text} {number} {line}" for line in range(100) for text in TEXTS]
        write_json_lines(tmp_path / f"{number}.jsonl", texts)
        (tmp_path / f"{number}.txt").write_text("\n".join(texts))
    packed = gzip.compress((tmp_path / "3.jsonl").read_bytes())
    (tmp_path / "4.jsonl.gz").write_bytes(packed)
    found = []
    for workers in (1, 2, 5):
        found.append(build(f"{tmp_path}/*.*", workers=workers))
        shutil.rmtree(tmp_path / "cache")
    assert len(found[0].documents) == 5 * 300 + 4
    assert all(np.array_equal(found[0].tokens, other.tokens) for other in found)
    assert all(np.array_equal(found[0].documents, other.documents) for other in found)
    assert len({shard.digest for shard in found}) == 1
    for shard in found:
        assert np.array_equal(shard.counts, np.bincount(shard.tokens, minlength=len(shard.counts)))
    ends = np.cumsum(found[0].documents["tokens"])
    assert np.array_equal(found[0].documents["offset"][1:], ends[:-1])
    assert ends[-1] == len(found[0].tokens)


def test_a_tokenizing_process_does_not_load_torch():
    check = "import sys, elo.data.encoding; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


# ---- made once


def test_a_shard_is_reused(tmp_path, build, monkeypatch):
    path = write_json_lines(tmp_path / "a.jsonl", TEXTS)
    first = build(path)
    monkeypatch.setattr(shards, "encode", None)  # whoever tokenized again would call this
    monkeypatch.chdir(tmp_path)
    again = build("a.jsonl")
    assert np.array_equal(first.tokens, again.tokens)
    assert again.place(1) == "a.jsonl:2"


def test_a_shard_is_rebuilt_when_an_input_changes(tmp_path, build, tokenizer, monkeypatch):
    path = write_json_lines(tmp_path / "data.jsonl", TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "SAMPLE", 0)  # as between the samples of a large file
        seen = [build(path).digest]
        write_json_lines(path, ["first of all.", *TEXTS[1:]])  # as long as before
        seen.append(build(path).digest)
    before = path.stat()
    write_json_lines(path, [*TEXTS[:-1], TEXTS[-1][:-1] + "!"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` does
    assert path.stat().st_size == before.st_size
    seen.append(build(path).digest)
    write_json_lines(tmp_path / "more.jsonl", TEXTS)
    seen.append(build(path, tmp_path / "more.jsonl").digest)
    seen.append(build(path, tokenizer=write_tokenizer(tokenizer, vocab_size=300)).digest)
    path.write_text('{"body": "1", "text": "2"}')
    seen.append(build(path).digest)
    seen.append(build(path, text_field="body").digest)
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("damage", ["shorter tokens", "no index", "no meta", "broken meta"])
def test_a_damaged_shard_is_rebuilt(tmp_path, build, damage):
    path = write_json_lines(tmp_path / "a.jsonl", TEXTS)
    before = build(path)
    expected = before.tokens.tolist()
    (directory,) = finished_shards(tmp_path / "cache")
    if damage == "shorter tokens":
        (directory / "tokens.bin").write_bytes((directory / "tokens.bin").read_bytes()[:-2])
    elif damage == "no index":
        (directory / "documents.bin").unlink()
    elif damage == "no meta":
        (directory / "meta.json").unlink()
    else:
        (directory / "meta.json").write_text('{"tokens": ')
    assert build(path).tokens.tolist() == expected
    assert os.listdir(tmp_path / "cache") == [directory.name]
    assert sorted(os.listdir(directory)) == ["counts.bin", "documents.bin", "meta.json", "tokens.bin"]


# ---- what is wrong with a corpus


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_malformed_record_is_named(tmp_path, build, small_batches, workers):
    good = [json.dumps({"text": "text " * 20})] * 60
    (tmp_path / "a.jsonl").write_text("\n".join(good))
    (tmp_path / "b.jsonl").write_text("\n".join([*good[:49], "{}", *good[:5], "[]", *good]))
    assert error_of(build, tmp_path, workers=workers) == (
        f"{tmp_path}/b.jsonl:50: no field 'text' (it has no fields); --skip-malformed passes over such records"
    )
    assert os.listdir(tmp_path / "cache") == []


def test_skipped_records_are_reported_each_time(tmp_path, tokenizer, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{\n{"text": ""}\n{"text": "two"}\n[\n')
    for _ in range(2):  # the second time the shard is only opened
        shard = tokenize([path], tokenizer, tmp_path / "cache", skip_malformed=True)
        report = capsys.readouterr().err.splitlines()[-1]
        assert report == (
            "skipped 3 malformed records: "
            f"2 x not valid JSON (first at {path}:2); 1 x empty document (first at {path}:3)"
        )
        assert shard.documents["line"].tolist() == [1, 4]
    assert len(finished_shards(tmp_path / "cache")) == 1


def test_an_empty_corpus(tmp_path, build):
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert error_of(build, tmp_path / "a.jsonl") == f"{tmp_path}/a.jsonl: an empty corpus, there is no document in it"
    (tmp_path / "b.jsonl").write_text("{}\n")
    assert error_of(build, f"{tmp_path}/*.jsonl", skip_malformed=True) == (
        f"{tmp_path}/a.jsonl and 1 more files: an empty corpus, there is no document in it"
    )
    assert os.listdir(tmp_path / "cache") == []


def test_a_missing_file(tmp_path, tokenizer):
    message = error_of(tokenize, [tmp_path / "a.txt"], tokenizer, tmp_path / "cache")
    assert message == f"{tmp_path}/a.txt: cannot be read: No such file or directory"


def test_a_file_that_changes_meanwhile(tmp_path, build, monkeypatch):
    path = write_json_lines(tmp_path / "a.jsonl", TEXTS)

    def encode_while_someone_writes(*arguments):
        with open(path, "a") as file:
            file.write('{"text": "more"}\n')
        return encoding.encode(*arguments)

    monkeypatch.setattr(shards, "encode", encode_while_someone_writes)
    assert error_of(build, path) == f"{path}: changed while it was read; start again when it is complete"
    assert os.listdir(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written(tmp_path, build):
    path = write_json_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "cache").write_text("a file")
    assert error_of(build, path) == f"{tmp_path}/cache: cannot keep tokens there: File exists"
