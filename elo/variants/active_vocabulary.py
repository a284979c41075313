"""The loss over the tokens that the training data uses, instead of over the whole vocabulary (`--active-vocabulary`).

With two layers the frozen head is a large part of the work, and a language uses only some of the vocabulary. Here the
head has only the rows of tokens that occur, which are counted while the texts are tokenized. The softmax lacks the
terms of all other tokens: the loss in metrics.jsonl is lower by -log(1 - p), where p is the probability that the whole
head gives to them, and the layers are not taught to avoid them.

With `--active-vocabulary-coverage` the rarest of the tokens that occur share one row, the mean of theirs by count.

Only the head is narrower, and only during training: inputs are embedded as always, and the checkpoint that is written
has the whole head of the base.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elo.common.errors import UserError
from elo.common.options import Parser, positive_share
from elo.data.shards import TokenShard
from elo.model.checkpoint import EMBEDDING, HEAD, Checkpoint, local_rows
from elo.model.decoder import CausalLM

WHOLE_HEAD = "whole_head.weight"
BLOCK = 8192  # rows of the base's head in memory at a time


def add_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("active vocabulary (with --method elo)")
    group.add_argument("--active-vocabulary", action="store_true", help="the loss over the tokens that the texts use")
    group.add_argument("--active-vocabulary-coverage", type=positive_share, metavar="C", help=(
        "over the most frequent ones, up to this part of the text, as 0.9999; the rest shares a row"))  # fmt: skip


def is_wanted(arguments: Namespace) -> bool:
    """Whether to narrow the head. Raises UserError for other methods: their head is trained, or a small part."""
    names = [name for name in ("active_vocabulary", "active_vocabulary_coverage") if getattr(arguments, name)]
    if names and arguments.method != "elo":
        raise UserError(f"--{names[0].replace('_', '-')} goes with --method elo, not with {arguments.method}")
    return bool(names)


@dataclass(frozen=True)
class ActiveVocabulary:
    """The narrow head: which of its rows each token has."""

    row_of: Tensor  # (vocabulary,), -1 for a token that does not occur
    weight: Tensor  # (vocabulary,) fp64: the token's part of its row, 1 unless it shares it
    kept: int  # rows of one token; one more is shared if sharing is not 0
    sharing: int  # tokens that share it
    coverage: float  # the part of the text that the kept ones are

    @staticmethod
    def of(shards: Sequence[TokenShard], vocab_size: int, coverage: float | None) -> "ActiveVocabulary":
        """Of all tokens in the shards, even if the run takes only a part of them; without `coverage` all are kept."""
        # A tokenizer may have special tokens beyond the model's rows; no text has them.
        counts = np.zeros(max(vocab_size, *(len(shard.counts) for shard in shards)), np.int64)
        for shard in shards:
            counts[: len(shard.counts)] += shard.counts
        counts = counts[:vocab_size]
        occurring = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]  # the most frequent first
        covered = np.cumsum(counts[occurring])
        kept = int(np.searchsorted(covered, math.ceil((coverage or 1) * covered[-1]))) + 1
        row_of, weight = np.full(vocab_size, -1), np.zeros(vocab_size)
        row_of[np.sort(occurring[:kept])] = np.arange(kept)
        weight[occurring[:kept]] = 1
        rest = occurring[kept:]
        row_of[rest] = kept
        weight[rest] = counts[rest] / max(1, covered[-1] - covered[kept - 1])
        share = float(covered[kept - 1] / covered[-1])
        return ActiveVocabulary(torch.from_numpy(row_of), torch.from_numpy(weight), kept, len(rest), share)

    def __str__(self) -> str:
        shared = f"; {self.sharing:,} more share a row" if self.sharing else ""
        size = f"{self.kept:,} of {len(self.row_of):,} tokens"
        return f"active vocabulary: {size}, {self.coverage:.4%} of the text{shared}"

    def notes(self) -> dict[str, float]:
        """For elo.json."""
        return {"kept": self.kept, "sharing": self.sharing, "of": len(self.row_of), "coverage": self.coverage}

    def narrow(self, model: CausalLM, keep: bool = False) -> None:
        narrow(model, self.kept + bool(self.sharing), keep)

    @torch.no_grad()
    def load_into(self, model: CausalLM, base: Checkpoint, source: Callable[[str], str]) -> None:
        """`Checkpoint.load_into`, with the head's rows gathered; each process keeps only its part of them."""
        if hasattr(model, "whole_head") and base.config.tie_word_embeddings:
            model.whole_head.weight = model.model.embed_tokens.weight
        stored = {HEAD: None, WHOLE_HEAD: HEAD}
        base.load_into(model, lambda name: stored[name] if name in stored else source(name))
        name = EMBEDDING if base.config.tie_word_embeddings else HEAD
        head = model.lm_head.weight
        start, stop = local_rows(head)
        gathered = torch.zeros(stop - start, head.shape[1])
        is_mine = (self.row_of >= start) & (self.row_of < stop)
        for first in range(0, len(self.row_of), BLOCK):
            tokens = first + is_mine[first : first + BLOCK].nonzero().flatten()
            if len(tokens):
                rows = base.rows(name, first, min(first + BLOCK, len(self.row_of)))[tokens - first]
                gathered.index_add_(0, self.row_of[tokens] - start, (rows * self.weight[tokens, None]).float())
        (head.to_local() if isinstance(head, DTensor) else head).copy_(gathered)


def narrow(model: CausalLM, rows: int, keep: bool = False) -> None:
    """Give a model on the meta device a frozen head of so many rows, not tied to its embedding.

    keep: keep the whole head beside it, for `whole_head`.
    """
    if keep:
        model.whole_head = model.lm_head
    model.lm_head = nn.Linear(model.config.hidden_size, rows, bias=False, device="meta").requires_grad_(False)
    model.is_tied = False


@contextmanager
def whole_head(model: CausalLM) -> Iterator[None]:
    """Inside this context a narrowed model computes its loss over the whole vocabulary; no effect on other models."""
    head = model.lm_head
    model.lm_head = getattr(model, "whole_head", head)
    try:
        yield
    finally:
        model.lm_head = head
