"""Masked examples of conversations in memory, compact, with where each is from, and length-grouped batches of them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from elo.common.errors import UserError
from elo.common.terminal import note
from elo.data.json_records import place
from elo.model.loss import IGNORE
from elo.runs.processes import World

SORTED_TOGETHER = 64  # batches: so many that a batch has little padding, so few that it is still a random one
CONVERSATION = np.dtype(
    [
        ("file", "<u4"),  # which of the files
        ("number", "<u4"),  # of its record, see `place`
        ("language", "<u4"),  # which of the languages
        ("is_cut", "?"),  # answers are left out because they do not fit
        ("is_unanswered", "?"),  # the user's last turn is left out because nobody answers it
        ("labels", "<u4"),  # tokens that are trained
        ("bytes", "<u4"),  # of its UTF-8 text
        ("tokens", "<u4"),
        ("offset", "<u8"),  # of its first token
    ]
)


class Example(NamedTuple):
    ids: np.ndarray
    trained: np.ndarray
    row: tuple  # of CONVERSATION, without its offset


@dataclass(frozen=True, eq=False)
class Conversations:
    """Tokenized conversations, compact: 5 bytes a token and 34 a conversation. Those of a split share the tokens."""

    ids: np.ndarray  # (tokens,) uint32, one conversation after the other
    trained: np.ndarray  # (tokens,) bool: the assistant's text and its end-of-turn tokens
    table: np.ndarray  # (conversations,) of CONVERSATION
    files: Sequence[str]
    languages: Sequence[str]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Input and labels, each (tokens - 1,) of int64: at every token the next one, or IGNORE."""
        place = self._place(index)
        ids = torch.from_numpy(self.ids[place].astype(np.int64))
        return ids[:-1], ids[1:].where(torch.from_numpy(self.trained[place][1:]), IGNORE)

    def _place(self, index: int) -> slice:
        """Where its tokens are."""
        start = int(self.table["offset"][index])
        return slice(start, start + int(self.table["tokens"][index]))

    def place(self, index: int) -> str:
        return place(self.files[self.table["file"][index]], self.table["number"][index])

    def digest(self) -> str:
        """Of tokens, of which are trained, and of where they stand: other conversations have another one."""
        digest = hashlib.sha256()
        for array in (self.ids, self.trained, self.table):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:32]

    def split(self, fraction: float, seed: int) -> tuple["Conversations", "Conversations"]:
        """(training, held out): this fraction of each language is held out, at least one conversation of several.

        What is the same as a held-out one to the last token is in neither.
        """
        held_out = np.zeros(len(self), bool)
        if not fraction:
            return self, replace(self, table=self.table[held_out])
        for number, language in enumerate(self.languages):
            mine = np.flatnonzero(self.table["language"] == number)
            count = round(fraction * len(mine))
            if len(mine) > 1:
                count = min(max(count, 1), len(mine) - 1)
            held_out[random_numbers(seed, "held out", language).permutation(mine)[:count]] = True
        taken = {self.ids[self._place(index)].tobytes() for index in np.flatnonzero(held_out)}
        twins = np.array([self.ids[self._place(index)].tobytes() in taken for index in range(len(self))], bool)
        if twins.all() or not held_out.any():
            raise UserError(f"--validation-fraction {fraction:g}: {len(self)} conversations cannot be split")
        if left_out := int((twins & ~held_out).sum()):
            note(f"--data: {left_out:,} conversations are left out, the same as some of --validation-fraction")
        return tuple(replace(self, table=self.table[chosen]) for chosen in (~twins, held_out))


def store(examples: list[Example], files: list[str], languages: list[str]) -> Conversations:
    """Examples one after the other; the rows of the table name `files` and `languages` by their numbers."""
    table = np.array([(*example.row, 0) for example in examples], CONVERSATION)
    table["offset"] = np.cumsum(table["tokens"], dtype=np.uint64) - table["tokens"]
    ids = np.concatenate([example.ids for example in examples])
    trained = np.concatenate([example.trained for example in examples])
    return Conversations(ids, trained, table, files, languages)


