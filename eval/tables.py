"""Tables: on a terminal, in which Korean and Japanese names stand straight too, and in Markdown."""

import unicodedata
from collections.abc import Sequence

from elo.common.terminal import printable


def table(rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """Rows of cells as lines of text: the first `names` columns are aligned to the left, the others to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for index, (cell, columns) in enumerate(zip(row, widths, strict=True)):
            space = " " * (columns - width(cell))
            cells.append(cell + space if index < names else space + cell)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def width(text: str) -> int:
    """The columns that a text takes: East Asian wide characters take two."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same in Markdown; the first row is the head."""
    lines = ["| " + " | ".join(printable(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
