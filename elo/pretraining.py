"""What stages 1 and 2 share: continual pretraining on packed windows of the two-language corpus."""

import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elo import held_out_texts
from elo.common.chunks import even_chunk
from elo.common.errors import UserError
from elo.common.fields import Fields, read_json_object
from elo.common.options import Parser, not_negative, positive_int, seed, share
from elo.common.terminal import note
from elo.data.corpus import Mixture, Windows
from elo.data.documents import SUPPORTED
from elo.data.finding import find_files
from elo.data.shards import TokenShard, tokenize
from elo.held_out_texts import HeldOutTexts
from elo.model.checkpoint import Checkpoint
from elo.model.config import ModelConfig
from elo.model.loss import IGNORE
from elo.runs.directory import option_values
from elo.runs.processes import World
from elo.text.tokenizer import load_tokenizer
from elo.variants.active_vocabulary import ActiveVocabulary

DEFAULT_MODEL = "models/Llama-3.1-8B"
LARGEST_BATCH = 2**19  # tokens
FEWEST_STEPS = 100


def add_arguments(parser: Parser, gb: float | None = None) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="DIR", help="base checkpoint (%(default)s)")
    group = parser.add_argument_group("data")
    text = f"files, directories or globs of {SUPPORTED}"
    group.add_argument("--target", nargs="+", default=["data/target"], metavar="PATH", help=f"new language: {text}")
    group.add_argument("--source", nargs="+", default=["data/source"], metavar="PATH", help="English: likewise")
    group.add_argument("--target-fraction", type=share, default=0.9, help="of the bytes (%(default)s)")
    amount = "all at that ratio" if gb is None else f"{gb:g}"
    group.add_argument("--gb", type=not_negative, default=gb, help=f"10^9 bytes of text, both languages ({amount})")
    group.add_argument("--after", type=Path, metavar="DIR", help="the documents after those of this run (align: --elo)")
    group.add_argument("--text-field", default="text", metavar="NAME", help="of JSON and Parquet (%(default)s)")
    for option in ("--target-field", "--source-field"):
        group.add_argument(option, metavar="NAME", help="where that text's has another name")
    group.add_argument("--skip-malformed", action="store_true", help="count and report malformed records")
    group.add_argument("--cache", type=Path, help="tokens of earlier runs (default: token-cache beside --out)")
    group.add_argument("--workers", type=positive_int, help="processes that tokenize (default: one a core)")
    group.add_argument("--seed", type=seed, default=0, help="of the shuffle (%(default)s)")
    group.add_argument("--seq-len", type=positive_int, default=2048, help="tokens in a window (%(default)s)")
    group.add_argument("--batch-tokens", type=positive_int, metavar="TOKENS", help=(
        f"in a step, over all processes (default: {LARGEST_BATCH}, or fewer for {FEWEST_STEPS} steps)"))  # fmt: skip
    group.add_argument("--micro-batch", type=positive_int, default=4, help="windows at once a process (%(default)s)")
    held_out_texts.add_arguments(parser, of_slice=gb is None)


def open_windows(
    arguments: Namespace,
    config: ModelConfig,
    world: World,
    after: Path | None = None,
    held_out: HeldOutTexts | None = None,
) -> Windows:
    """Tokenize both languages, or reuse tokens from the cache, and open their stream. One process per node tokenizes.

    held_out: its files and documents are left out of the stream, and named on stderr.
    after: the directory of an earlier run; the stream starts where that run stopped. Raises UserError if that run read
    another stream: other texts, another seed or fraction.
    """
    config.check_seq_len(arguments.seq_len)
    if arguments.target_fraction < 1e-5:
        fraction = f"{arguments.target_fraction:g}"
        raise UserError(f"--target-fraction {fraction}: there would be nothing of the target language")
    languages = [("--target", find_texts("--target", arguments.target, held_out), arguments.target_field)]
    if arguments.target_fraction < 1:
        languages.append(("--source", find_texts("--source", arguments.source, held_out), arguments.source_field))
        target, source = (
            {(os.path.realpath(file), field or arguments.text_field) for file in files} for _, files, field in languages
        )
        for file, _ in sorted(target & source):
            raise UserError(f"--source: {file} is in --target too; each language has texts of its own")
    load_tokenizer(arguments.model, config.vocab_size)
    cache = arguments.cache or arguments.out.parent / "token-cache"

    def shards() -> list[TokenShard]:
        read = {"skip_malformed": arguments.skip_malformed, "workers": arguments.workers}
        return [
            tokenize(files, arguments.model, cache, field or arguments.text_field, **read)
            for _, files, field in languages
        ]

    opened = shards() if world.local_rank == 0 else None
    world.wait()
    opened = opened or shards()
    left_out = [held_out.find(shard) for shard in opened] if held_out else []
    for (option, *_), numbers in zip(languages, left_out, strict=False):
        if len(numbers):
            note(f"{option}: {len(numbers):,} documents are left out, which --validation has too")
    start, stream = read_consumed(after) if after else (0, {})
    mixture = Mixture(opened, arguments.target_fraction, arguments.seed, arguments.gb, start, left_out)
    for name in {**mixture.identity, **stream} if after else ():
        if mixture.identity.get(name) != stream.get(name):
            raise UserError(
                f"{after}: that run had other {name.replace('_', ' ')}; its documents can only be told from new ones "
                "with the same --target, --source, --text-field, --target-field, --source-field, --target-fraction, "
                "--seed and --validation"
            )
    return Windows(mixture, arguments.seq_len)