def random_numbers(seed: int, *purpose: str | int) -> np.random.RandomState:
    """Random numbers for one purpose. RandomState, because numpy promises that its numbers never change."""
    numbers = [number for part in purpose for number in (part.encode() if isinstance(part, str) else [part])]
    return np.random.RandomState([seed, *numbers])


class ConversationBatches:
    """`batch_conversations` a step, `epochs` times through all; satisfies `feed.Batches`.

    Every epoch is shuffled anew. Of the shuffled conversations `SORTED_TOGETHER` batches at a time are sorted by
    length and cut into batches, so that there is little padding, and then the batches are shuffled. The one with the
    longest conversation comes first, so that a lack of memory shows at once.

    A row is one conversation, padded on the right: under causal attention no token sees what is right of it, so that
    neither a mask is needed nor anything flows between conversations.

    A micro-batch is as many rows as `micro_batch_tokens` hold, at least one, and as long as its longest conversation.
    Where rows are left over, empty ones make up the number: all processes must call the model equally often.
    """

    def __init__(
        self,
        conversations: Conversations,
        batch_conversations: int,
        micro_batch_tokens: int,
        epochs: int,
        seed: int,
        world: World,
    ) -> None:
        self.conversations, self.world = conversations, world
        self.batch_conversations, self.micro_batch_tokens = batch_conversations, micro_batch_tokens
        self.epochs, self.seed = epochs, seed
        self.steps_per_epoch = -(-len(conversations) // batch_conversations)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # of a step, and that of the next one, which is read ahead

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def _draw_epoch(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Its batches, each the indices of its conversations, longest first; labels and bytes before each of them."""
        table, size = self.conversations.table, self.batch_conversations
        random = random_numbers(self.seed, "epoch", epoch)
        order = random.permutation(len(table))
        batches = []
        for start in range(0, len(order), SORTED_TOGETHER * size):
            chunk = order[start : start + SORTED_TOGETHER * size]
            chunk = chunk[np.argsort(-table["tokens"][chunk].astype(np.int64), kind="stable")]
            batches += [chunk[first : first + size] for first in range(0, len(chunk), size)]
        random.shuffle(batches)
        longest = max(range(len(batches)), key=lambda number: table["tokens"][batches[number][0]])
        batches[0], batches[longest] = batches[longest], batches[0]
        sums = [[table[name][batch].sum(dtype=np.int64) for name in ("labels", "bytes")] for batch in batches]
        return batches, np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(sums, axis=0)])

    def _batch(self, step: int) -> np.ndarray:
        epoch, number = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[0][number]

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and labels, each (rows, length)."""
        batch = self._batch(step)
        while len(batch):
            length = int(self.conversations.table["tokens"][batch[0]]) - 1
            rows = max(1, self.micro_batch_tokens // length)
            group, batch = np.split(batch, [rows * self.world.size])
            rows = -(-len(group) // self.world.size)
            tokens = torch.zeros(rows, length, dtype=torch.long)
            labels = torch.full((rows, length), IGNORE)
            for row, index in enumerate(group[self.world.rank :: self.world.size]):
                inputs, targets = self.conversations[index]
                tokens[row, : len(inputs)] = inputs
                labels[row, : len(targets)] = targets
            yield tokens, labels

    def label_count(self, step: int) -> int:
        return int(self.conversations.table["labels"][self._batch(step)].sum(dtype=np.int64))

    def consumed(self, steps: int) -> dict[str, int]:
        """`tokens` are those that were trained, `bytes` those of all text, the user's too."""
        if steps == 0:
            return {"tokens": 0, "bytes": 0, "conversations": 0}
        epochs, last = divmod(steps - 1, self.steps_per_epoch)
        batches, before = self._epoch(epochs)
        tokens, text = (epochs * before[-1] + before[last + 1]).tolist()
        within = sum(map(len, batches[: last + 1]))
        return {"tokens": tokens, "bytes": text, "conversations": epochs * len(self.conversations) + within}

    def documents(self, step: int) -> list[str]:
        return [self.conversations.place(index) for index in self._batch(step)]
