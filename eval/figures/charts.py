"""The drawing of `eval plot`, with matplotlib and without a screen."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elo.common.errors import UserError
from eval.figures.style import COLORS, MARKERS, STYLE, hatch_of, styles

try:
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    from eval.figures.labels import Labels
    from eval.figures.means import draw_means
except ImportError:
    raise UserError("eval plot draws with matplotlib: pip install matplotlib") from None

# Fonts with Korean and Japanese, where one is installed.
WIDE_FONTS = (
    *("Noto Sans CJK KR", "Noto Sans CJK JP", "Noto Sans KR", "Noto Sans JP", "NanumGothic", "Malgun Gothic"),
    *("Apple SD Gothic Neo", "AppleGothic", "UnDotum", "Baekmuk Dotum", "IPAexGothic", "IPAPGothic", "TakaoPGothic"),
    *("Hiragino Sans", "Yu Gothic", "Meiryo", "MS Gothic", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Unifont"),
)
SMOOTH_FROM = 100  # steps: with more of them a mean over the neighbours is drawn over the pale curve


def draw(data: dict[str, Any], out: Path, title: str | None) -> None:
    """Draw what `eval.figures.plot.collect` made, into a file."""
    fonts = ["DejaVu Sans", *(name for name in WIDE_FONTS if name in set(font_manager.get_font_names()))]
    with matplotlib.rc_context({**STYLE, "font.family": fonts}):
        text = Labels(fonts)
        kinds = {"scores": draw_scores, "runs": draw_runs, "speed": draw_speed, "means": draw_means}
        figure = kinds[data["kind"]](data, text)
        FigureCanvasAgg(figure)
        if title:
            figure.suptitle(text(title), fontsize=14)
        aside = out.with_name(f".new-{out.name}")  # whoever looks at a figure never sees a part of it
        try:
            figure.savefig(aside, bbox_inches="tight")
            aside.replace(out)
        except OSError as error:
            raise UserError(f"{out}: {error.strerror}") from None
        finally:
            aside.unlink(missing_ok=True)
        text.complain()


def missing_as_nan(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=float)


# ---- scores


def draw_scores(data: dict[str, Any], text: Labels) -> Figure:
    """A column a benchmark: its radar above, where it has three categories or more, and its bars below."""
    benchmarks = data["benchmarks"]
    style_of = styles(dict.fromkeys(name for benchmark in benchmarks.values() for name in benchmark["models"]))
    radars = any(len(benchmark["categories"]) >= 3 for benchmark in benchmarks.values())
    wide = max(5.4, 1.4 + 0.95 * len(style_of))
    figure = Figure(figsize=(wide * len(benchmarks), (4.6 if radars else 0) + 3.4), layout="constrained")
    rows, columns = 2 if radars else 1, len(benchmarks)
    grid = figure.add_gridspec(rows, columns, height_ratios=[4.6, 3.4] if radars else [1])
    handles: dict[str, Any] = {}
    for column, (name, benchmark) in enumerate(benchmarks.items()):
        bars = figure.add_subplot(grid[rows - 1, column])
        handles |= turn_bars(bars, benchmark["models"], style_of, text)
        top = bars
        if len(benchmark["categories"]) >= 3:
            top = figure.add_subplot(grid[0, column], projection="polar")
            radar(top, benchmark, style_of, text)
        top.set_title(text(name), pad=18, fontweight="bold")
    legend(figure, handles, text)
    return figure


def radar(axes: Axes, benchmark: dict[str, Any], style_of: dict[str, dict[str, Any]], text: Labels) -> None:
    categories = benchmark["categories"]
    angles = np.linspace(0, 2 * np.pi, len(categories), endpoint=False)
    closed = [*angles, angles[0]]
    for name, model in benchmark["models"].items():
        values = missing_as_nan(model["categories"])
        axes.plot(closed, [*values, values[0]], **style_of[name], linewidth=1.8, marker="o", markersize=3.5)
        if len(benchmark["models"]) <= 3 and not np.isnan(values).any():
            axes.fill(closed, [*values, values[0]], color=style_of[name]["color"], alpha=0.07)
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 10)
    axes.set_yticks([2, 4, 6, 8, 10], ["2", "4", "6", "8", "10"], color="#777777", fontsize=8)
    axes.set_rlabel_position(180 / len(categories))
    axes.set_xticks(angles, [text(category) for category in categories])
    axes.spines["polar"].set_color("#BBBBBB")
    for angle, label in zip(angles, axes.get_xticklabels(), strict=True):
        side = math.sin(angle)
        label.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")


def turn_bars(axes: Axes, models: dict[str, Any], style_of: dict[str, dict[str, Any]], text: Labels) -> dict[str, Any]:
    """Groups of first turn, second turn and average, a bar a model; returns a handle of each for the legend."""
    handles = {}
    share = 0.84 / len(models)
    for index, (name, model) in enumerate(models.items()):
        values = missing_as_nan([model["first"], model["second"], model["average"]])
        places = np.arange(3) - 0.42 + share * (index + 0.5)
        look = {"color": style_of[name]["color"], "hatch": hatch_of(style_of[name]), "edgecolor": "white"}
        bars = axes.bar(places, values, share * 0.95, linewidth=0, **look)
        handles[name] = bars
        if len(models) <= 8:
            labels = ["" if math.isnan(value) else f"{value:.2f}" for value in values]
            axes.bar_label(bars, labels, fontsize=8 if len(models) <= 4 else 7, padding=2)
    axes.set_xticks(range(3), ["first turn", "second turn", "average"])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 10.6)
    axes.set_yticks(range(0, 11, 2))
    axes.set_ylabel("score")
    return handles


def legend(figure: Figure, handles: dict[str, Any], text: Labels) -> None:
    """One for all panels, below them."""
    figure.legend(
        list(handles.values()),
        [text(name) for name in handles],
        loc="outside lower center",
        ncols=min(len(handles), max(1, int(figure.get_figwidth() // 2.6))),
    )


# ---- runs

CURVES = {
    "loss": ("loss (nats a token)", 1.0),
    "tokens_per_second": ("tokens a second", 1.0),
    "memory_bytes": ("memory (GB)", 1e-9),
}


def draw_runs(data: dict[str, Any], text: Labels) -> Figure:
    runs = data["runs"]
    style_of = styles(runs)
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    handles: dict[str, Any] = {}
    for axes, (field, (label, unit)) in zip(figure.subplots(1, 3), CURVES.items(), strict=True):
        for name, run in runs.items():
            tokens, values = np.array(run["tokens"]), unit * missing_as_nan(run[field])
            if len(tokens) == 1:
                (handles[name],) = axes.plot(tokens, values, **style_of[name], marker="o")
            elif len(tokens) < SMOOTH_FROM or field == "memory_bytes":
                (handles[name],) = axes.plot(tokens, values, **style_of[name], linewidth=1.8)
            else:
                axes.plot(tokens, values, **style_of[name], linewidth=0.7, alpha=0.3)
                smooth = running_mean(values, len(values) // 25)
                (handles[name],) = axes.plot(tokens, smooth, **style_of[name], linewidth=2)
            if field == "loss" and any(value is not None for value in run["validation_loss"]):
                held_out = missing_as_nan(run["validation_loss"])
                there, look = ~np.isnan(held_out), {"color": style_of[name]["color"], "linestyle": ":"}
                axes.plot(tokens[there], held_out[there], **look, marker="o", markersize=5, markerfacecolor="white")
                label = "loss (nats a token), circles: held out"
        axes.set_xlabel("tokens")
        axes.set_title(label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if field != "loss":
            axes.set_ylim(bottom=0)
        if field == "tokens_per_second":
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    legend(figure, handles, text)
    return figure


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over up to `width` values to each side, as many on both, of those that are there."""
    present = ~np.isnan(values)
    sums = np.concatenate([[0], np.cumsum(np.where(present, values, 0))])
    counts = np.concatenate([[0], np.cumsum(present)])
    index = np.arange(len(values))
    width = np.minimum(width, np.minimum(index, len(values) - 1 - index))
    start, stop = index - width, index + width + 1
    with np.errstate(invalid="ignore"):
        return (sums[stop] - sums[start]) / (counts[stop] - counts[start])


