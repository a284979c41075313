"""Random numbers for a purpose, and a draw from a stream of unknown length."""

import heapq
from collections.abc import Callable
from typing import Any

import numpy as np


def random_numbers(seed: int, *purpose: str | int) -> np.random.RandomState:
    """Random numbers for one purpose. RandomState, because numpy promises that its numbers never change."""
    numbers = [number for part in purpose for number in (part.encode() if isinstance(part, str) else [part])]
    return np.random.RandomState([seed, *numbers])


class Pool:
    """Draws `size` examples in one pass, or all: those with the smallest of random numbers.

    An example is made only if it is among the smallest so far, so that of a large file little is tokenized. None: it
    cannot be made.
    """

    def __init__(self, size: int | None, random: np.random.RandomState) -> None:
        self.size, self.random = size, random
        self.heap: list[tuple[float, int, Any]] = []  # the largest number first, as its negative
        self.offered = self.refused = 0

    def offer(self, make: Callable[[], Any]) -> None:
        key = -self.random.random_sample()
        self.offered += 1
        is_full = self.size is not None and len(self.heap) >= self.size
        if is_full and key < self.heap[0][0]:
            return
        self.refused += 1  # unless it can be made
        example = make()
        if example is None:
            return
        self.refused -= 1
        heapq.heappush(self.heap, (key, self.offered, example))
        if is_full:
            heapq.heappop(self.heap)

    def draw(self, size: int) -> list[Any]:
        """The `size` examples with the smallest numbers."""
        return [example for *_, example in heapq.nlargest(size, self.heap)]
