"""The unit costs that docs/scale.md multiplies, measured on this machine.

    python tests/scale_costs.py [--model models/SmolLM2-135M-Instruct]

Each line is a cost, its unit and how it was measured. Files are written under a temporary directory.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from elo.checkpoint import Checkpoint, export
from elo.corpus import Mixture
from elo.distributed import ParallelOptions, parallelize, process_group
from elo.encoding import DOCUMENT, Job, encode, read_batches
from elo.model import build
from elo.optimizer import Optimizer, TrainingOptions
from elo.shards import TokenShard
from elo.states import States, checksum
from elo.tokenizer import load_tokenizer

DOCUMENTS = 5_000_000
CORPUS = Path(__file__).resolve().parents[2] / "shared/data/corpus"


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def report(cost: float, unit: str, what: str) -> None:
    print(f"{cost:12,.2f} {unit:16} {what}", flush=True)


def apart(work: Callable[..., None], *arguments: object) -> None:
    """In a process of its own, whose peak of memory is its own."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tokenizing(model: str, folder: Path) -> None:
    """What one process of each kind does in a second."""
    import gzip

    job, tokenizer = Job(model, "text"), load_tokenizer(model)
    for language in ("ko", "en"):
        text = gzip.decompress((CORPUS / f"libreoffice-help.{language}.jsonl.gz").read_bytes())
        path = folder / f"{language}.jsonl"
        path.write_bytes(text * (20_000_000 // len(text) + 1))
        size = path.stat().st_size
        batches = []
        spent = seconds(
            lambda path=path, size=size, batches=batches: batches.extend(read_batches([str(path)], [size], "text"))
        )
        report(size / spent / 1e6, "MB/s", f"reading {language} JSON lines into batches, the one reading process")
        spent = seconds(lambda batches=batches: [encode(tokenizer, job, batch) for batch in batches[:8]])
        done = sum(batch.read for batch in batches[:8])
        report(done / spent / 1e6, "MB/s a core", f"tokenizing {language}")


def shuffling() -> None:
    """The stream of two languages over many documents, as every process makes it."""
    random = np.random.default_rng(0)
    before = peak()
    shards = []
    for count in (DOCUMENTS, DOCUMENTS // 9):
        documents = np.zeros(count, DOCUMENT)
        documents["bytes"] = random.integers(500, 5500, count)
        documents["tokens"] = documents["bytes"] // 3
        documents["offset"] = np.cumsum(documents["tokens"], dtype=np.uint64) - documents["tokens"]
        total = int(documents["bytes"].sum(dtype=np.int64))
        shards.append(TokenShard(np.zeros(0, np.uint16), documents, np.zeros(0, np.int64), [], total, str(count), {}))
    held = peak() - before
    mixture = []
    spent = seconds(lambda: mixture.append(Mixture(*shards, 0.9, 0)))
    report(DOCUMENT.itemsize, "bytes", "of documents.bin for a document, on disk")
    report(
        (peak() - before - held) / DOCUMENTS,
        "bytes",
        "of memory for a document of the larger language while it is shuffled",
    )
    report(spent / DOCUMENTS * 1e9, "s", "to shuffle 10^9 documents, by proportion")
    kept = mixture[0].stream.nbytes + mixture[0].totals.nbytes
    report(kept / len(mixture[0].stream), "bytes", "of memory for a document of the stretch after that")


def states_and_models(model: str, folder: Path) -> None:
    """The whole model trained by one process: load, save, load again, write."""
    names = ("lr", "warmup", "min_lr_ratio", "weight_decay", "clip", "optimizer_in_backward")
    options = TrainingOptions(
        **dict.fromkeys(names, 0.0), max_steps=None, save_every=None, keep_checkpoints=2, stop_on_spike=False
    )
    with process_group() as world:
        base = Checkpoint(model)
        network = parallelize(build(base.config), world, ParallelOptions("fp32", compile=False))
        parameters = sum(parameter.numel() for parameter in network.parameters())
        read = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
        spent = seconds(lambda: base.load_into(network))
        report(read / spent / 1e9, "GB/s", "loading safetensors that are in the page cache into shards, a process")
        optimizer = Optimizer(network, options)
        states = States(folder / "states", network, optimizer.adamws, world, None, 2)
        states._state(0)  # the optimizer's part comes into being
        copying = seconds(lambda: states.save(1))
        whole = copying + seconds(states.finish_saving)
        size = sum(path.stat().st_size for path in (folder / "states/step-1").iterdir())
        report(size / parameters, "bytes", "of a state for a trained parameter")
        report(size / copying / 1e9, "GB/s", "copying a state before training goes on, a process")
        report(size / whole / 1e9, "GB/s", "saving a state with checksum and fsync, a process")
        (file,) = (folder / "states/step-1").glob("*.distcp")
        report(size / seconds(lambda: checksum(file)) / 1e9, "GB/s", "checking the sum of a file")
        report(
            size / seconds(states.load_newest) / 1e9, "GB/s", "loading a state from the page cache, checked, a process"
        )
        before = peak()
        spent = seconds(lambda: export(folder, network, base))
        written = (folder / "model.safetensors").stat().st_size
        report(written / spent / 1e9, "GB/s", "writing the model, on rank 0")
        largest = max(parameter.numel() * 4 for parameter in network.parameters())
        report((peak() - before) / largest, "x", "the largest tensor in fp32: more memory while it is written")
        optimizer.adamws.clear()
        print(json.dumps({"parameters": parameters, "state bytes": size, "model bytes": written}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    model = str(Path(parser.parse_args().model).resolve())
    with TemporaryDirectory() as name:
        apart(tokenizing, model, Path(name))
        apart(shuffling)
        apart(states_and_models, model, Path(name))


if __name__ == "__main__":
    main()
