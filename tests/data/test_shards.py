"""Token shards: what is in them, that they are made once, and that nothing a run dies of leaves a bad one."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from small_tokenizer import write_tokenizer

from elo.common.errors import UserError
from elo.data import encoding, shards
from elo.data.encoding import token_type_of
from elo.data.finding import find_files
from elo.data.shards import tokenize
from elo.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = ["First of all.", "둘째로 더 많은 글이\n필요하다.", "And <|endoftext|> is text."]


def write_json_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path


@pytest.fixture
def tokenizer(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def build(tmp_path, tokenizer):
    """`tokenize` of the small tokenizer with a cache of its own."""

    def build(*paths, tokenizer=tokenizer, **options):
        return tokenize(find_files(paths), tokenizer, tmp_path / "cache", progress=False, **options)

    return build


@pytest.fixture
def small_batches(monkeypatch):
    """A few kilobytes are then many batches, and enough work for several processes."""
    monkeypatch.setattr(encoding, "BATCH", 1000)
    monkeypatch.setattr(shards, "BATCH", 1000)


def error_of(function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def finished_shards(cache):
    return [path for path in cache.iterdir() if not path.name.startswith(".")]


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


def test_a_shard_is_rebuilt_when_an_input_changes(tmp_path, build, tokenizer):
    path = write_json_lines(tmp_path / "data.jsonl", TEXTS)
    seen = [build(path).digest]

    write_json_lines(path, ["first of all.", *TEXTS[1:]])  # as long as before
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


def test_a_full_disk(tmp_path, tokenizer):
    """A limit on the size of files fails in the same way, and needs no file system of its own."""
    path = write_json_lines(tmp_path / "a.jsonl", TEXTS * 5000)
    run = start(
        tmp_path, tokenizer, path, before="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    )
    _, errors = run.communicate()
    assert errors.endswith(f"UserError: {tmp_path}/cache: cannot keep tokens there: File too large\n")
    assert os.listdir(tmp_path / "cache") == []


# ---- runs that die, and runs at the same time


def start(tmp_path, tokenizer, path, before="", workers=1):
    """`tokenize` in a process of its own, which prints how many bytes of text it found."""
    arguments = [str(path)], str(tokenizer), str(tmp_path / "cache")
    code = f"""
{before}
from elo.data.shards import tokenize
print(tokenize(*{arguments!r}, workers={workers}, progress=False).bytes)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=pipe, stderr=pipe, text=True, process_group=0
    )


def wait_for(condition):
    deadline = time.monotonic() + 600
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def start_and_wait_for_tokens(tmp_path, tokenizer, path):
    """A run in the middle of its work, and its tokenizing processes."""
    run = start(tmp_path, tokenizer, path, workers=2)
    wait_for(lambda: [file for file in tmp_path.glob("cache/.building-*/tokens.bin") if file.stat().st_size])
    return run, psutil.Process(run.pid).children()


@pytest.fixture
def long_file(tmp_path):
    """Tokens for many seconds."""
    return write_json_lines(
        tmp_path / "long.jsonl", [f"{text} {number}" * 30 for number in range(30_000) for text in TEXTS]
    )


def test_a_killed_run_leaves_no_processes_and_no_shard(tmp_path, build, tokenizer, long_file):
    run, processes = start_and_wait_for_tokens(tmp_path, tokenizer, long_file)
    assert len(processes) == 2
    run.kill()
    run.wait()
    wait_for(lambda: not any(process.is_running() for process in processes))
    (leftover,) = (tmp_path / "cache").iterdir()
    assert leftover.name.startswith(".building-")
    build(write_json_lines(tmp_path / "small.jsonl", TEXTS))
    assert not leftover.exists()


def test_the_directory_of_a_living_run_is_left_alone(tmp_path, build):
    with shards._building_directory(tmp_path / "cache") as directory:
        os.utime(directory, (0, 0))
        build(write_json_lines(tmp_path / "a.jsonl", TEXTS))
        assert directory.exists()
    assert not directory.exists()


