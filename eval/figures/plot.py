"""Figures of results: a radar and bars of scores, curves of runs, bars and lines of speed.

What a PATH is shows in its content, and all of one call must be of one kind:
- JSON of `eval score`: for each benchmark a radar of the categories, a polygon a model, and bars of first turn, second
  turn and average;
- the directory of a run (OUT, with metrics.jsonl): loss, also on held-out text, tokens a second and memory over the
  tokens, a curve a run; with --watch drawn again whenever there is more, until Ctrl-C;
- JSON of `benchmarks.training_step`: tokens a second and memory of each implementation, and hours over
  gigabytes where it has them.

--json writes what was drawn.
"""

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import FIGURES, check_output, read_json_object, write_json
from elo.common.options import Parser
from elo.common.terminal import say
from eval.jsonl import read_lines
from eval.judged.benchmarks import short_category
from eval.judged.judge_prompts import SCALE

Data = dict[str, Any]
KINDS = (
    "JSON of eval score ('models'), JSON of benchmarks.training_step ('rows'), or the directory of a run "
    "(with metrics.jsonl) is what can be drawn"
)
TITLES = {"mt_bench": "MT-Bench", "japanese_mt_bench": "Japanese MT-Bench", "logickor": "LogicKor"}
SECONDS = 2.0  # between two looks at runs
TURNS = ("first", "second", "average")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="results, see above")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=f"the figure, {', '.join(FIGURES)}")
    parser.add_argument("--title", metavar="TEXT", help="of the figure")
    parser.add_argument("--watch", action="store_true", help="draw again while runs go on, until Ctrl-C")


def main(arguments: Namespace) -> None:
    check_figure("--out", arguments.out, [*arguments.paths, *([arguments.json] if arguments.json else [])])
    if arguments.watch:
        with suppress(KeyboardInterrupt):
            watch(arguments)
    else:
        draw(arguments)


def draw(arguments: Namespace) -> None:
    data = collect(arguments.paths)
    # Only here is matplotlib needed.
    from eval.figures import charts

    charts.draw(data, arguments.out, arguments.title)
    say(str(arguments.out))
    if arguments.json:
        write_json(Path(arguments.json), data)


def watch(arguments: Namespace) -> None:
    """Draw whenever a run has written something; runs that have not begun are waited for."""
    for path in arguments.paths:
        if path.is_file():
            raise UserError(f"--watch {path}: only runs go on; give their directories")
    seen: list[int] | None = None
    while True:
        files = [path / "metrics.jsonl" for path in arguments.paths]
        sizes = [file.stat().st_size if file.is_file() else 0 for file in files]
        if sizes != seen and all(sizes):
            draw(arguments)
            seen = sizes
        time.sleep(SECONDS)


def check_figure(option: str, path: Path, inputs: Sequence[str | Path]) -> None:
    """Before any work: whether a figure can be written there."""
    if path.suffix.lower() not in FIGURES:
        raise UserError(f"{option} {path}: a figure's name ends in {', '.join(FIGURES)}")
    check_output(option, path, inputs)


def collect(paths: Sequence[Path]) -> Data:
    """What is to be drawn: {"kind": "scores", "runs" or "speed", and the series}."""
    found = {path: _recognize(path) for path in paths}
    kinds = dict.fromkeys(kind for kind, _ in found.values())
    if len(kinds) > 1:
        raise UserError(f"{paths[0]}, ...: one figure shows one kind of results, not {' and '.join(kinds)}")
    (kind,) = kinds
    join = {"scores": scores, "runs": runs, "speed": speed}[kind]
    return {"kind": kind, **join({path: content for path, (_, content) in found.items()})}


def _recognize(path: Path) -> tuple[str, Data]:
    if path.is_dir():
        if not (path / "metrics.jsonl").is_file():
            raise UserError(f"{path}: no metrics.jsonl is here; {KINDS}")
        return "runs", {"lines": read_lines(path / "metrics.jsonl", torn=True)}
    content = read_json_object(path)
    if isinstance(content.get("models"), dict):
        return "scores", content
    if isinstance(content.get("rows"), list):
        return "speed", content
    raise UserError(f"{path}: {KINDS}")


