"""Command-line options: a parser whose complaints are one line, and types that say what a value should have been."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from elo.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage; --help shows the module's docstring as it stands."""

    def __init__(self, **settings: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def positive_int(text: str) -> int:
    return int(_number(text, lambda value: value >= 1 and value.is_integer(), "a whole number above 0"))


def not_negative_int(text: str) -> int:
    return int(_number(text, lambda value: value >= 0 and value.is_integer(), "a whole number, 0 or more"))


def positive(text: str) -> float:
    return _number(text, lambda value: 0 < value < float("inf"), "a number above 0")


def not_negative(text: str) -> float:
    return _number(text, lambda value: 0 <= value < float("inf"), "a number, 0 or more")


def share(text: str) -> float:
    return _number(text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _number(text: str, fits: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value
