"""Raw records to tokens, in parallel processes.

One process reads the files and hands out batches of raw records; the others decode and tokenize them. What comes
back is in the order of the files, whatever the number of processes.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from elo.common.errors import UserError
from elo.data.documents import Record, read_records
from elo.data.json_records import MalformedError
from elo.text.tokenizer import Tokenizer, load_tokenizer

BATCH = 1024 * 1024  # bytes of raw records that a process gets at a time
DOCUMENT = np.dtype(
    [
        ("offset", "<u8"),  # of its first token in tokens.bin
        ("tokens", "<u4"),
        ("bytes", "<u4"),  # of its UTF-8 text
        ("file", "<u4"),  # which of the input files
        ("line", "<u4"),  # in it, see `place`
    ]
)


class Job(NamedTuple):
    tokenizer_directory: str
    text_field: str


class Batch(NamedTuple):
    records: list[tuple[int, Record]]  # each with the number of its file
    read: int  # bytes of the files that they are


class Encoded(NamedTuple):
    tokens: np.ndarray
    documents: np.ndarray  # DOCUMENT, with offsets in `tokens`
    malformed: list[tuple[int, MalformedError]]  # each with the number of its file
    read: int


def encode(tokenizer: Tokenizer, job: Job, batch: Batch) -> Encoded:
    """Tokenize one batch, and say which of its records are malformed."""
    texts, places, malformed = [], [], []
    for file, record in batch.records:
        try:
            found = record.texts(job.text_field)
        except MalformedError as error:
            malformed.append((file, error))
        else:
            texts += found
            places += [(file, record.line)] * len(found)
    token_type = token_type_of(tokenizer)
    head = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], token_type)
    tail = np.array([tokenizer.eos_id], token_type)
    tokens, documents, offset = [np.array([], token_type)], [], 0
    for text, ids, place in zip(texts, tokenizer.encode_arrays(texts), places, strict=True):
        tokens += [head, ids.astype(token_type), tail]
        count = len(head) + len(ids) + 1
        documents.append((offset, count, len(text.encode()), *place))
        offset += count
    return Encoded(np.concatenate(tokens), np.array(documents, DOCUMENT), malformed, batch.read)


def token_type_of(tokenizer: Tokenizer) -> np.dtype:
    """The smaller of the two types that holds every token."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def serve() -> None:
    """The main function of a tokenizing process: a job and then batches on stdin, their tokens on stdout.

    It ends when stdin does, so it does not outlive its parent, however that dies.
    """
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing else may write into the replies
    with contextlib.suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):
        job = pickle.load(requests)
        tokenizer = load_tokenizer(job.tokenizer_directory)
        while True:
            batch = pickle.load(requests)
            pickle.dump(encode(tokenizer, job, batch), replies, pickle.HIGHEST_PROTOCOL)
            replies.flush()


def read_batches(files: Sequence[str], sizes: Sequence[int], text_field: str) -> Iterator[Batch]:
    """The records of all files, in order, about `BATCH` bytes at a time or one long record."""
    records: list[tuple[int, Record]] = []
    held = reported = before = 0
    for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
        for record in read_records(file, text_field):
            records.append((number, record))
            held += 100 if isinstance(record.raw, MalformedError) else 100 + len(record.raw)
            if held >= BATCH:
                yield Batch(records, before + record.position - reported)
                records, held, reported = [], 0, before + record.position
        before += size
    yield Batch(records, before - reported)


def encode_in_processes(job: Job, batches: Iterable[Batch], workers: int) -> Iterator[Encoded]:
    """What `encode` makes of the batches, in their order; only a few of them are in memory at a time.

    Plain child processes with pipes, not multiprocessing: its fork is unsafe once torch runs threads or CUDA,
    its other start methods import the main script, and with it torch, into every child, and its children live
    on when the parent is killed.
    """
    # -P and PYTHONPATH: the same elo as here, whatever lies in the working directory.
    command = [sys.executable, "-P", "-c", "from elo.data.encoding import serve; serve()"]
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    processes: list[subprocess.Popen] = []
    idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()

    def ask(batch: Batch) -> Encoded:
        process = idle.get()
        try:
            pickle.dump(batch, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            status = process.wait()
            if status == -signal.SIGKILL:
                raise UserError("a tokenizing process was killed; is there enough memory?") from None
            raise RuntimeError(f"a tokenizing process ended with status {status}, see above") from None
        finally:
            idle.put(process)

    threads = ThreadPoolExecutor(workers)  # each waits for one process
    try:
        for _ in range(workers):
            # In a session of its own it does not get Ctrl-C: this process does, and ends it.
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, start_new_session=True)
            processes.append(process)
            pickle.dump(job, process.stdin)
            idle.put(process)
        pending: deque[Future[Encoded]] = deque()
        for batch in batches:
            pending.append(threads.submit(ask, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):  # a batch that it did not take any more
                process.stdin.close()
            process.wait()
