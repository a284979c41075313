"""Records -> a Markdown table in the paper's layout, and a picture."""

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

COLUMNS = {
    "target": "target, bits/byte",
    "source": "source, bits/byte",
    "mmlu": "MMLU",
    "kobest": "KoBEST",
    "marc_ja": "MARC-ja",
    "mt_bench": "MT-Bench",
    "logickor": "LogicKor",
    "japanese_mt_bench": "Japanese MT-Bench",
    "tokens": "tokens trained",
    "hours": "hours",
}
Records = list[dict[str, Any]]


def groups(records: Records, by: str) -> dict[Any, Records]:
    return {key: [record for record in records if record[by] == key] for key in dict.fromkeys(r[by] for r in records)}


def mean_and_spread(records: Records, column: str) -> tuple[float, float] | None:
    """Over seeds; the spread, their standard deviation, of one is 0."""
    numbers = [record["figures"][column] for record in records if column in record["figures"]]
    return (fmean(numbers), stdev(numbers) if len(numbers) > 1 else 0.0) if numbers else None


def markdown(title: str, records: Records) -> str:
    papers = [name for name in COLUMNS if any(name in record["paper"] for record in records)]
    columns = [name for name in COLUMNS if name in papers or mean_and_spread(records, name)]
    head = ["", *(COLUMNS[name] for name in columns), *(f"{COLUMNS[name]}, paper" for name in papers), "rates"]
    lines = [title, "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, those in groups(records, "row").items():
        cells = [name]
        for column in columns:
            mean, spread = mean_and_spread(those, column) or (None, 0.0)
            form = ",.0f" if column == "tokens" else ".4g"
            cells.append("" if mean is None else f"{mean:{form}}" + (f" ± {spread:.2g}" if spread else ""))
        cells += [f"{those[0]['paper'][column]:g}" if column in those[0]["paper"] else "" for column in papers]
        failed = [f"failed: {record['failed']}" for record in those if "failed" in record]
        lines.append("| " + " | ".join([*cells, *(failed[:1] or [those[0]["rates"]])]) + " |")
    seeds, last = list(groups(records, "seed")), records[-1]
    said = (
        f"Seeds {', '.join(map(str, seeds))}; ± is the standard deviation." if len(seeds) > 1 else f"Seed {seeds[0]}."
    )
    left_out = f" Left out: {'; '.join(last['left_out'])}." if last["left_out"] else ""
    return "\n".join([*lines, "", f"{last['device']}, {last['date']}. {said}{left_out}\n"])


def draw(title: str, records: Records, out: Path) -> None:
    """Held-out bits a byte: a dot a row with its seeds' spread, or lines where rows are points of series."""
    # Only here is matplotlib needed.
    from eval.figures.charts import COLORS, MARKERS, STYLE, Figure, FigureCanvasAgg, matplotlib

    with matplotlib.rc_context(STYLE):
        languages = [name for name in ("target", "source") if mean_and_spread(records, name)]
        rows, series = groups(records, "row"), groups(records, "series")
        picture = Figure(figsize=(1 + 5.4 * len(languages), 4.2 if any(series) else 1.4 + 0.42 * len(rows)))
        FigureCanvasAgg(picture)
        for number, language in enumerate(languages):
            axes = picture.add_subplot(1, len(languages), number + 1, title=COLUMNS[language])
            if any(series):
                for index, (name, those) in enumerate(series.items()):
                    points = {at: mean_and_spread(at_it, language) for at, at_it in groups(those, "at").items()}
                    x, y = zip(*((at, point) for at, point in points.items() if point), strict=True)
                    means, spreads = zip(*y, strict=True)
                    axes.errorbar(x, means, spreads, label=name, color=COLORS[index], marker=MARKERS[index], capsize=3)
                axes.set_xlabel("units of alignment")
                axes.legend()
                continue
            for place, (name, those) in enumerate(rows.items()):
                if point := mean_and_spread(those, language):
                    color = COLORS[1 if name.startswith(("ELO", "layers")) else 0]
                    axes.errorbar(point[0], place, xerr=point[1], fmt="o", color=color, capsize=3)
                    axes.annotate(f"{point[0]:.3f}", (point[0], place), (0, 6), textcoords="offset points", ha="center")
            axes.set_yticks(range(len(rows)), [] if number else list(rows))
            axes.invert_yaxis()
            axes.margins(x=0.15, y=0.1)
        picture.suptitle(f"{title}\n(fewer bits are better)", fontsize=11)
        picture.tight_layout()
        picture.savefig(out)
