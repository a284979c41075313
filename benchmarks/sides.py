"""Measurements in processes of their own, so that what one sets or fills there does not reach another."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from elo.common.errors import UserError

_run: Callable[[Any], Any]


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """function(*arguments), called in a fresh process. Raises what it raises there, UserError if it is killed."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UserError("a measuring process was killed; is there enough memory for it?") from None


class Side:
    """One of two that take turns; it keeps its process."""

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
