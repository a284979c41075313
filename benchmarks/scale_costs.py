"""The unit costs that docs/scale.md multiplies, measured on this machine: prints its table.

    python -m benchmarks.scale_costs --model models/SmolLM2-135M-Instruct --target data/ko --source data/en

Nothing else should run meanwhile. Files are written under a temporary directory (--tmp), which should be on the disk
that is to be measured.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.sides import apart
from elo.common.errors import exit_status
from elo.common.options import Parser
from elo.data.corpus import Mixture, Windows
from elo.data.documents import read_documents
from elo.data.encoding import DOCUMENT, Job, encode, read_batches
from elo.data.finding import find_files
from elo.data.shards import TokenShard, tokenize
from elo.model.checkpoint import Checkpoint
from elo.model.decoder import build
from elo.model.saving import export
from elo.optimizer import Optimizer, TrainingOptions
from elo.runs.processes import process_group
from elo.runs.sharding import ParallelOptions, parallelize
from elo.runs.state_files import checksum
from elo.runs.states import States
from elo.text.tokenizer import load_tokenizer

DOCUMENTS = 5_000_000
BYTES = 20_000_000  # of each language


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def report(cost: float, unit: str, what: str) -> None:
    print(f"| {what} | {cost:,.2f} {unit} |", flush=True)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tokenizing(model: str, languages: dict[str, list[str]], folder: Path) -> None:
    """What one process of each kind does in a second, and what a window costs."""
    job, tokenizer = Job(model, "text"), load_tokenizer(model)
    files = {}
    for language, paths in languages.items():
        texts = list(read_documents(find_files(paths)))
        block = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
        path = files[language] = folder / f"{language}.jsonl"
        path.write_bytes(block * (BYTES // len(block) + 1))
        size, batches = path.stat().st_size, []
        list(read_batches([str(path)], [size], "text"))
        spent = seconds(lambda: batches.extend(read_batches([str(path)], [size], "text")))  # noqa: B023
        report(size / spent / 1e6, "MB/s", f"reading {language} JSON lines into batches, by the one reading process")
        done = sum(batch.read for batch in batches[:8])
        spent = seconds(lambda: [encode(tokenizer, job, batch) for batch in batches[:8]])  # noqa: B023
        report(done / spent / 1e6, "MB/s", f"tokenizing {language}, a core")
    shards = [tokenize([files[name]], model, folder / "cache", progress=False) for name in files]
    text = sum(shard.bytes for shard in shards)
    report(sum(shard.tokens.nbytes for shard in shards) / text, "bytes", "tokens.bin for a byte of text")
    windows = Windows(Mixture(shards, 0.9, 0), 2048)
    picked = np.random.default_rng(0).integers(0, len(windows), 1000)
    spent = seconds(lambda: [windows[int(index)] for index in picked])
    report(spent / len(picked) * 1e6, "µs", "a window of 2048 tokens, its tokens in the page cache")


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
    spent = seconds(lambda: mixture.append(Mixture(shards, 0.9, 0)))
    report(DOCUMENT.itemsize, "bytes", "documents.bin on the disk, for a document")
    what = "memory while documents are shuffled, for one of the larger language"
    report((peak() - before - held) / DOCUMENTS, "bytes", what)
    report(spent / DOCUMENTS * 1e9, "s", "shuffling 10^9 documents, in proportion")
    kept = mixture[0].stream.nbytes + mixture[0].totals.nbytes
    report(kept / len(mixture[0].stream), "bytes", "memory after that, for a document of the run")


def states_and_models(model: str, folder: Path) -> None:
    """The whole model trained by one process: load, save, load again, write."""
    options = TrainingOptions(lr=0.0)
    with process_group() as world:
        base = Checkpoint(model)
        network = parallelize(build(base.config), world, ParallelOptions("fp32", compile=False))
        parameters = sum(parameter.numel() for parameter in network.parameters())
        read = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
        base.load_into(network)  # touches the memory for the first time
        spent = seconds(lambda: base.load_into(network))
        report(read / spent / 1e9, "GB/s", "loading safetensors from the page cache into shards, a process")
        optimizer = Optimizer(network, options)
        states = States(folder / "states", network, optimizer.adamws, world, None, 2)
        states._state(0)  # the optimizer's part comes into being
        for step in (1, 2):  # the first one touches its memory, too
            copying = seconds(lambda: states.save(step))  # noqa: B023
            whole = copying + seconds(states.finish_saving)
        size = sum(path.stat().st_size for path in (folder / "states/step-2").iterdir())
        report(size / parameters, "bytes", "a state, for a trained parameter")
        report(size / copying / 1e9, "GB/s", "copying a state before training goes on, a process")
        report(size / whole / 1e9, "GB/s", "saving a state with checksum and fsync, a process")
        (file,) = (folder / "states/step-2").glob("*.safetensors")
        report(size / seconds(lambda: checksum(file)) / 1e9, "GB/s", "the checksum of a file in the page cache")
        with redirect_stdout(sys.stderr):
            spent = seconds(states.load_newest)
        report(size / spent / 1e9, "GB/s", "loading a state from the page cache, with checksum, a process")
        spent = seconds(lambda: export(folder, network, base))
        written = (folder / "model.safetensors").stat().st_size
        report(written / spent / 1e9, "GB/s", "writing the model, by rank 0")
        optimizer.adamws.clear()


def main() -> None:
    parser = Parser(prog="python -m benchmarks.scale_costs", description=__doc__)
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a checkpoint that fits four times in memory in fp32"
    )
    parser.add_argument("--target", nargs="+", required=True, metavar="PATH", help="text files of the new language")
    parser.add_argument("--source", nargs="+", required=True, metavar="PATH", help="of English")
    parser.add_argument("--tmp", metavar="DIR", help="where to write (default: the system's)")
    arguments = parser.parse_args()
    model = str(Path(arguments.model).resolve())
    print("| what | cost |\n|---|---|", flush=True)
    with TemporaryDirectory(dir=arguments.tmp) as name:
        # In processes of their own, whose peaks of memory are their own.
        apart(tokenizing, model, {"target": arguments.target, "source": arguments.source}, Path(name))
        apart(shuffling)
        apart(states_and_models, model, Path(name))


if __name__ == "__main__":
    exit_status(main)