@pytest.mark.parametrize("name", ["0123456789abcdef-{}-7", "unknown-{}-7", "{}-7", "x"])
def test_the_directory_of_a_run_on_another_machine_is_left_alone(tmp_path, build, name):
    """There its process has any number, and its locks would mean nothing here."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    building = tmp_path / "cache" / f".building-{name.format(gone.pid)}"
    building.mkdir(parents=True)
    (building / "tokens.bin").write_text("tokens")
    os.utime(building, (0, 0))  # made long ago, and still written to
    build(write_json_lines(tmp_path / "a.jsonl", TEXTS))
    assert building.exists()
    os.utime(building / "tokens.bin", (0, time.time() - 23 * 3600))
    build(write_json_lines(tmp_path / "b.jsonl", TEXTS))
    assert building.exists()
    os.utime(building / "tokens.bin", (0, time.time() - 25 * 3600))
    build(write_json_lines(tmp_path / "c.jsonl", TEXTS))
    assert not building.exists()


def test_the_clock_is_the_file_systems(tmp_path, build, monkeypatch):
    building = tmp_path / "cache" / ".building-0123456789abcdef-1-7"
    building.mkdir(parents=True)
    monkeypatch.setattr(time, "time", lambda: 1e10)  # ours goes centuries ahead of it
    build(write_json_lines(tmp_path / "a.jsonl", TEXTS))
    assert building.exists()


def test_ctrl_c_ends_everything(tmp_path, tokenizer, long_file):
    run, processes = start_and_wait_for_tokens(tmp_path, tokenizer, long_file)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    _, errors = run.communicate(timeout=600)
    assert errors.endswith("KeyboardInterrupt\n")
    assert errors.count("Traceback") == 1  # nothing from the other processes or threads
    assert not any(process.is_running() for process in processes)
    assert os.listdir(tmp_path / "cache") == []


def test_a_tokenizing_process_that_is_killed(tmp_path, tokenizer, long_file):
    run, processes = start_and_wait_for_tokens(tmp_path, tokenizer, long_file)
    processes[1].kill()
    _, errors = run.communicate(timeout=600)
    assert errors.endswith("UserError: a tokenizing process was killed; is there enough memory?\n")
    assert not any(process.is_running() for process in processes)
    assert os.listdir(tmp_path / "cache") == []


def test_two_runs_at_once(tmp_path, tokenizer):
    path = write_json_lines(tmp_path / "a.jsonl", TEXTS * 30_000)
    runs = [start(tmp_path, tokenizer, path, workers=2) for _ in range(2)]
    results = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    expected = 30_000 * sum(len(text.encode()) for text in TEXTS)
    assert [int(output) for output, _ in results] == [expected, expected]
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_the_slower_of_two_runs_takes_the_shard_of_the_first(tmp_path, build, monkeypatch):
    path = write_json_lines(tmp_path / "a.jsonl", TEXTS)

    def encode_while_another_run_finishes(*arguments):
        monkeypatch.undo()
        build(path)
        (first,) = finished_shards(tmp_path / "cache")
        (first / "mark").touch()
        return encoding.encode(*arguments)

    monkeypatch.setattr(shards, "encode", encode_while_another_run_finishes)
    shard = build(path)
    (directory,) = (tmp_path / "cache").iterdir()
    assert (directory / "mark").exists()
    assert shard.documents["line"].tolist() == [1, 2, 3]


# ---- memory


@pytest.mark.parametrize("ending", [".jsonl", ".txt"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, ending):
    """One file of 1 GB; the words are long, and single tokens, so that it takes seconds."""
    words = f" {'incomprehensibilities' * 16} {'internationalization' * 16}"
    tokenizer = write_tokenizer(tmp_path / "tokenizer", words * 3)
    text = words * 4
    line = json.dumps({"text": text}) if ending == ".jsonl" else text
    block = (line + "\n").encode() * 400
    path = tmp_path / f"corpus{ending}"
    with open(path, "wb") as file:
        while file.tell() < 10**9:
            file.write(block)
    run = start(tmp_path, tokenizer, path, workers=2)
    peaks = {}
    while run.poll() is None:
        for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children()]:
            peaks[process.pid] = max(peaks.get(process.pid, 0), peak_memory(process.pid))
        time.sleep(0.05)
    output, errors = run.communicate()
    shutil.rmtree(tmp_path)
    assert int(output) > 0.98e9, errors
    assert len(peaks) == 3
    assert max(peaks.values()) < 300e6


def peak_memory(pid):
    """Bytes, from the kernel's own record (ru_maxrss would begin with that of the process that started this one)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:  # it has just ended
        return 0
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
