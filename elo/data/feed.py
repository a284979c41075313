"""What a run trains on, read by a thread while the device computes on what was read before."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from elo.model.loss import IGNORE
from elo.runs.devices import pinned

AHEAD = 2  # micro-batches that wait for the device; the thread has one more in its hands


class Batches(Protocol):
    """What a stage trains on: one global batch per step, the same for any number of processes and any micro-batch.

    A thread calls `micro_batches` for later steps while the training loop calls the rest: no call may change anything.
    """

    def __len__(self) -> int:
        """The number of steps."""

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of a step as (tokens, labels), equally many and of equal shape on every process."""

    def label_count(self, step: int) -> int:
        """Labels that count in the whole batch, over all processes."""

    def consumed(self, steps: int) -> dict[str, int]:
        """What the run has used up after so many steps: `tokens`, `bytes`, ..."""

    def documents(self, step: int) -> list[str]:
        """Where the batch's text comes from, as file:line."""


class MicroBatch(NamedTuple):
    tokens: Tensor
    labels: Tensor
    counted: int  # labels that count
    is_last: bool  # of its step


def in_order(batches: Batches, steps: Iterable[int], device: torch.device) -> Iterator[MicroBatch]:
    """The micro-batches of these steps, on the host, from where `device` can copy them while it computes."""
    for step in steps:
        read = None
        for tokens, labels in batches.micro_batches(step):
            if read:
                yield MicroBatch(*read, is_last=False)
            read = pinned(tokens, device), pinned(labels, device), int((labels != IGNORE).sum())
        yield MicroBatch(*read, is_last=True)


class Feed(Iterator[MicroBatch]):
    """`in_order` with the next `AHEAD` already read by a thread, which `with` ends.

    What fails in the thread is raised by the `next` that wants it. `waited`: seconds that `next` has waited in all.
    """

    def __init__(self, batches: Batches, steps: Iterable[int], device: torch.device) -> None:
        self.waited = 0.0
        self._thread = ThreadPoolExecutor(1, "feed")
        self._read = partial(self._thread.submit, next, in_order(batches, steps, device))
        self._ahead = deque(self._read() for _ in range(AHEAD))

    def __next__(self) -> MicroBatch:
        started = time.perf_counter()
        micro_batch = self._ahead.popleft().result()  # or StopIteration
        self.waited += time.perf_counter() - started
        self._ahead.append(self._read())
        return micro_batch

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)
