"""Records -> a Markdown table in the paper's layout, the paper's figures beside ours, and a picture."""

from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any

from benchmarks.published import TABLES
from benchmarks.training_step.report import figure3_text
from eval.figures import plot
from eval.tables import markdown
from experiments.crossover import compare
from experiments.rows import BENCHMARKS

LANGUAGES = ("target", "source")
COLUMNS = (*LANGUAGES, *BENCHMARKS, "tokens", "hours")
Records = list[dict[str, Any]]
Rows = dict[str, Records]  # of each name one record a seed


def write(experiment: ModuleType, records: Records, file: Path) -> str:
    """The table's text; file: of the records, beside which table and picture are."""
    from eval.figures import charts  # only here is matplotlib needed

    title, figures, picture = experiment.__doc__, records[-1]["figures"], file.with_suffix(".png")
    rows = {name: [record for record in records if record["row"] == name] for name in (r["row"] for r in records)}
    if "figure3" in figures:
        text = "\n".join([title, "", *(f"    {line}" for line in figure3_text(figures["figure3"]).splitlines()), ""])
        charts.draw({"kind": "speed", **plot.speed({picture: figures})}, picture, None)
    else:
        along = getattr(experiment, "ALONG", None)
        text = f"{title}\n\n{table(rows, TABLES.get(file.stem, {}))}\n"
        common = set.intersection(*({r["seed"] for r in of_row if "failed" not in r} for of_row in rows.values()))
        shared = {name: [record for record in of_row if record["seed"] in common] for name, of_row in rows.items()}
        if along and (compared := compare(points(shared, "target", along), points(shared, "hours", along))):
            text += f"\n{compared}"
        panels = {f"{name}, bits a byte": points(rows, name, along) for name in LANGUAGES}
        if any(panels.values()):
            charts.draw({"kind": "means", "panels": panels, "along": along}, picture, None)
    file.with_suffix(".md").write_text(text)
    return text


def mean(records: Records, column: str) -> tuple[float, float] | None:
    """Of the seeds that have such a figure, and their standard deviation."""
    numbers = [record["figures"][column] for record in records if column in record["figures"]]
    return (fmean(numbers), stdev(numbers) if len(numbers) > 1 else 0.0) if numbers else None


def table(rows: Rows, published: dict[str, Any]) -> str:
    every = [record for records in rows.values() for record in records]
    columns = [name for name in COLUMNS if any(name in record["figures"] for record in every)]
    paper = published.get(every[-1]["model"], {})
    papers = [name for name in COLUMNS if any(name in row for row in paper.values())]
    lines = [["", *columns, *(f"{name}, paper" for name in papers), "rates", "seeds"]]
    for name, records in rows.items():
        cells = [name, *(shown(mean(records, column), column) for column in columns)]
        cells += [f"{paper[name][column]:.3g}" if column in paper.get(name, ()) else "" for column in papers]
        failed = [f"failed: {record['failed']}" for record in records if "failed" in record]
        cells += [*(failed[:1] or [distinct(records, "rates")]), ",".join(str(record["seed"]) for record in records)]
        lines.append(cells)
    said = f"{distinct(every, 'device')}, {distinct(every, 'date')}; "
    said += "target, source: bits a byte; ± is the standard deviation"
    if "*" in distinct(every, "rates"):
        said += "; * is at an end of --rates, beyond which there may be better ones"
    given = every[-1]["settings"]
    without = [f"--{name}" for name in ("instruct", "conversations", "source") if not any(given[name])]
    without += [name for name in BENCHMARKS if name not in columns]
    return f"{markdown(lines)}\n\n{said}. Without {', '.join(without) or 'nothing'}."


def distinct(records: Records, name: str) -> str:
    """What seeds and rows have in common, or else each."""
    return " and ".join(dict.fromkeys(record[name] for record in records))


def shown(figure: tuple[float, float] | None, column: str) -> str:
    if figure is None:
        return ""
    spread = f" ± {figure[1]:.2g}" if figure[1] else ""
    return f"{figure[0]:{',.0f' if column == 'tokens' else '.4g'}}{spread}"


def points(rows: Rows, column: str, along: str | None) -> dict[str, list[tuple[str | float, float, float]]]:
    """Of each series (place, mean, spread): a row is a place, or with `along` its name's last word is one."""
    series: dict[str, list[tuple[str | float, float, float]]] = {}
    for name, records in rows.items():
        label, _, place = name.rpartition(" ") if along else ("", "", name)
        if figure := mean(records, column):
            series.setdefault(label.rstrip(" +,"), []).append((float(place) if along else place, *figure))
    return series
