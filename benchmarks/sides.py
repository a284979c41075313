"""Measurements in processes of their own, so that what one sets or fills there does not reach another."""

import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import check_output
from elo.common.options import Parser

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


def take_turns(sides: dict[str, Side], argument: Any, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Of each side the median of its seconds, and its result. They alternate: the machine's moods hit all alike."""
    runs = [{name: side.run(argument) for name, side in sides.items()} for _ in range(rounds)]
    return {name: median(run[name][0] for run in runs) for name in sides}, {name: runs[-1][name][1] for name in sides}


def compared_options(parser: Parser) -> Namespace:
    """A parser's options, and those that all have whose result is one file about one model."""
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    options = parser.parse_args()
    check_output("--json", options.json, [options.model])
    return options


def _start(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _run
    _run = make(*arguments)


def _timed(argument: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = _run(argument)
    return time.perf_counter() - started, result
