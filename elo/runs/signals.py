"""Signals: SIGTERM and Ctrl-C end a run in good order, and the death of torchrun ends its processes."""

import ctypes
import os
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from elo.common.errors import EarlyExit

SET_PARENT_DEATH_SIGNAL = 1  # man 2 prctl


class StopSignal:
    """SIGTERM and Ctrl-C end a run in good order: `EarlyExit` is raised where the program is.

    Not so while `deferred`: then `requested` tells of it, so that the loop can save before it leaves. Repeats change
    nothing: at a terminal each worker gets Ctrl-C twice, once from the terminal and once from torchrun.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = self.leaving = False
        self.is_deferred = False

    def listen(self) -> None:
        self.previous = [signal.signal(number, self._remember) for number in self.SIGNALS]

    def restore(self) -> None:
        for number, handler in zip(self.SIGNALS, self.previous, strict=True):
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self.is_deferred:
            self.leave()

    def leave(self) -> None:
        if not self.leaving:
            self.leaving = True
            raise EarlyExit("stopped by a signal; the same command goes on from the last saved state, if there is one")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False
        if self.requested:
            self.leave()


def end_with_torchrun() -> None:
    """A killed torchrun leaves no workers: they save and end."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


def end_with_parent(parent: int) -> None:
    """Have Linux send SIGTERM to this process when its parent dies, however that dies."""
    if platform.system() != "Linux":
        return
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it died before it could be watched
        os.kill(os.getpid(), signal.SIGTERM)


def restarted() -> bool:
    """Whether torchrun has started this process anew after it, or another one, had failed (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
