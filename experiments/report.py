"""Records -> a Markdown table in the paper's layout, the paper's figures beside ours, and a picture."""

from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any

from benchmarks.training_step.report import figure3_text
from eval.figures import plot
from experiments.crossover import compare
from experiments.rows import BENCHMARKS

LANGUAGES = ("target", "source")
COLUMNS = (*LANGUAGES, *BENCHMARKS, "tokens", "hours")
Records = list[dict[str, Any]]
Rows = dict[str, Records]  # of each name one record a seed


def write(experiment: ModuleType, records: Records, table: Path, picture: Path) -> str:
    """The text of the table."""
    from eval.figures import charts  # only here is matplotlib needed

    title, figures = experiment.__doc__, records[-1]["figures"]
    rows = {name: [record for record in records if record["row"] == name] for name in (r["row"] for r in records)}
    if "figure3" in figures:
        text = "\n".join([title, "", *(f"    {line}" for line in figure3_text(figures["figure3"]).splitlines()), ""])
        charts.draw({"kind": "speed", **plot.speed({picture: figures})}, picture, None)
    else:
        along = getattr(experiment, "ALONG", None)
        text = markdown(title, rows, getattr(experiment, "PAPER", {}))
        common = set.intersection(*({r["seed"] for r in of_row if "failed" not in r} for of_row in rows.values()))
        shared = {name: [record for record in of_row if record["seed"] in common] for name, of_row in rows.items()}
        if along and (compared := compare(points(shared, "target", along), points(shared, "hours", along))):
            text += f"\n{compared}"
        panels = {f"{name}, bits a byte": points(rows, name, along) for name in LANGUAGES}
        if any(panels.values()):
            charts.draw({"kind": "means", "panels": panels, "along": along}, picture, None)
    table.write_text(text)
    return text


def mean(records: Records, column: str) -> tuple[float, float] | None:
    """Of the seeds that have such a figure, and their standard deviation."""
    numbers = [record["figures"][column] for record in records if column in record["figures"]]
    return (fmean(numbers), stdev(numbers) if len(numbers) > 1 else 0.0) if numbers else None


def markdown(title: str, rows: Rows, paper: dict[str, Any]) -> str:
    last = [*rows.values()][-1][-1]
    columns = [name for name in COLUMNS if any(mean(records, name) for records in rows.values())]
    published = paper.get(last["model"], {})
    papers = [name for name in COLUMNS if any(name in row for row in published.values())]
    head = ["", *columns, *(f"{name}, paper" for name in papers), "rates", "seeds"]
    lines = [title, "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, records in rows.items():
        cells = [name, *(shown(mean(records, column), column) for column in columns)]
        cells += [f"{published.get(name, {}).get(column, '')}" for column in papers]
        failed = [f"failed: {record['failed']}" for record in records if "failed" in record]
        cells += [*(failed[:1] or [distinct(records, "rates")]), ",".join(str(record["seed"]) for record in records)]
        lines.append("| " + " | ".join(cells) + " |")
    every = [record for records in rows.values() for record in records]
    said = ", ".join(distinct(every, name) for name in ("device", "date"))
    said += "; target, source: bits a byte; ± is the standard deviation"
    if "*" in distinct(every, "rates"):
        said += "; * is at an end of --rates, beyond which there may be better ones"
    without = [f"--{name}" for name in ("instruct", "conversations", "source") if not any(last["settings"][name])]
    without += [name for name in BENCHMARKS if name not in columns]
    return "\n".join([*lines, "", f"{said}. Without {', '.join(without) or 'nothing'}.\n"])


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
        if (figure := mean(records, column)) and isfinite(figure[0]):
            series.setdefault(label.rstrip(" +,"), []).append((float(place) if along else place, *figure))
    return series
