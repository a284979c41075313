"""The two sides of a comparison, each in a process of its own, so that what one sets there does not reach the other."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

_run: Callable[[Any], Any]


class Side:
    def __init__(self, make: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
        """make(*arguments), called in the new process, gives what is measured there."""
        self.process = ProcessPoolExecutor(1, get_context("spawn"), _start, (make, arguments))

    def run(self, argument: Any) -> tuple[float, Any]:
        """Seconds and result."""
        return self.process.submit(_timed, argument).result()


def _start(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _run
    _run = make(*arguments)


def _timed(argument: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = _run(argument)
    return time.perf_counter() - started, result