# ---- speed


def draw_speed(data: dict[str, Any], text: Labels) -> Figure:
    bars, figure3 = data["bars"], data["figure3"]
    panels = ["bars"] * bool(bars) + ["lines"] * bool(figure3)
    dtypes = list(dict.fromkeys(dtype for row in bars.values() for dtype in row))
    heights = [max(2.2, 0.8 + 0.42 * len(bars) * max(1, len(dtypes))) if panel == "bars" else 4.6 for panel in panels]
    figure = Figure(figsize=(13, sum(heights) + 0.3), layout="constrained")
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, panel in zip(parts, panels, strict=True):
        if panel == "lines":
            hours_over_gigabytes(part.subplots(), figure3, text)
            continue
        left, right = part.subplots(1, 2, sharey=True)
        handles = implementation_bars(left, bars, dtypes, "tokens_per_second", "tokens a second", text)
        implementation_bars(right, bars, dtypes, "memory_bytes", "peak memory (GB)", text)
        if dtypes != [""]:
            left.legend(handles, [text(dtype) for dtype in dtypes], loc="lower right")
    return figure


def implementation_bars(
    axes: Axes, bars: dict[str, Any], dtypes: Sequence[str], field: str, label: str, text: Labels
) -> list[Any]:
    """Bars to the right, a group an implementation and a bar a dtype, with the slowest and the fastest step."""
    unit = 1e-9 if field == "memory_bytes" else 1.0
    share = 0.8 / len(dtypes)
    handles = []
    for index, dtype in enumerate(dtypes):
        rows = [row.get(dtype, {}) for row in bars.values()]
        values = unit * missing_as_nan([row.get(field) for row in rows])
        places = np.arange(len(rows)) - 0.4 + share * (index + 0.5)
        drawn = axes.barh(places, values, share * 0.9, color=COLORS[index % len(COLORS)])
        handles.append(drawn)
        reach = values
        if field == "tokens_per_second":
            slowest, fastest = (missing_as_nan([row.get(name) for row in rows]) for name in ("slowest", "fastest"))
            reach = np.fmax(values, fastest)
            spread = np.nan_to_num(np.maximum([values - slowest, fastest - values], 0))
            axes.errorbar(values, places, xerr=spread, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
        for place, value, end in zip(places, values, reach, strict=True):
            if not math.isnan(value):
                shown = f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
                axes.annotate(shown, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [text(name) for name in bars])
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.set_title(label)
    return handles


def hours_over_gigabytes(axes: Axes, figure3: dict[str, Any], text: Labels) -> None:
    """The paper's Figure 3: a line a method, and beside it the paper's own hours where it gives them."""
    methods = dict.fromkeys([*figure3["hours"], *figure3["paper"]])
    for index, name in enumerate(methods):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        for source, line, label in (("hours", "-", text(name)), ("paper", "--", f"{text(name)}, paper")):
            if name in figure3[source]:
                values = missing_as_nan(figure3[source][name])
                there = ~np.isnan(values)
                look = {"color": color, "marker": marker, "linestyle": line}
                hollow = {"markerfacecolor": "white"} if source == "paper" else {}
                axes.plot(np.array(figure3["gigabytes"])[there], values[there], label=label, **look, **hollow)
    axes.set_xlabel("training text (GB)")
    axes.set_ylabel("hours")
    axes.set_xlim(left=0)
    axes.set_yscale("log")  # the paper's GPUs and the machine at hand may be orders of magnitude apart
    if len(figure3["gigabytes"]) <= 12:
        axes.set_xticks(figure3["gigabytes"])
    axes.legend(loc="upper left", ncols=3)
    axes.set_title("training time")
