"""How all figures look."""

from collections.abc import Iterable
from typing import Any

# Okabe and Ito's colours, told apart by colour-blind readers too, without the yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", ":", "-.")
HATCHES = ("", "///", "...", "xxx")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "svg.hashsalt": "elo",
}


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour each, and beyond the colours another kind of line; `hatch_of` is the same for bars."""
    return {
        name: {"color": COLORS[index % len(COLORS)], "linestyle": LINES[index // len(COLORS) % len(LINES)]}
        for index, name in enumerate(names)
    }


def hatch_of(style: dict[str, Any]) -> str:
    return HATCHES[LINES.index(style["linestyle"])]
