"""What goes to a terminal. Names, data and what a model says are shown there, never obeyed.

Everything that a user reads is printed by `say`, `note` or `show`; files and JSON get their texts as they are.
"""

import os
import sys
import unicodedata
from typing import TextIO

# Controls, invisible formats such as the overrides of writing direction, line separators, lone surrogates.
ESCAPED = ("Cc", "Cf", "Zl", "Zp", "Cs")
JOINERS = "\u200c\u200d"  # which emoji, Persian and Indic scripts need


def printable(text: str, keep: str = "") -> str:
    """The text with escapes, such as \\x1b, for the characters that a terminal would obey or not show.

    keep: controls to leave as they are, such as the newlines of an answer.
    """
    if text.isprintable():
        return text
    keep += JOINERS
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ESCAPED and c not in keep else c for c in text
    )


def show(text: str, file: TextIO | None = None, end: str = "\n") -> None:
    """A text of several lines, such as a table or a piece of an answer."""
    print(printable(text, keep="\n\t"), end=end, file=file, flush=True)


def say(message: str) -> None:
    """A line on stdout."""
    show(printable(message))


def note(message: str) -> None:
    """A line on stderr, once under torchrun."""
    if int(os.environ.get("RANK", 0)) == 0:
        show(printable(message), file=sys.stderr)
