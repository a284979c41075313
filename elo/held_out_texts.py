"""Held-out text of stages 1 and 2 (`--validation`): watched during training, and kept out of the training data."""

import hashlib
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from elo.common.errors import UserError
from elo.common.options import Parser, positive, positive_int
from elo.common.terminal import note
from elo.data.documents import read_documents
from elo.data.finding import find_files
from elo.data.shards import TokenShard
from elo.model.decoder import CausalLM
from elo.runs.processes import World
from elo.text.tokenizer import Tokenizer, load_tokenizer
from elo.validation import MOST_FILES, Encoded, HeldOut, check_seq_len, encode, windows

MEGABYTES, VALIDATIONS = 1.0, 10


def add_arguments(parser: Parser, of_slice: bool) -> None:
    group = parser.add_argument_group("held-out text")
    group.add_argument("--validation", nargs="+", metavar="PATH", help=(
        "held-out text, never trained on: its loss and bits per byte while training"
        f"{'; with --method elo those of the slice' if of_slice else ''}"))  # fmt: skip
    group.add_argument("--validation-field", metavar="NAME", help="where its text has another name")
    group.add_argument("--validation-mb", type=positive, metavar="MB", help=(
        f"10^6 bytes of it, equal parts of each file's beginning (default: {MEGABYTES:g})"))  # fmt: skip
    group.add_argument("--validate-every", type=positive_int, metavar="N", help=(
        f"steps, and after the last (default: a {VALIDATIONS}th of them)"))  # fmt: skip


def open_validation(arguments: Namespace, embeddings: int) -> "HeldOutTexts | None":
    """The text of --validation, if it is given; embeddings: rows of the model's embedding.

    Raises UserError if it cannot be read, and for options of --validation without it.
    """
    if not arguments.validation:
        for name in ("validation_mb", "validate_every", "validation_field"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} needs --validation PATH")
        return None
    return HeldOutTexts(arguments, embeddings)


def watch(
    held_out: "HeldOutTexts | None", model: CausalLM, arguments: Namespace, steps: int, world: World
) -> Callable[[int, bool], dict[str, Any]]:
    """The `after_step` of `training.train`: measures held-out text, if there is any, now and then and at the end."""
    every = arguments.validate_every or max(1, steps // VALIDATIONS)

    def after_step(step: int, is_last: bool) -> dict[str, Any]:
        is_due = held_out and (is_last or step % every == 0)
        return held_out.measure(model, f"step {step}", world) if is_due else {}

    return after_step


class HeldOutTexts(HeldOut):
    """The texts of --validation: they measure by --validation-mb in all, equal parts of each file's beginning."""

    def __init__(self, arguments: Namespace, embeddings: int) -> None:
        try:
            files = find_files(arguments.validation)
        except UserError as error:
            raise UserError(f"--validation: {error}; name texts that are there") from None
        tokenizer = load_tokenizer(arguments.model, embeddings)
        check_seq_len(arguments.seq_len)
        if len(files) > MOST_FILES:
            raise UserError(f"--validation: {len(files)} files; give at most {MOST_FILES}, each with more text")
        super().__init__(files)
        # A hash of each document's tokens as a shard stores them, by its numbers of tokens and bytes, to find it there.
        self.documents: dict[tuple[int, int], set[bytes]] = defaultdict(set)
        size = int((arguments.validation_mb or MEGABYTES) * 10**6) // len(files)
        field = arguments.validation_field or arguments.text_field
        for number, file in enumerate(files):
            documents = read_documents([file], field, arguments.skip_malformed)
            encoded = self._beginning(documents, tokenizer, size)
            self.add(number, windows(encoded, tokenizer.bos_id, arguments.seq_len, self.scores[number]))
            if not self.scores[number].tokens:
                raise UserError(f"--validation {file}: no token has a predecessor in the window and --validation-mb")

    def _beginning(self, documents: Iterable[str], tokenizer: Tokenizer, size: int) -> Iterator[Encoded]:
        """Documents up to `size` bytes in all, the last of them perhaps cut. Those behind them are held out as well."""
        for document in documents:
            whole = encode(tokenizer, document)
            ids = [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *whole.ids, tokenizer.eos_id]
            self.documents[len(ids), whole.bytes].add(hashlib.sha256(np.array(ids, "<u4")).digest())
            text = document.encode("utf-8")[:size].decode("utf-8", "ignore")
            part = whole if text == document else encode(tokenizer, text)
            size = size - part.bytes if text else 0
            if text:
                yield part

    def find(self, shard: TokenShard) -> np.ndarray:
        """The numbers of those documents of a shard that are held out."""
        table = shard.documents
        near = np.isin(table["tokens"], [tokens for tokens, _ in self.documents])
        near &= np.isin(table["bytes"], [size for _, size in self.documents])
        found = []
        for number in np.flatnonzero(near).tolist():
            offset, tokens = int(table["offset"][number]), int(table["tokens"][number])
            ids = hashlib.sha256(shard.tokens[offset : offset + tokens].astype("<u4")).digest()
            if ids in self.documents.get((tokens, int(table["bytes"][number])), ()):
                found.append(number)
        return np.array(found, np.int64)

    def without_copies(self, option: str, files: list[Path]) -> list[Path]:
        """`files` without copies of held-out files, which are named on stderr."""
        held_out = [(other.stat().st_size, other) for other in self.files]
        kept = []
        for file in files:
            size = file.stat().st_size
            if any(size == size_of and digest(file) == digest(other) for size_of, other in held_out):
                note(f"{option}: {file} is left out, which --validation has too")
            else:
                kept.append(file)
        if not kept:
            raise UserError(f"{option}: --validation has all of it, and none is left to train on")
        return kept


@cache
def digest(file: Path) -> bytes:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
