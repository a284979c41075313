"""Log-likelihoods of continuations, computing each context once.

What is scored is lm-eval's definition to the token (`_encode_pair` in `lm_eval/api/model.py`, `_loglikelihood_tokens`
in `models/huggingface.py`, version 0.4.13); how is not:

- The beginning that all contexts of a task share, such as MMLU's five examples, goes through the model once; its keys
  and values serve every batch.
- A context and all its choices are one row of a batch. Every choice stands at the positions that follow the context
  and sees the context and itself: the row is a tree, and the attention mask is its shape.
- Logits are computed where a choice's tokens are predicted and nowhere else, and their softmax in fp32.

One difference is meant: text never becomes a special token, while in lm-eval a `</s>` within a document is one.

Batches are made from all questions, whichever of them are still to be scored and by how many processes, so that a
result depends on neither.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from os.path import commonprefix
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from elo.common.errors import UserError
from elo.model.cache import KVCache
from elo.model.decoder import CausalLM
from elo.model.loss import TILE_BYTES
from elo.text.tokenizer import Tokenizer

CAPACITY = 256  # rotary tables are made for multiples of this many positions
PADDING = -1  # the branch of a token that is none


class Continuation(NamedTuple):
    """Token ids of one choice behind its context, cut to what the model can take."""

    ids: list[int]  # of both
    scored: int  # how many of them, at the end, are the choice's
    cut: int  # how many in front fell away


class Target(NamedTuple):
    """A token of a choice and the place in a row that predicts it."""

    choice: int
    place: int
    token: int


@dataclass
class Row:
    """One question's context and choices as a tree, behind what its batch shares; or a part of the choices."""

    question: int
    tokens: list[int]
    positions: list[int]
    branches: list[int]  # 0: the context, seen by all
    targets: list[Target]


@dataclass
class Batch:
    shared: list[int]  # the tokens in front of every row
    rows: list[Row]


# ---- text to rows


def encode(
    tokenizer: Tokenizer, questions: Sequence[tuple[str, Sequence[str]]], max_length: int
) -> list[list[Continuation]]:
    """The continuations of (context, choices) pairs. UserError naming the pair's index where one is impossible."""

    def encode_one(index: int) -> list[Continuation]:
        return _encode(tokenizer, f"question {index}", *questions[index], max_length)

    with ThreadPoolExecutor() as threads:  # tiktoken lets other threads run while it works
        return list(threads.map(encode_one, range(len(questions))))


