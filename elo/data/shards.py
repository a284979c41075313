"""Token shards: the tokens of one language on disk, made once and memory-mapped.

A shard is a directory of four files:
- tokens.bin: every document as [BOS] tokens EOS, one after the other, as uint16 or uint32.
- documents.bin: one `DOCUMENT` per document.
- counts.bin: how often each token occurs, as int64.
- meta.json: what the rest is. It is written last.

Its name is a hash of what it was made from, so a changed input or tokenizer leads to another directory. It is
built under another name and moved in by one rename: a run that is killed leaves nothing that could be taken for
a shard, and of two runs that build the same one, the second takes the first's.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from elo.common.errors import UserError
from elo.common.fields import read_json_object, write_json
from elo.common.files import open_file
from elo.common.terminal import note
from elo.data.encoding import (
    BATCH,
    DOCUMENT,
    Encoded,
    Job,
    encode,
    encode_in_processes,
    read_batches,
    token_type_of,
)
from elo.data.json_records import Skipped, place
from elo.text.tokenizer import Tokenizer, load_tokenizer

FORMAT = 3  # part of every shard's name: a new format is built anew
FILES = ("tokens.bin", "documents.bin", "counts.bin")
BUILDING = ".building-"  # starts the name of a directory in which a shard is being built
SAMPLES, SAMPLE = 16, 4096  # of each text file, and the bytes of one: a file of 64 KiB is read whole
ABANDONED = 24 * 3600  # seconds without a change, after which nobody builds there any more


@dataclass(frozen=True, eq=False)
class TokenShard:
    """The tokens of one language. The arrays are mapped from disk, not read."""

    tokens: np.ndarray  # (tokens,)
    documents: np.ndarray  # (documents,) of DOCUMENT
    counts: np.ndarray  # (vocabulary,): how often each token occurs
    files: Sequence[str]
    bytes: int  # of UTF-8 text
    digest: str  # of tokens and documents: another text has another one
    skipped: dict[str, list]  # kind of malformed record: [count, place of the first]

    @classmethod
    def open(cls, directory: Path, files: Sequence[str]) -> "TokenShard | None":
        """The shard in `directory`, or None if there is none, or meta.json is damaged or does not fit the files."""
        try:
            meta = read_json_object(directory / "meta.json")
            for name in FILES:
                if (directory / name).stat().st_size != meta["sizes"][name]:
                    return None
            tokens = np.memmap(directory / "tokens.bin", {"<u2": "<u2", "<u4": "<u4"}[meta["token_type"]], "r")
            documents = np.memmap(directory / "documents.bin", DOCUMENT, "r")
            counts = np.fromfile(directory / "counts.bin", "<i8")
            skipped = {kind: [int(count), str(place)] for kind, (count, place) in meta["skipped"].items()}
            # asarray: the same mapped memory, without the slow indexing of np.memmap.
            arrays = np.asarray(tokens), np.asarray(documents), counts
            return cls(*arrays, files, int(meta["bytes"]), str(meta["digest"]), skipped)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return None

    def place(self, document: int) -> str:
        """Where a document is: `file:line`, or as `json_records.place` says."""
        entry = self.documents[document]
        return place(self.files[entry["file"]], entry["line"])

    def skipped_report(self) -> str:
        """One line about the malformed records that were skipped; empty if there were none."""
        kinds = [f"{count} x {kind} (first at {place})" for kind, (count, place) in self.skipped.items()]
        total = sum(count for count, _ in self.skipped.values())
        return f"skipped {total} malformed records: " + "; ".join(kinds) if kinds else ""


def tokenize(
    paths: Sequence[str | Path],
    tokenizer_directory: str | Path,
    cache: str | Path,
    text_field: str = "text",
    skip_malformed: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> TokenShard:
    """The token shard of one language's files, built under `cache` if it is not there yet.

    `workers` is the number of processes (default: one per core); the result does not depend on it. Memory does
    not grow with the corpus. With `progress`, a bar (on a terminal) and the report of skipped records go to stderr.

    Raises `UserError`: with file and line for a malformed record, unless `skip_malformed`; for a file that is
    damaged or changes meanwhile; for a corpus without a document; for a disk that is full.
    """
    tokenizer = load_tokenizer(tokenizer_directory)
    files, cache = [str(path) for path in paths], Path(cache)
    states = _states(files)
    made_from = [FORMAT, tokenizer.fingerprint, tokenizer.bos_id, tokenizer.eos_id, text_field, skip_malformed]
    key = hashlib.sha256(json.dumps([made_from, states]).encode()).hexdigest()[:32]
    shard = TokenShard.open(cache / key, files)
    if shard is None:
        job = Job(str(tokenizer_directory), text_field)
        sizes = [size for _, size, *_ in states]
        # Starting a process takes a second, in which one tokenizes a few megabytes.
        workers = min(workers or len(os.sched_getaffinity(0)), math.ceil(sum(sizes) / (2 * BATCH)))
        bar = tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="tokenizing", disable=None if progress else True)
        try:
            with bar, _building_directory(cache) as directory:
                batches = read_batches(files, sizes, text_field)
                if workers > 1:
                    encoded = encode_in_processes(job, batches, workers)
                else:
                    encoded = (encode(tokenizer, job, batch) for batch in batches)
                with contextlib.closing(encoded):
                    _write(directory, tokenizer, files, skip_malformed, encoded, bar)
                for old, new in zip(states, _states(files), strict=True):
                    if old != new:
                        raise UserError(f"{new[0]}: changed while it was read; start again when it is complete")
                shard = _publish(directory, cache / key, files)
        except OSError as error:
            raise UserError(f"{cache}: cannot keep tokens there: {error.strerror or error}") from None
    if progress and shard.skipped:
        note(shard.skipped_report())
    return shard


def _states(files: Sequence[str]) -> list[tuple[str, int, int, str]]:
    """What tells that a file is still the same: path, size, time of change, and samples: copies may keep the time."""
    states = []
    for file in files:
        digest = hashlib.sha256()
        try:
            with open_file(file) as content:
                status = os.fstat(content.fileno())
                for start in range(0, status.st_size, max(SAMPLE, status.st_size // SAMPLES)):
                    content.seek(start)
                    digest.update(content.read(SAMPLE))
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        states.append((os.path.abspath(file), status.st_size, status.st_mtime_ns, digest.hexdigest()))
    return states


def _write(
    directory: Path,
    tokenizer: Tokenizer,
    files: Sequence[str],
    skip_malformed: bool,
    encoded: Iterable[Encoded],
    bar: tqdm,
) -> None:
    """Write the four files of a shard. Only here do the batches come together, in order."""
    token_type, counts = token_type_of(tokenizer), np.zeros(tokenizer.vocab_size, "<i8")
    tokens = documents = text_bytes = 0
    skipped = Skipped()
    digests = hashlib.sha256(), hashlib.sha256()
    with open(directory / FILES[0], "wb") as token_file, open(directory / FILES[1], "wb") as index:
        for batch in encoded:
            for number, error in batch.malformed:
                skipped.add(error, files[number], error.line, skip_malformed)
            batch.documents["offset"] += tokens
            for file, digest, array in zip((token_file, index), digests, batch[:2], strict=True):
                file.write(array.data)
                digest.update(array.data)
            tokens += len(batch.tokens)
            counts += np.bincount(batch.tokens, minlength=len(counts))
            documents += len(batch.documents)
            text_bytes += int(batch.documents["bytes"].sum(dtype=np.int64))
            bar.update(batch.read)
    if not documents:
        others = f" and {len(files) - 1} more files" if len(files) > 1 else ""
        raise UserError(f"{files[0]}{others}: an empty corpus, there is no document in it")
    (directory / FILES[2]).write_bytes(counts.data)
    meta = {
        "token_type": token_type.str,
        "tokens": tokens,
        "documents": documents,
        "bytes": text_bytes,
        "digest": hashlib.sha256(digests[0].digest() + digests[1].digest()).hexdigest(),
        "skipped": skipped,
        "sizes": {name: (directory / name).stat().st_size for name in FILES},
    }
    write_json(directory / "meta.json", meta)
    for name in (*FILES, "meta.json"):
        with open(directory / name, "rb") as file:
            os.fsync(file.fileno())  # else a power failure could leave meta.json beside less than it describes


# ---- the cache: a shard is there completely or not at all


@contextlib.contextmanager
def _building_directory(cache: Path) -> Iterator[Path]:
    """A directory of this process alone to build a shard in, removed in the end if it was not moved away.

    A killed run cannot remove its own. The next run does, where that is known: of its own machine it sees the
    processes; what another machine does it can tell from the files only, and takes a day of silence for an end. Locks
    would not do: many cluster file systems keep them within a machine.
    """
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache / f"{BUILDING}{_machine()}-{os.getpid()}-{time.time_ns()}"
    directory.mkdir()
    try:
        now = directory.stat().st_mtime  # by the file system's clock, which may be another than ours
        for leftover in cache.glob(f"{BUILDING}*"):
            with contextlib.suppress(OSError):  # another run has removed or moved it
                if leftover != directory and _is_abandoned(leftover, now):
                    shutil.rmtree(leftover)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _machine() -> str:
    """Names what process numbers are good for: this machine since it was started, or this container of it."""
    try:
        names = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
        return hashlib.sha256(names.encode()).hexdigest()[:16]
    except OSError:
        return "unknown"


def _is_abandoned(directory: Path, now: float) -> bool:
    machine, process, *_ = [*directory.name.removeprefix(BUILDING).split("-"), ""]
    if machine != _machine() or machine == "unknown":
        return now - max(path.stat().st_mtime for path in [directory, *directory.iterdir()]) > ABANDONED
    try:
        os.kill(int(process), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError, OverflowError):  # somebody else's, or no process of ours
        pass
    return False


def _publish(built: Path, directory: Path, files: Sequence[str]) -> TokenShard:
    """Move a shard to its place. If another run was faster, take the shard of that."""
    shard = TokenShard.open(built, files)  # what is mapped stays so when it is moved
    try:
        os.rename(built, directory)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        if first := TokenShard.open(directory, files):
            return first
        damaged = built.with_name(built.name + "-damaged")
        os.rename(directory, damaged)
        os.rename(built, directory)
        shutil.rmtree(damaged, ignore_errors=True)
    return shard
