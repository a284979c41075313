"""Conversations to length-grouped batches."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from elo.data.conversation_table import Conversations
from elo.data.drawing import random_numbers
from elo.model.loss import IGNORE
from elo.runs.processes import World

SORTED_TOGETHER = 64  # batches: so many that a batch has little padding, so few that it is still a random one


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
