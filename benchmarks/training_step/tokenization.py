"""Text to tokens: the project's way, from records to arrays, beside tiktoken's `encode_ordinary_batch`."""

import itertools
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import tiktoken

from elo.common.errors import UserError
from elo.data.encoding import Batch, Job, encode, encode_in_processes, read_batches
from elo.text.byte_level_bpe import ByteLevelBPE
from elo.text.tokenizer import Tokenizer, load_tokenizer

LARGEST = 16 * 10**6  # bytes of a file that are tokenized on one core
EACH = 16 * 10**6  # bytes for each of several processes: the same records again and again


def measure(model: str, files: list[Path], text_field: str, rounds: int) -> list[dict[str, Any]]:
    """Of each file the megabytes of text a second on one core, both ways in turns, and with a process a core."""
    tokenizer = load_tokenizer(model)
    reference = tiktoken_of(tokenizer, model)
    return [measure_file(model, tokenizer, reference, file, text_field, rounds) for file in files]


def tiktoken_of(tokenizer: Tokenizer, model: str) -> tiktoken.Encoding:
    if not isinstance(tokenizer.model, ByteLevelBPE):
        raise UserError(f"--tokenization compares with tiktoken, which knows no tokenizer like that of {model}")
    return tokenizer.model.encoding


def measure_file(
    model: str, tokenizer: Tokenizer, reference: tiktoken.Encoding, file: Path, text_field: str, rounds: int
) -> dict[str, Any]:
    job, batches, texts, size = Job(model, text_field), [], [], 0
    for batch in read_batches([str(file)], [file.stat().st_size], text_field):
        found = [text for _, record in batch.records for text in record.texts(text_field)]
        batches.append(batch)
        texts += found
        size += sum(len(text.encode()) for text in found)
        if size > LARGEST:
            break
    if not size:
        raise UserError(f"{file}: an empty corpus, there is no document in it")
    seconds: dict[str, list[float]] = {"elo": [], "tiktoken": []}
    for _ in range(rounds):
        started = time.perf_counter()
        for batch in batches:
            encode(tokenizer, job, batch)
        seconds["elo"].append(time.perf_counter() - started)
        started = time.perf_counter()
        reference.encode_ordinary_batch(texts, num_threads=1)
        seconds["tiktoken"].append(time.perf_counter() - started)
    rates = {name: size / 1e6 / statistics.median(taken) for name, taken in seconds.items()}
    processes = len(os.sched_getaffinity(0))
    one, all_ = (statistics.median(rate(job, batches, size, count) for _ in range(rounds)) for count in (1, processes))
    return {
        "file": str(file),
        "bytes": size,
        "elo_mb_per_second": rates["elo"],
        "tiktoken_mb_per_second": rates["tiktoken"],
        "ratio": rates["elo"] / rates["tiktoken"],
        "processes": processes,
        "scaling": all_ / one,
    }


def rate(job: Job, batches: list[Batch], size: int, processes: int) -> float:
    """Megabytes a second of `encode_in_processes`, without the start of the processes: it takes the same seconds for
    any corpus."""
    repeats = max(EACH * processes / size, 4 * processes / len(batches))  # some batches for each, in any case
    encoded = encode_in_processes(
        job, itertools.chain.from_iterable(itertools.repeat(batches, math.ceil(repeats))), processes
    )
    done = 0
    # Every process has begun when the first results of as many batches are there.
    for _ in range(processes):
        next(encoded)
    started = time.perf_counter()
    for result in encoded:
        done += int(result.documents["bytes"].sum())
    return done / 1e6 / (time.perf_counter() - started)
