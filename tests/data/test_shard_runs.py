"""Runs that make token shards: whatever one dies of leaves no bad one, two make one, and memory stays small."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from shard_files import TEXTS, finished_shards, write_json_lines
from small_tokenizer import write_tokenizer

from elo.data import encoding, shards

ROOT = Path(__file__).parents[2]


def test_a_full_disk(tmp_path, tokenizer):
    """A limit on the size of files fails in the same way, and needs no file system of its own."""
    path = write_json_lines(tmp_path / "a.jsonl", TEXTS * 5000)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    run = start(tmp_path, tokenizer, path, before=limit)
    _, errors = run.communicate()
    assert errors.endswith(f"UserError: {tmp_path}/cache: cannot keep tokens there: File too large\n")
    assert os.listdir(tmp_path / "cache") == []


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
    texts = [f"{text} {number}" * 30 for number in range(30_000) for text in TEXTS]
    return write_json_lines(tmp_path / "long.jsonl", texts)


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


@pytest.mark.parametrize("ending", [".jsonl", ".txt"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, ending):
    """One file of 0.5 GB; the words are long, and single tokens, so that it takes seconds."""
    words = f" {'incomprehensibilities' * 16} {'internationalization' * 16}"
    tokenizer = write_tokenizer(tmp_path / "tokenizer", words * 3)
    text = words * 4
    line = json.dumps({"text": text}) if ending == ".jsonl" else text
    block = (line + "\n").encode() * 400
    path = tmp_path / f"corpus{ending}"
    with open(path, "wb") as file:
        while file.tell() < 5 * 10**8:
            file.write(block)
    run = start(tmp_path, tokenizer, path, workers=2)
    peaks = {}
    while run.poll() is None:
        for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children()]:
            peaks[process.pid] = max(peaks.get(process.pid, 0), peak_memory(process.pid))
        time.sleep(0.05)
    output, errors = run.communicate()
    shutil.rmtree(tmp_path)
    assert int(output) > 0.49e9, errors
    assert len(peaks) == 3
    assert max(peaks.values()) < 300e6


def peak_memory(pid):
    """Bytes, from the kernel's own record (ru_maxrss would begin with that of the process that started this one)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:  # it has just ended
        return 0
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