def _number(value: object, where: str, most: float = 1e300) -> float | None:
    """None for null and for what is not finite. UserError for what the figure's axes would hide."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {value!r:.60} is not a number")
    if not -1e300 < value < 1e300:
        return None
    if not 0 <= value <= most:
        raise UserError(f"{where}: {value} is not from 0 to {most:g}")
    return float(value)


def scores(contents: Mapping[Path, Data]) -> Data:
    """{"benchmarks": {title: {"categories": [...], "models": {name: {"first", ..., "categories": [mean, ...]}}}}}.

    Files of one benchmark share a panel.
    """
    benchmarks: dict[str, Data] = {}
    file_of: dict[tuple[str, str], Path] = {}
    for path, content in contents.items():
        bench = content.get("bench")
        title = TITLES.get(bench, bench) if isinstance(bench, str) else path.stem
        models = benchmarks.setdefault(title, {})
        if not content["models"]:
            raise UserError(f"{path}: no models")
        for name, figures in content["models"].items():
            if file_of.setdefault((title, name), path) != path:
                raise UserError(f"{path}: {title} of {name} is in {file_of[title, name]} too")
            if not isinstance(figures, dict) or not isinstance(figures.get("categories", {}), dict):
                raise UserError(f"{path}: models.{name} must have figures, as eval score writes them")
            where = f"{path}: models.{name}"
            models[name] = {turn: _number(figures.get(turn), where, SCALE[1]) for turn in TURNS}
            means = {}
            for category, values in figures.get("categories", {}).items():
                mean = values.get("average") if isinstance(values, dict) else values
                if (short := short_category(category)) in means:
                    raise UserError(f"{where}: two categories are called {short!r:.60}")
                means[short] = _number(mean, f"{where}.{category}", SCALE[1])
            models[name]["categories"] = means
    for title, models in benchmarks.items():
        categories = list(dict.fromkeys(category for model in models.values() for category in model["categories"]))
        for model in models.values():
            model["categories"] = [model["categories"].get(category) for category in categories]
        benchmarks[title] = {"categories": categories, "models": models}
    return {"benchmarks": benchmarks}


def distinct(names: dict[Path, str]) -> dict[Path, str]:
    """The names, or the whole paths where several have one."""
    return {path: name if list(names.values()).count(name) == 1 else str(path) for path, name in names.items()}


def runs(contents: Mapping[Path, Data]) -> Data:
    """{"runs": {name: {"tokens", "loss", "validation_loss", ...: a list each}}}, null where a step has none."""
    series: dict[str, Data] = {}
    names = distinct({path: path.resolve().name for path in contents})
    for path, content in contents.items():
        lines, name = content["lines"], names[path]
        if not lines:
            raise UserError(f"{path / 'metrics.jsonl'}: no step was written yet")
        series[name] = {
            field: [_number(line.record.get(field), f"{line.where}: {field}") for line in lines]
            for field in ("tokens", "loss", "validation_loss", "tokens_per_second", "memory_bytes")
        }
        if any(tokens is None for tokens in series[name]["tokens"]):
            raise UserError(f"{path / 'metrics.jsonl'}: a step without its tokens")
    return {"runs": series}


def speed(contents: Mapping[Path, Data]) -> Data:
    """{"bars": {implementation: {dtype: {figure: value}}}, "figure3": hours over gigabytes, or null}."""
    bars: dict[str, dict[str, Data]] = {}
    figure3 = None
    names = distinct({path: path.stem for path in contents})
    for path, content in contents.items():
        for number, row in enumerate(content["rows"]):
            where = f"{path}: rows[{number}]"
            if not isinstance(row, dict):
                raise UserError(f"{where} must be an object")
            method, implementation = str(row.get("method", "")), str(row.get("implementation", ""))
            label = method if method == implementation else f"{method} ({implementation})"
            fields = ("tokens_per_second", "slowest", "fastest", "memory_bytes")
            figures = {field: _number(row.get(field), f"{where}.{field}") for field in fields}
            if figures["tokens_per_second"] is None:
                raise UserError(f"{where}: no tokens_per_second")
            label = f"{label}, {names[path]}" if len(contents) > 1 else label
            if bars.setdefault(label, {}).setdefault(str(row.get("dtype", "")), figures) is not figures:
                raise UserError(f"{where}: another row has the same method, implementation and dtype")
        if content.get("figure3") is not None:
            if figure3 is not None:
                raise UserError(f"{path}: another file has a figure3 too; draw one at a time")
            figure3 = hours(content["figure3"], f"{path}: figure3")
    if not bars and figure3 is None:
        raise UserError(f"{next(iter(contents))}: no rows")
    return {"bars": bars, "figure3": figure3}


def hours(content: object, where: str) -> Data:
    """{"gigabytes": [...], "hours": {method: [...]}, "paper": {method: [hours or null, ...]}}, checked."""
    if not isinstance(content, dict) or not isinstance(content.get("gigabytes"), list):
        raise UserError(f"{where}: gigabytes must be a list")
    gigabytes = [_number(value, f"{where}.gigabytes") for value in content["gigabytes"]]
    if None in gigabytes:
        raise UserError(f"{where}: gigabytes must be numbers")
    checked: Data = {"gigabytes": gigabytes}
    for name in ("hours", "paper"):
        lines = content.get(name) or {}
        if not isinstance(lines, dict) or not all(isinstance(values, list) for values in lines.values()):
            raise UserError(f"{where}.{name} must be an object of lists")
        checked[name] = {}
        for method, values in lines.items():
            if len(values) != len(gigabytes):
                raise UserError(f"{where}.{name}.{method}: {len(values)} hours for {len(gigabytes)} gigabytes")
            checked[name][method] = [_number(value, f"{where}.{name}.{method}") for value in values]
            if 0 in checked[name][method]:
                raise UserError(f"{where}.{name}.{method}: 0 hours have no place on a logarithmic axis")
    return checked
