"""From token shards to training windows: both languages in one stream, 9:1 by bytes, packed end to end.

    windows = Windows(Mixture([target, source], target_fraction=0.9, seed=0, gigabytes=9), seq_len=4096)
    tokens, labels = windows[0]

The stream does not depend on `gigabytes`: a run takes a stretch of it, and a run that starts at the position that
another run `consumed` gets none of that run's documents.
"""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elo.common.errors import UserError
from elo.data.shards import TokenShard
from elo.model.loss import IGNORE

LANGUAGES = ("target", "source")
BLOCK = 64  # documents of the stream for which there is one row of running totals


class Mixture:
    """A stretch of the stream of documents, which the shards (target, source), the fraction and the seed determine.

    Each language is shuffled on its own. A document with `before` bytes of its language ahead of it is then at byte
    before / share of the stream, where `share` is its language's part of all bytes. So at any point, each language has
    its share of the stream's bytes to within one document.

    start, gigabytes: the stretch has the documents at [start, start + gigabytes * 10^9). Without `gigabytes` it goes on
    until one language is used up. A target_fraction of 1 needs no source.
    left_out: numbers of each shard's documents that are not in the stream, such as those of --validation.
    Memory: 9 bytes a document of the stretch, and about 40 a document of the larger shard while it is shuffled
    (docs/scale.md). Raises `UserError` if a shard has not enough text.
    """

    def __init__(
        self,
        shards: Sequence[TokenShard],
        target_fraction: float,
        seed: int,
        gigabytes: float | None = None,
        start: int = 0,
        left_out: Sequence[np.ndarray] = (),
    ) -> None:
        # An exact fraction: with floats the documents at the border of two stages could be in both or in neither.
        fraction = Fraction(target_fraction).limit_denominator(100_000)
        self.shares = [fraction, 1 - fraction] if fraction < 1 else [fraction]
        self.shards = shards[: len(self.shares)]
        self.start = start
        # Two runs with the same identity have the same stream.
        self.identity: dict[str, Any] = {
            "documents": [shard.digest for shard in self.shards],
            "target_fraction": str(fraction),
            "seed": seed,
        }
        missing = [*left_out, *[np.empty(0, np.int64)] * 2][: len(self.shards)]
        if any(map(len, missing)):
            self.identity["left_out"] = [hashlib.sha256(numbers).hexdigest()[:32] for numbers in missing]
        self.bytes = [
            shard.bytes - int(shard.documents["bytes"][numbers].sum(dtype=np.int64))
            for shard, numbers in zip(self.shards, missing, strict=True)
        ]
        end = self.end(gigabytes)

        documents, keys, self.before = [], [], []
        for language, (shard, share) in enumerate(zip(self.shards, self.shares, strict=True)):
            order, before = _shuffled(shard, seed, language, missing[language])
            # Stands at or after `start` and before `end`.
            low, high = np.searchsorted(before, [math.ceil(start * share), math.ceil(end * share)])
            documents.append(order[low:high] * len(LANGUAGES) + language)
            # before / share, with both languages' keys multiplied by the same number so that they are integers.
            keys.append(before[low:high] * ((1 - share).numerator or 1))
            self.before.append(int(before[low]) if low < high else 0)
        # Of equal keys the target's comes first.
        self.stream = np.concatenate(documents)[np.argsort(np.concatenate(keys), kind="stable")]
        if not len(self.stream) and gigabytes != 0:
            wanted = "no text is left" if gigabytes is None else f"--gb {gigabytes:g} is less than a document"
            raise UserError(wanted + self._after())
        self.totals = self._running_totals()
        self.tokens = int(self.totals[0, -1])

    def end(self, gigabytes: float | None) -> int:
        """The position in the stream, in bytes, where a stretch of so many gigabytes from `start` ends."""
        if gigabytes is None:
            present = (math.floor(size / share) for size, share in zip(self.bytes, self.shares, strict=True))
            return max(self.start, min(present))
        end = self.start + round(gigabytes * 10**9)
        missing = [
            f"{_gigabytes(end * share)} of {name} text are needed and {_gigabytes(size)} are there"
            for name, size, share in zip(LANGUAGES, self.bytes, self.shares, strict=False)
            if end * share > size
        ]
        if missing:
            raise UserError(f"--gb {gigabytes:g}{self._after()}: " + "; ".join(missing))
        return end

    def _after(self) -> str:
        return f" after the {_gigabytes(self.start)} of an earlier stage" if self.start else ""

    def rows(self, entries: np.ndarray) -> np.ndarray:
        """(n, 5), for each entry of the stream: tokens, target bytes and documents, source bytes and documents."""
        rows = np.zeros((len(entries), 1 + 2 * len(LANGUAGES)), np.int64)
        for language, shard in enumerate(self.shards):
            mine = entries % len(LANGUAGES) == language
            documents = shard.documents[entries[mine] // len(LANGUAGES)]
            rows[mine, 0] = documents["tokens"]
            rows[mine, 1 + 2 * language] = documents["bytes"]
            rows[mine, 2 + 2 * language] = 1
        return rows

    def _running_totals(self) -> np.ndarray:
        """(5, blocks + 1): the sums of `rows` before each block of the stream, and of all."""
        sums = [np.zeros((1, 1 + 2 * len(LANGUAGES)), np.int64)]
        step = BLOCK * 2**14  # a million documents at a time
        for first in range(0, len(self.stream), step):
            rows = self.rows(self.stream[first : first + step])
            sums.append(np.add.reduceat(rows, np.arange(0, len(rows), BLOCK)))
        return np.ascontiguousarray(np.cumsum(np.concatenate(sums), axis=0).T)

    def find(self, token: int) -> tuple[int, np.ndarray]:
        """The place in the stream of the document with this token, and the totals (as in `rows`) before it."""
        block = int(np.searchsorted(self.totals[0], token, "right")) - 1
        rows = self.rows(self.stream[block * BLOCK : (block + 1) * BLOCK])
        ends = self.totals[0, block] + np.cumsum(rows[:, 0])
        within = int(np.searchsorted(ends, token, "right"))
        return block * BLOCK + within, self.totals[:, block] + rows[:within].sum(axis=0)

    def document(self, place: int) -> tuple[int, TokenShard, int]:
        """The language, the shard, and the document's number in it."""
        number, language = divmod(int(self.stream[place]), len(LANGUAGES))
        return language, self.shards[language], number

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream."""
        place, totals = self.find(start)
        parts, position = [], int(totals[0])
        while position < stop:
            _, shard, number = self.document(place)
            offset, count = int(shard.documents["offset"][number]), int(shard.documents["tokens"][number])
            parts.append(shard.tokens[offset + max(start - position, 0) : offset + min(stop - position, count)])
            place, position = place + 1, position + count
        return np.concatenate(parts)


class Windows:
    """The tokens of a mixture cut into windows of `seq_len`, across the borders of documents.

    Window i has the tokens [i * seq_len, (i + 1) * seq_len) as input and the tokens one further as labels, so every
    token but the very first is predicted once. The last window is filled up with labels that do not count.
    """

    def __init__(self, mixture: Mixture, seq_len: int) -> None:
        self.mixture, self.seq_len = mixture, seq_len
        self.tokens = mixture.tokens

    def __len__(self) -> int:
        return math.ceil(max(self.tokens - 1, 0) / self.seq_len)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Input and labels, each (seq_len,) of int64."""
        tokens = self.mixture.read(*self._range(index)).astype(np.int64)
        inputs = torch.zeros(self.seq_len, dtype=torch.long)
        labels = torch.full((self.seq_len,), IGNORE)
        inputs[: len(tokens) - 1] = torch.from_numpy(tokens[:-1])
        labels[: len(tokens) - 1] = torch.from_numpy(tokens[1:])
        return inputs, labels

    def _range(self, index: int) -> tuple[int, int]:
        """The tokens of the stream of which a window consists, the last label included."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return index * self.seq_len, min((index + 1) * self.seq_len + 1, self.tokens)

    def label_count(self, start: int, stop: int) -> int:
        """How many labels count in windows [start, stop)."""
        return min(stop * self.seq_len, self.tokens - 1) - min(start * self.seq_len, self.tokens - 1)

    def documents(self, index: int) -> list[str]:
        """`file:line` of every document of which a part is in this window."""
        first, stop = self._range(index)
        places = range(self.mixture.find(first)[0], self.mixture.find(stop - 1)[0] + 1)
        return [shard.place(number) for _, shard, number in map(self.mixture.document, places)]

    def consumed(self, windows: int) -> dict[str, int]:
        """What the first `windows` windows used; a document counts in full even if they only began it.

        `position` is the `start` for a following stage that should get none of these documents.
        """
        totals, position = np.zeros_like(self.mixture.totals[:, 0]), self.mixture.start
        if windows:
            place, before = self.mixture.find(self._range(windows - 1)[1] - 1)
            totals = before + self.mixture.rows(self.mixture.stream[place : place + 1])[0]
            language, *_ = self.mixture.document(place)
            bytes_before = self.mixture.before[language] + int(before[1 + 2 * language])
            position = math.floor(bytes_before / self.mixture.shares[language]) + 1
        names = [f"{name}_{unit}" for name in LANGUAGES for unit in ("bytes", "documents")]
        return dict(zip(names, map(int, totals[1:]), strict=True)) | {"position": position}


def _shuffled(shard: TokenShard, seed: int, language: int, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The documents of a shard in random order, but for those left out, and how many bytes of text come before each."""
    # RandomState, because numpy promises that its numbers never change; a Generator's may with the next version.
    order = np.random.RandomState([seed, language]).permutation(len(shard.documents))
    if len(left_out):
        order = order[~np.isin(order, left_out)]
    sizes = np.array(shard.documents["bytes"])[order]
    return order, np.cumsum(sizes, dtype=np.int64) - sizes


def _gigabytes(size: Fraction | int) -> str:
    return f"{float(size) / 1e9:.6g} GB"