def read_consumed(after: Path) -> tuple[int, dict[str, Any]]:
    """The position in bytes where an earlier run stopped in its stream, and `Mixture.identity` of that stream."""
    path = after / "elo.json"
    notes = read_json_object(path)
    stream, consumed = notes.get("stream"), notes.get("consumed")
    if not isinstance(stream, dict) or not isinstance(consumed, dict):
        raise UserError(f"{path}: it does not say which documents that run consumed")
    return Fields(consumed, f"{path}: consumed").integer("position", minimum=0, maximum=2**62), stream


def open_base(directory: str) -> Checkpoint:
    if not Path(directory).is_dir():
        raise UserError(
            f"--model {directory}: no such directory; get a checkpoint with "
            f"`hf download meta-llama/Llama-3.1-8B --local-dir {DEFAULT_MODEL}` or name one with --model"
        )
    return Checkpoint(directory)


def data_of(base: Checkpoint, trained: Checkpoint | None = None, windows: Windows | None = None) -> dict[str, Any]:
    """What a run's numbers depend on besides its options, to refuse a resume with other data; see `open_run`."""
    models = {"base model": base.fingerprint(), **({"stage-1 model": trained.fingerprint()} if trained else {})}
    if windows is None:
        return models
    stream = windows.mixture.identity
    shards = dict(zip(("target texts", "source texts"), stream["documents"], strict=False))
    first = windows.mixture.start
    return {**shards, "first document": first, "documents of --validation": stream.get("left_out"), **models}


def find_texts(option: str, patterns: list[str], held_out: HeldOutTexts | None) -> list[Path]:
    """The files that an option names, without copies of held-out files."""
    try:
        files = find_files(patterns)
    except UserError as error:
        raise UserError(f"{option}: {error}; put the texts of that language there or name them with {option}") from None
    return held_out.without_copies(option, files) if held_out else files


def default_batch_tokens(tokens: float, seq_len: int) -> int:
    """The default of --batch-tokens: LARGEST_BATCH, halved until `tokens` make FEWEST_STEPS steps."""
    batch_tokens = LARGEST_BATCH
    while batch_tokens > seq_len and tokens < FEWEST_STEPS * batch_tokens:
        batch_tokens //= 2
    return batch_tokens


class PackedBatches:
    """Consecutive windows of the stream, `batch_tokens` per step; implements `feed.Batches`.

    Window i of a step goes to process i modulo their number, so the batch is the same for any number of processes.
    Empty windows fill up a process that has fewer windows than others, since all must call the model equally often, and
    every short micro-batch, so that all have one shape and only one is compiled. A label is a token id, or, if `active`
    narrowed the head, the token's row there.
    """

    def __init__(
        self,
        windows: Windows,
        batch_tokens: int | None,
        micro_batch: int,
        world: World,
        active: ActiveVocabulary | None = None,
    ) -> None:
        self.active = active
        self.windows, self.world = windows, world
        if batch_tokens is None:
            batch_tokens = default_batch_tokens(windows.tokens, windows.seq_len)
        elif batch_tokens % windows.seq_len:
            raise UserError(f"--batch-tokens {batch_tokens} is not a multiple of --seq-len {windows.seq_len}")
        self.windows_per_step = max(1, batch_tokens // windows.seq_len)
        # Windows in a micro-batch: at most `micro_batch`, and such that the last one of a step has few empty ones.
        self.rows = even_chunk(-(-min(self.windows_per_step, len(windows)) // world.size), micro_batch)

    def __len__(self) -> int:
        return -(-len(self.windows) // self.windows_per_step)

    def _window_range(self, step: int) -> range:
        first = step * self.windows_per_step
        return range(first, min(first + self.windows_per_step, len(self.windows)))

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        window_range = self._window_range(step)
        mine = window_range[self.world.rank :: self.world.size]
        most = -(-len(window_range) // self.world.size)
        for start in range(0, most, self.rows):
            pairs = [self.windows[index] for index in mine[start : start + self.rows]]
            length = self.windows.seq_len
            pairs += [(torch.zeros(length, dtype=torch.long), torch.full((length,), IGNORE))] * (self.rows - len(pairs))
            tokens, labels = zip(*pairs, strict=True)
            tokens, labels = torch.stack(tokens), torch.stack(labels)
            if self.active:
                labels = self.active.row_of[labels.clamp(min=0)].where(labels != IGNORE, IGNORE)
            yield tokens, labels

    def label_count(self, step: int) -> int:
        window_range = self._window_range(step)
        return self.windows.label_count(window_range.start, window_range.stop)

    def consumed(self, steps: int) -> dict[str, int]:
        windows = min(steps * self.windows_per_step, len(self.windows))
        used = self.windows.consumed(windows)
        text = used["target_bytes"] + used["source_bytes"]
        return {"tokens": self.windows.label_count(0, windows), "bytes": text, **used}

    def documents(self, step: int) -> list[str]:
        return list(dict.fromkeys(name for index in self._window_range(step) for name in self.windows.documents(index)))


def notes(
    arguments: Namespace, layers: tuple[int, ...] | None, batches: PackedBatches | None = None, steps: int = 0
) -> dict[str, Any]:
    """The content of elo.json: what a run trained and on which data, so that a later stage can continue from there."""
    stream = {"stream": batches.windows.mixture.identity, "consumed": batches.consumed(steps)} if batches else {}
    active = {"active_vocabulary": batches.active.notes()} if batches and batches.active else {}
    return {
        "base": str(Path(arguments.model).resolve()),
        "method": getattr(arguments, "method", "align"),
        "layers": layers,
        "steps": steps,
        **stream,
        **active,
        "options": option_values(arguments),
    }
