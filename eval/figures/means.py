"""Means with their spread: what `python -m experiments` draws."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.figures.labels import Labels
from eval.figures.style import COLORS, MARKERS


def draw_means(data: dict[str, Any], text: Labels) -> Figure:
    """A panel each of data["panels"], {title: {series: [(place, mean, spread)]}}.

    Lines over the places, which are numbers, if data["along"] says of what; else a dot for each named place.
    """
    panels = {title: series for title, series in data["panels"].items() if series}
    rows = 0 if data["along"] else max(len(points) for series in panels.values() for points in series.values())
    figure = Figure(figsize=(1.5 + 5.5 * len(panels), 1.4 + 0.42 * rows if rows else 4.4), layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False, sharey=bool(rows))[0]
    for axes, (title, series) in zip(every, panels.items(), strict=True):
        axes.set_title(title)
        for index, (name, points) in enumerate(series.items()):
            look = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)], "capsize": 3}
            places, means, spreads = zip(*points, strict=True)
            if rows:
                named_dots(axes, [text(place) for place in places], means, spreads, look)
            else:
                axes.errorbar(places, means, spreads, label=text(name), **look)
        if data["along"]:
            axes.set_xlabel(data["along"])
            axes.legend()
    return figure


def named_dots(axes: Axes, names: list[str], means: tuple, spreads: tuple, look: dict[str, Any]) -> None:
    """The first name on top, and at each dot its number."""
    places = range(len(names))
    axes.errorbar(means, places, xerr=spreads, linestyle="none", **look)
    for place, mean in zip(places, means, strict=True):
        axes.annotate(f"{mean:.3f}", (mean, place), (0, 6), textcoords="offset points", ha="center", fontsize=9)
    axes.set_yticks(places, names)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.margins(x=0.15, y=0.08)
