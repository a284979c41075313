"""Scores from judgments: first turn, second turn and average, of each category and all, for any number of models.

Reads FastChat's model_judgment files (those published for MT-Bench and Japanese MT-Bench, and what `eval judge`
writes) and LogicKor's evaluated ones, and gives what their own scripts give: FastChat's average is over all judgments
of both turns, LogicKor's is the mean of its two turns. A judgment without a rating has the score -1; it is left out,
and counted.
"""

import math
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from elo.common.errors import UserError
from elo.common.fields import Fields, is_number, shown, write_json
from elo.common.options import Parser
from elo.common.terminal import note, show
from eval.jsonl import Line, read_lines
from eval.judged.benchmarks import BENCHMARKS, model_of, question_id, read_questions, short_category
from eval.judged.judge_prompts import SCALE, UNPARSED
from eval.tables import table


def add_arguments(parser: Parser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="PATH", help="judgments, or directories of them")
    parser.add_argument("--bench-dir", type=Path, metavar="DIR", help="for categories, which FastChat's files lack")


def main(arguments: Namespace) -> None:
    judgments = read_judgments(arguments.files)
    bench = next((judgment.bench for judgment in judgments if judgment.bench), None)
    if arguments.bench_dir is not None:
        benchmark = BENCHMARKS.get(bench, BENCHMARKS["mt_bench"])
        categories = {question.id: question.category for question in read_questions(benchmark, arguments.bench_dir)}
        if absent := [judgment.question for judgment in judgments if judgment.question not in categories]:
            raise UserError(f"{arguments.bench_dir}: question {absent[0]}, which is judged, is not here")
        judgments = [judgment._replace(category=categories[judgment.question]) for judgment in judgments]
    models = score(judgments)
    show(score_table(models))
    for name, figures in models.items():
        if figures["unparsed"]:
            note(f"{name}: {figures['unparsed']} judgments have no rating and count for nothing")
    judged: dict[tuple[str, str], set[tuple[int | str, int]]] = defaultdict(set)
    for judgment in judgments:
        judged[judgment.model, judgment.judge].add((judgment.question, judgment.turn))
    if any(turns != judged[judgments[0].model, judgments[0].judge] for turns in judged.values()):
        note("the models are not judged on the same questions and turns: their scores do not compare")
    if not all(judgment.category for judgment in judgments):
        note("the files do not tell the categories: --bench-dir")
    if arguments.json:
        write_json(Path(arguments.json), {"bench": bench, "models": models})


class Judgment(NamedTuple):
    """One turn of one answer. bench, category: None where the file does not tell; score: None without a rating."""

    bench: str | None
    model: str
    judge: str
    question: int | str
    category: str | None
    turn: int
    score: float | None


# ---- reading


def read_judgments(paths: Sequence[Path]) -> list[Judgment]:
    """The judgments of files, of one benchmark. Of several in a file on the same turn the last counts."""
    judgments: dict[tuple[Any, ...], Judgment] = {}
    file_of: dict[tuple[Any, ...], Path] = {}
    for path in _files(paths):
        for line in read_lines(path, torn=True):
            for judgment in _judgments(path, line):
                key = (judgment.judge, judgment.model, judgment.question, judgment.turn)
                if file_of.setdefault(key, path) != path:
                    raise UserError(
                        f"{line.where}: question {judgment.question}, turn {judgment.turn} of {judgment.model} is "
                        f"judged in {file_of[key]} too; score one benchmark at a time, each file once"
                    )
                judgments[key] = judgment
    if not judgments:
        raise UserError(f"{paths[0]}: no judgments")
    benches = {judgment.bench for judgment in judgments.values()} - {None}
    if len(benches) > 1:
        raise UserError(f"{paths[0]}, ...: of {' and '.join(sorted(benches))}; score one benchmark at a time")
    return list(judgments.values())


def _files(paths: Sequence[Path]) -> list[Path]:
    """The files of a directory are those in its model_judgment, or else all below it."""
    files: dict[Path, Path] = {}
    for path in paths:
        found = [path]
        if path.is_dir():
            inner = path / "model_judgment"
            found = sorted((inner if inner.is_dir() else path).rglob("*.jsonl"))
            if not found:
                raise UserError(f"{path}: no .jsonl file is here")
        files.update((file.resolve(), file) for file in found)
    return list(files.values())


