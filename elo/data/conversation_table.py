"""Masked examples of conversations in memory, compact, with where each is from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from elo.common.errors import UserError
from elo.common.terminal import note
from elo.data.drawing import random_numbers
from elo.data.json_records import place
from elo.model.loss import IGNORE

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
    lengths = np.array([len(example.ids) for example in examples], np.int64)
    offsets = np.cumsum(lengths) - lengths
    rows = [(*example.row, offset) for example, offset in zip(examples, offsets.tolist(), strict=True)]
    return Conversations(
        np.concatenate([example.ids for example in examples]),
        np.concatenate([example.trained for example in examples]),
        np.array(rows, CONVERSATION),
        files,
        languages,
    )
