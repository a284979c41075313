"""Records -> a Markdown table in the paper's layout, the paper's figures beside ours, and a picture."""

from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any

from benchmarks.training_step.report import figure3_text
from eval.figures import plot
from experiments.crossover import compare
from experiments.rows import JUDGED, LIKELIHOOD

BENCHMARKS = (*LIKELIHOOD, *JUDGED)
LANGUAGES = ("target", "source")
COLUMNS = (*LANGUAGES, *BENCHMARKS, "tokens", "hours")
Records = list[dict[str, Any]]


def write(experiment: ModuleType, records: Records, table: Path, picture: Path) -> str:
    """The text of the table."""
    from eval.figures import charts  # only here is matplotlib needed

    title, figures = experiment.__doc__, records[-1]["figures"]
    if "figure3" in figures:
        text = "\n".join([title, "", *(f"    {line}" for line in figure3_text(figures["figure3"]).splitlines()), ""])
        charts.draw({"kind": "speed", **plot.speed({picture: figures})}, picture, None)
    else:
        along = getattr(experiment, "ALONG", None)
        text = markdown(title, records, getattr(experiment, "PAPER", {}))
        compared = compare(points(records, "target", along), points(records, "hours", along)) if along else ""
        text += f"\n{compared}" if compared else ""
        panels = {f"{name}, bits a byte": points(records, name, along) for name in LANGUAGES}
        if any(panels.values()):
            charts.draw({"kind": "means", "panels": panels, "along": along}, picture, None)
    table.write_text(text)
    return text


def by_row(records: Records, column: str) -> dict[str, list[float]]:
    """The figures of each row's seeds."""
    rows = {name: [record for record in records if record["row"] == name] for name in (r["row"] for r in records)}
    return {name: [r["figures"][column] for r in those if column in r["figures"]] for name, those in rows.items()}


def spread(numbers: list[float]) -> float:
    """Of the seeds: their standard deviation."""
    return stdev(numbers) if len(numbers) > 1 else 0.0


def markdown(title: str, records: Records, paper: dict[str, Any]) -> str:
    columns = [name for name in COLUMNS if any(by_row(records, name).values())]
    published = paper.get(Path(records[-1]["settings"]["model"]).name, {})
    papers = [name for name in COLUMNS if any(name in row for row in published.values())]
    head = ["", *columns, *(f"{name}, paper" for name in papers), "rates", "seeds"]
    lines = [title, "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in by_row(records, "hours"):
        those, cells = [record for record in records if record["row"] == name], [name]
        for column in columns:
            numbers = by_row(those, column)[name]
            cells.append(f"{fmean(numbers):{',.0f' if column == 'tokens' else '.4g'}}" if numbers else "")
            cells[-1] += f" ± {spread(numbers):.2g}" if spread(numbers) else ""
        cells += [f"{published.get(name, {}).get(column, '')}" for column in papers]
        failed = [f"failed: {record['failed']}" for record in those if "failed" in record]
        cells += [*(failed[:1] or [those[0]["rates"]]), ",".join(str(record["seed"]) for record in those)]
        lines.append("| " + " | ".join(cells) + " |")
    said = f"{records[-1]['device']}, {records[-1]['date']}; target, source: bits a byte; ± is the standard deviation"
    without = [f"--{name}" for name in ("instruct", "conversations", "source") if not records[-1]["settings"][name]]
    without += [name for name in BENCHMARKS if name not in columns]
    return "\n".join([*lines, "", f"{said}. Without {', '.join(without) or 'nothing'}.\n"])


def points(records: Records, column: str, along: str | None) -> dict[str, list[tuple[str | float, float, float]]]:
    """Of each series (place, mean, spread): a row is a place, or with `along` its name's last word is one."""
    series: dict[str, list[tuple[str | float, float, float]]] = {}
    for name, numbers in by_row(records, column).items():
        label, _, place = name.rpartition(" ") if along else ("", "", name)
        if numbers:
            at = float(place) if along else place
            series.setdefault(label.rstrip(" +,"), []).append((at, fmean(numbers), spread(numbers)))
    return series