def _judgments(path: Path, line: Line) -> list[Judgment]:
    """What one line tells: a turn in FastChat's format, both turns in LogicKor's."""
    record, where, fields = line.record, line.where, line.fields
    category = fields.string("category") if fields.given("category") else None
    if "query_single" in record:
        name, question = model_of(path, record), question_id(fields, "id")
        scores = [_score(fields.object(turn), "judge_score") for turn in ("query_single", "query_multi")]
        return [
            Judgment("logickor", name, "", question, category, turn, score)
            for turn, score in enumerate(scores, start=1)
        ]
    if "choices" in record or "outputs" in record:
        raise UserError(f"{where}: an answer that nobody has judged; python -m eval judge does that")
    if "model_1" in record:
        raise UserError(f"{where}: a comparison of two models; only judgments of single answers have scores")
    for name in ("question_id", "model", "judge", "score", "turn"):
        if name not in record:
            raise UserError(f"{where}: no {name!r}: neither FastChat's model_judgment nor LogicKor's evaluated")
    judge, turn = record["judge"], record["turn"]
    if not isinstance(judge, list) or not judge or turn not in (1, 2):
        raise UserError(f"{where}: judge must be the judge and its prompt, and turn 1 or 2")
    bench = fields.string("bench") if fields.given("bench") else None
    score, question = _score(fields, "score"), question_id(fields)
    return [Judgment(bench, str(record["model"]), str(judge[0]), question, category, turn, score)]


def _score(fields: Fields, name: str) -> float | None:
    value = fields.fields.get(name)
    if value is None or value == UNPARSED:
        return None
    if not is_number(value) or not SCALE[0] <= value <= SCALE[1]:
        raise UserError(f"{fields.where}: {name} must be a number from {SCALE[0]} to {SCALE[1]}, not {shown(value)}")
    return value


# ---- counting


def score(judgments: Sequence[Judgment]) -> dict[str, dict[str, Any]]:
    """Figures by model, the best first; the judge is part of the name where there are several."""
    several = len({judgment.judge for judgment in judgments}) > 1
    groups: dict[str, list[Judgment]] = defaultdict(list)
    # In the order of the questions; that of the judgments is by chance.
    for judgment in sorted(judgments, key=lambda j: (isinstance(j.question, str), j.question)):
        groups[f"{judgment.model} ({judgment.judge})" if several else judgment.model].append(judgment)
    models = {}
    for name, group in groups.items():
        named = dict.fromkeys(judgment.category for judgment in group if judgment.category is not None)
        categories = {category: figures([j for j in group if j.category == category]) for category in named}
        models[name] = {**figures(group), "categories": categories}
    return dict(sorted(models.items(), key=lambda item: -(item[1]["average"] or 0)))


def figures(judgments: Sequence[Judgment]) -> dict[str, Any]:
    """Means of the first turn, of the second and of both, None where there is nothing, and how many there are."""
    turns = [[j.score for j in judgments if j.turn == turn and j.score is not None] for turn in (1, 2)]
    first, second = map(mean, turns)
    average = mean(turns[0] + turns[1])
    if judgments[0].bench == "logickor" and first is not None and second is not None:
        average = (first + second) / 2
    return {
        "first": first,
        "second": second,
        "average": average,
        "judgments": len(judgments),
        "unparsed": len(judgments) - len(turns[0]) - len(turns[1]),
    }


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def score_table(models: Mapping[str, dict[str, Any]]) -> str:
    """Three rows a model, a column a category."""
    named = list(dict.fromkeys(category for figures in models.values() for category in figures["categories"]))
    rows = [["model", "turn", "all", *map(short_category, named), "judgments", "unparsed"]]
    for name, model in models.items():
        of_categories = [model["categories"].get(category, {}) for category in named]
        for turn in ("first", "second", "average"):
            values = [figures.get(turn) for figures in (model, *of_categories)]
            cells = ["-" if value is None else f"{value:.2f}" for value in values]
            counts = [str(model["judgments"]), str(model["unparsed"])] if turn == "average" else ["", ""]
            rows.append([name if turn == "first" else "", turn, *cells, *counts])
    return table(rows, names=2)
