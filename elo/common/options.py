"""Command-line options: a parser whose complaints are one line, and types that say what a value should have been."""

import argparse
import math
import os
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, Self

from elo.common.errors import UserError

PATHS = ("DIR", "FILE", "PATH")
# Whole numbers are exact up to there, and a multiple of others in bytes is still finite.
LARGEST = {int: 1e15, float: 1e100}


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage; --help shows the module's docstring as it stands.

    No value is empty, since an unset variable in a script gives one; `type=str` is for those that may be. A value may
    begin with a dash, as in --layers -2,-1: options begin with two. In a `Path`, and where the metavar is DIR, FILE or
    PATH, ~ is the home directory. Of an option that is given twice the last value counts; lists are one.
    """

    def __init__(self, **settings: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        self.register("action", None, _Store)

    def _parse_optional(self, text: str) -> object:
        """argparse's question whether an argument is an option; None: it is a value."""
        return super()._parse_optional(text) if text == "-h" or text.startswith("--") else None

    def _get_value(self, action: argparse.Action, text: str) -> object:
        """argparse's conversion of a value, which knows the option."""
        if action.type is not str and action.nargs != argparse.PARSER and not text.strip():
            raise argparse.ArgumentError(action, "its value is empty; leave the option out for its default")
        if action.type is Path or action.metavar in PATHS:
            text = os.path.expanduser(text)
            if text.startswith("~"):
                raise argparse.ArgumentError(action, f"{text}: there is no such user; write ./{text} for such a name")
        return super()._get_value(action, text)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


class _Store(argparse.Action):
    """argparse's own, which forgets the list of --target ko --target ja but for its end."""

    def __call__(self, _: object, namespace: Namespace, values: Any, option: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        more = before if isinstance(values, list) and before is not self.default else []
        setattr(namespace, self.dest, [*more, *values] if more else values)


def option(description: str, default: Any = MISSING, **settings: Any) -> Any:
    """A field of `Options`, a switch if its default is False; settings: those of argparse, such as `type`."""
    switch = {"action": "store_true"} if default is False else {}
    return field(default=default, metadata={"help": description, **switch, **settings})


class Options:
    """Options that belong together: a dataclass, each of whose fields is an option of its name. TITLE: in --help."""

    @classmethod
    def add_arguments(cls, parser: Parser, **defaults: Any) -> None:
        """defaults: of options that have others in this command, or none of their own."""
        group = parser.add_argument_group(cls.TITLE)
        for one in fields(cls):
            name, default = "--" + one.name.replace("_", "-"), defaults.get(one.name, one.default)
            group.add_argument(name, default=default, **one.metadata)

    @classmethod
    def from_arguments(cls, arguments: Namespace) -> Self:
        return cls(**{one.name: getattr(arguments, one.name) for one in fields(cls)})


def _number(fits: Callable[[float], bool], expected: str, kind: type = float) -> Callable[[str], Any]:
    """A type of option, for argparse."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value) or value > LARGEST[kind]:
            limit = f" and at most {LARGEST[kind]:g}" if value > LARGEST[kind] else ""
            raise argparse.ArgumentTypeError(f"{text!r:.100} is not {expected}{limit}")
        return kind(value)

    return convert


positive = _number(lambda value: value > 0, "a number above 0")
not_negative = _number(lambda value: value >= 0, "a number, 0 or more")
share = _number(lambda value: 0 <= value <= 1, "a number from 0 to 1")
positive_share = _number(lambda value: 0 < value <= 1, "a number above 0 and at most 1")
positive_int = _number(lambda value: value >= 1 and value.is_integer(), "a whole number above 0", int)
not_negative_int = _number(lambda value: value >= 0 and value.is_integer(), "a whole number, 0 or more", int)
# As numpy takes them.
seed = _number(lambda value: 0 <= value < 2**32 and value.is_integer(), f"a whole number below {2**32}", int)


@dataclass(frozen=True)
class Interval:
    """A number of steps, or a time."""

    text: str
    steps: float = float("inf")
    seconds: float = float("inf")

    def is_due(self, steps: int, seconds: float) -> bool:
        """Whether it is over after so many steps and seconds."""
        return steps >= self.steps or seconds >= self.seconds

    def __str__(self) -> str:
        return self.text

    @staticmethod
    def parse(text: str) -> "Interval":
        """Steps, such as 100, or a time, such as 30s, 15m or 2h."""
        match = re.fullmatch(r"(\d{1,9})([smh]?)", text, re.ASCII)
        if not match or not int(match[1]):
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps, as 100, nor a time, as 15m or 2h")
        count, unit = int(match[1]), match[2]
        if not unit:
            return Interval(text, steps=count)
        return Interval(text, seconds=count * {"s": 1, "m": 60, "h": 3600}[unit])
