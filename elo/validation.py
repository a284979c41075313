"""The loss on held-out data, during a run and for `python -m eval perplexity`.

In a conversation, the tokens count that training counts. A document is cut into windows, with the tokenizer's BOS, if
it has one, in front and no other special token; every token with a predecessor in its window counts. Bits per byte are
the bits of the counted tokens divided by all bytes of the text: they compare models whose tokenizers differ.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from elo.common.errors import UserError
from elo.data.conversation_batches import Conversations
from elo.model.decoder import CausalLM
from elo.model.loss import IGNORE
from elo.runs.processes import World
from elo.runs.sharding import sharded_parts
from elo.text.tokenizer import Tokenizer
from elo.variants.active_vocabulary import whole_head

BATCH_TOKENS = 8192
SORTED_TOGETHER = 512  # rows, so that those of a batch are of about one length
MOST_FILES = 100  # all of them stand in a line of metrics.jsonl

Batch = tuple[Tensor, Tensor]  # tokens and labels, each (rows, length); of one row each (length,)


@dataclass
class Score:
    """Sums over a file's documents; `nats` is their summed cross-entropy, `bytes` is 0 for conversations."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    nats: float = 0.0

    def figures(self) -> dict[str, float]:
        loss = self.nats / self.tokens
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            **({"bits_per_byte": self.nats / math.log(2) / self.bytes} if self.bytes else {}),
        }


class Encoded(NamedTuple):
    bytes: int  # of its UTF-8 text
    ids: list[int]  # without special tokens


def encode(tokenizer: Tokenizer, text: str) -> Encoded:
    return Encoded(len(text.encode("utf-8")), tokenizer.encode(text))


def windows(documents: Iterable[Encoded], bos_id: int | None, seq_len: int, score: Score) -> Iterator[Batch]:
    """Windows of at most `seq_len` tokens; adds their documents and bytes to `score`."""
    for document in documents:
        score.documents += 1
        score.bytes += document.bytes
        ids = torch.tensor(document.ids if bos_id is None else [bos_id, *document.ids])
        # A window of one token predicts nothing.
        yield from ((window[:-1], window[1:]) for window in ids.split(seq_len) if len(window) > 1)


def make_batches(rows: Iterable[Batch], score: Score, most_tokens: int = BATCH_TOKENS) -> Iterator[Batch]:
    """Batches of rows of about one length, in bounded memory; adds the tokens that count to `score`."""
    stream = iter(rows)
    while group := sorted(islice(stream, SORTED_TOGETHER), key=lambda row: len(row[0])):
        while group:
            size = max(1, most_tokens // len(group[-1][0]))
            batch, group = group[-size:], group[:-size]
            # Right padding needs no mask under causal attention: no real token looks at it.
            tokens = pad_sequence([row[0] for row in batch], batch_first=True)
            labels = pad_sequence([row[1] for row in batch], batch_first=True, padding_value=IGNORE)
            score.tokens += int((labels != IGNORE).sum())
            yield tokens, labels


def check_seq_len(seq_len: int) -> None:
    if seq_len < 2:
        raise UserError(f"--seq-len {seq_len}: a window needs at least 2 tokens")


@torch.inference_mode()
def score_file(model: CausalLM, tokenizer: Tokenizer, documents: Iterable[str], seq_len: int) -> Score:
    """The score on documents of a model that is not sharded."""
    score, device = Score(), model.lm_head.weight.device
    encoded = (encode(tokenizer, document) for document in documents)
    for tokens, labels in make_batches(windows(encoded, tokenizer.bos_id, seq_len, score), score):
        score.nats += model(tokens.to(device), labels.to(device)).item()
    return score


@torch.no_grad()
def summed_losses(model: CausalLM, batches: Iterable[tuple[int, Tensor, Tensor]], groups: int, world: World) -> list:
    """The nats of each group, summed over all processes; a batch is (group, tokens, labels).

    Collective: every process has equally many batches. They run uncompiled, because their shapes differ from those of
    training and would add to its graphs, and with the whole head, also where --active-vocabulary narrowed it.
    """
    totals = torch.zeros(groups, dtype=torch.float64, device=world.device)
    with torch.compiler.set_stance("force_eager"), whole_head(model):
        for group, tokens, labels in batches:
            totals[group] += model(tokens.to(world.device), labels.to(world.device))
    # Gathered parameters are freed by the backward pass, and there was none.
    for module in sharded_parts(model):
        module.reshard()
    return world.sum(*totals.tolist())


class HeldOut:
    """Held-out batches of some files, and reports of the loss on them."""

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.files = files
        self.scores = [Score() for _ in files]
        self.batches: list[tuple[int, Tensor, Tensor]] = []

    def add(self, file: int, rows: Iterable[Batch], most_tokens: int = BATCH_TOKENS) -> None:
        self.batches += [(file, *batch) for batch in make_batches(rows, self.scores[file], most_tokens)]

    def evaluate(self, model: CausalLM, world: World) -> dict[str, Any]:
        """The fields for a line of metrics.jsonl: loss, and for text bits per byte, of all files and each. Collective.

        The processes share the batches, which are the same for any number of processes.
        """
        # Empty batches, because all processes must call the model equally often.
        nothing = 0, torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORE)
        mine = self.batches[world.rank :: world.size]
        mine += [nothing] * (-(-len(self.batches) // world.size) - len(mine))
        for score, nats in zip(self.scores, summed_losses(model, mine, len(self.files), world), strict=True):
            score.nats = nats
        names = ("documents", "bytes", "tokens", "nats")
        every = Score(*(sum(getattr(score, name) for score in self.scores) for name in names))
        by_file = [{"file": str(file), **_shown(score)} for file, score in zip(self.files, self.scores, strict=True)]
        return {**{f"validation_{name}": value for name, value in _shown(every).items()}, "validation": by_file}

    def measure(self, model: CausalLM, when: str, world: World) -> dict[str, Any]:
        """`evaluate`, and say the loss, and the bits per byte (of conversations the loss) of the first files."""
        record = self.evaluate(model, world)
        files = [f"{Path(line['file']).name} {[*line.values()][-1]:.4f}" for line in record["validation"][:4]]
        more = len(self.files) - len(files)
        bits = record.get("validation_bits_per_byte")
        world.say(
            f"{when}: held-out loss {record['validation_loss']:.4f}"
            f"{'' if bits is None else f', bits per byte {bits:.4f}'}"
            f" ({', '.join(files)}{f' and {more} more' if more else ''})"
        )
        return record


def _shown(score: Score) -> dict[str, float]:
    return {name: value for name, value in score.figures().items() if name in ("loss", "bits_per_byte")}


def held_out_conversations(conversations: Conversations, most_tokens: int) -> HeldOut:
    """Conversations grouped by file, or all in one group if there are more than MOST_FILES files."""
    of_file = conversations.table["file"]
    groups = {conversations.files[number]: np.flatnonzero(of_file == number) for number in np.unique(of_file)}
    if len(groups) > MOST_FILES:
        groups = {f"{len(groups)} files": np.arange(len(conversations))}
    held_out = HeldOut([*groups])
    for number, indices in enumerate(groups.values()):
        held_out.add(number, map(conversations.__getitem__, indices), most_tokens)
    return held_out