def _encode(
    tokenizer: Tokenizer, where: str, context: str, choices: Sequence[str], max_length: int
) -> list[Continuation]:
    """Spaces at the end of a context belong to the choices, since most tokenizers join a space with the word behind it.
    A choice's tokens are those of both texts together, from where those of the context alone end.
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    stripped = context.rstrip()
    if not stripped:
        raise UserError(f"{where}: its context is empty")
    texts = [stripped, *(context + choice for choice in choices)]
    context_ids, *whole = ([*bos, *ids] for ids in tokenizer.encode_batch(texts))
    continuations = []
    for text, ids in zip(choices, whole, strict=True):
        scored = len(ids) - len(context_ids)
        if scored < 1:
            raise UserError(f"{where}: the tokenizer leaves no tokens to its choice {text!r:.50}")
        if scored > max_length:
            what = f"its choice {text!r:.50} is longer than the model's context of {max_length} tokens"
            raise UserError(f"{where}: {what}")
        cut = max(0, len(ids) - max_length - 1)  # the last token is never an input
        continuations.append(Continuation([*context_ids, *ids[len(context_ids) :]][cut:], scored, cut))
    return continuations


def make_batches(questions: Sequence[Sequence[Continuation]], batch_tokens: int) -> list[Batch]:
    """Every question's rows in batches of at most `batch_tokens` tokens, or one row; the longest rows first."""
    whole = [[c.ids[: -c.scored] for c in question] for question in questions if not any(c.cut for c in question)]
    # Of the last token of a context the logits are needed.
    shared = commonprefix([ids for question in whole for ids in question]) if whole else []
    shared = shared[: min((len(ids) - 1 for question in whole for ids in question), default=0)]
    behind_shared: list[Row] = []
    alone: list[Row] = []  # a cut context begins elsewhere
    for index, continuations in enumerate(questions):
        if any(c.cut for c in continuations):
            by_cut = sorted(enumerate(continuations), key=lambda item: item[1].cut)
            alone += [make_row(index, dict(group), 0) for _, group in groupby(by_cut, key=lambda item: item[1].cut)]
        else:
            behind_shared.append(make_row(index, dict(enumerate(continuations)), len(shared)))
    batches = []
    for prefix, rows in ((shared, behind_shared), ([], alone)):
        rows.sort(key=lambda row: (-len(row.tokens), row.question))
        while rows:
            size = max(1, batch_tokens // len(rows[0].tokens))
            batches.append(Batch(prefix, rows[:size]))
            rows = rows[size:]
    return batches


def make_row(question: int, continuations: dict[int, Continuation], shared: int) -> Row:
    """The tree of continuations (by their choices' numbers) that begin alike, without their first `shared` tokens."""
    inputs = {choice: continuation.ids[:-1] for choice, continuation in continuations.items()}
    trunk = len(commonprefix(list(inputs.values())))
    first = next(iter(inputs.values()))
    row = Row(question, first[shared:trunk], list(range(shared, trunk)), [0] * (trunk - shared), [])
    for branch, (choice, ids) in enumerate(inputs.items(), start=1):
        behind = len(row.tokens) - trunk  # where this branch's places are, seen from its positions
        row.tokens += ids[trunk:]
        row.positions += range(trunk, len(ids))
        row.branches += [branch] * (len(ids) - trunk)
        whole, scored = continuations[choice].ids, continuations[choice].scored
        for position in range(len(ids) - scored, len(ids)):
            place = position - shared if position < trunk else position + behind
            row.targets.append(Target(choice, place, whole[position + 1]))
    return row


# ---- rows to log-likelihoods


class Scorer:
    """Scores batches with one model; the shared tokens of consecutive batches are computed once."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self._shared: list[int] | None = None
        self._prefix: KVCache | None = None

    @torch.inference_mode()
    def score(self, batch: Batch) -> list[tuple[int, int, float]]:
        """(question, choice, log-likelihood in nats) of every choice in the rows of a batch."""
        embedding = self.model.model.embed_tokens.weight
        device = embedding.device
        if self._shared != batch.shared:
            self._shared, self._prefix = batch.shared, KVCache(self.model.config, 1, device, embedding.dtype)
            if batch.shared:
                self.model.model(torch.tensor([batch.shared], device=device), self._prefix)
                self._prefix.lengths = [len(batch.shared)]
        tokens, positions, branches = (
            pad_sequence([torch.tensor(values) for values in column], batch_first=True, padding_value=fill).to(device)
            for column, fill in (
                ([row.tokens for row in batch.rows], 0),
                ([row.positions for row in batch.rows], len(batch.shared)),
                ([row.branches for row in batch.rows], PADDING),
            )
        )
        trees = Trees(self._prefix, positions, branches, embedding.dtype)
        hidden = self.model.model(tokens, trees).flatten(0, 1)

        width = tokens.shape[1]
        targets = [(number, target) for number, row in enumerate(batch.rows) for target in row.targets]
        places = [number * width + target.place for number, target in targets]
        log_probabilities = self._log_probabilities(hidden, places, [target.token for _, target in targets])
        sums: dict[tuple[int, int], float] = {}
        for (number, target), value in zip(targets, log_probabilities, strict=True):
            key = batch.rows[number].question, target.choice
            sums[key] = sums.get(key, 0.0) + value
        return [(question, choice, value) for (question, choice), value in sums.items()]

    def _log_probabilities(self, hidden: Tensor, places: list[int], tokens: list[int]) -> list[float]:
        """Of each token at its place in hidden (places, hidden_size); a place's logits are computed once."""
        distinct = sorted(set(places))
        number_of = {place: number for number, place in enumerate(distinct)}
        wanted = torch.tensor([number_of[place] for place in places], device=hidden.device)
        ids = torch.tensor(tokens, device=hidden.device)
        hidden = hidden[torch.tensor(distinct, device=hidden.device)]
        result = torch.empty(len(tokens), device=hidden.device)
        rows = max(1, TILE_BYTES[hidden.device.type] // (self.model.config.vocab_size * 4))
        for start in range(0, len(distinct), rows):
            logits = self.model.lm_head(hidden[start : start + rows]).float()  # (rows, vocabulary)
            here = (wanted >= start) & (wanted < start + rows)
            # On a CPU its rounding is one-sided, 1e-5 nats a token with 50,000 of them, and so is lm-eval's.
            result[here] = logits.log_softmax(-1)[wanted[here] - start, ids[here]]
        return result.tolist()


class Trees(KVCache):
    """A batch of trees behind the same prefix: tokens are placed and seen by position and branch.

    It is filled by one forward pass and gives each layer the prefix's keys and values with those of the rows.
    """

    def __init__(self, prefix: KVCache, positions: Tensor, branches: Tensor, dtype: torch.dtype) -> None:
        """positions, branches: (batch, tokens)."""
        self.prefix, self.positions, self.branches, self.dtype = prefix, positions, branches, dtype
        self.shared = prefix.lengths[0]

    @property
    def capacity(self) -> int:
        return -(-(int(self.positions.max()) + 1) // CAPACITY) * CAPACITY

    def new_positions(self, new: int) -> Tensor:
        return self.positions

    def mask(self, positions: Tensor, window: int | None) -> Tensor:
        """(batch, 1, tokens, shared + tokens): what is added to attention scores, 0 or minus infinity."""
        shared = torch.arange(self.shared, device=positions.device).expand(len(positions), -1)
        key_position = torch.cat((shared, positions), 1)[:, None]
        key_branch = torch.cat((torch.zeros_like(shared), self.branches), 1)[:, None]
        position, branch = positions[..., None], self.branches[..., None]
        visible = (key_position <= position) & ((key_branch == branch) | (key_branch == 0))
        if window is not None:
            visible &= key_position > position - window
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=positions.device)
        return mask.masked_fill_(~visible, float("-inf"))[:, None]

    def extend(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.shared:
            return keys, values
        held = (tensor[:, :, : self.shared].expand(len(keys), -1, -1, -1) for tensor in self.prefix.layers[layer])
        return tuple(torch.cat((old, new), 2) for old, new in zip(held, (keys, values), strict=True))
