"""The lines of --samples: one for each question, written as results come, read when a run is continued.

Besides what a line says, `prompt` is a fingerprint of the question as the model saw it and `model` one of the model,
the dtype and the size of a batch. A file with any other is refused: its results would be taken for this run's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from elo.common.errors import UserError
from eval.jsonl import JsonLines, Line, digest
from eval.likelihood.metrics import best
from eval.tasks import Question

FIRST = "task"
Scores = dict[tuple[str, int], list[float]]  # task and index of a question to the log-likelihoods of its choices


def to_record(model: str, task: str, index: int, question: Question, loglikelihoods: list[float]) -> dict[str, Any]:
    return {
        FIRST: task,
        "index": index,
        "gold": question.gold,
        "loglikelihoods": loglikelihoods,
        "prediction": best(loglikelihoods),
        "prompt": digest(question),
        "model": model,
    }


def scores_so_far(results: JsonLines, model: str, questions: Mapping[str, Sequence[Question]]) -> Scores:
    """Of this run's tasks only; UserError for a line that is no result, or one of something else."""
    done = {}
    for line in results.lines:
        done |= _score(line, model, questions)
    return done


def _score(line: Line, model: str, questions: Mapping[str, Sequence[Question]]) -> Scores:
    try:
        task, index, values, made_with, prompt = (
            line.record[name] for name in (FIRST, "index", "loglikelihoods", "model", "prompt")
        )
    except KeyError:
        raise UserError(f"{line.where}: not a result of this command; give --samples another name") from None
    if made_with != model:
        what = "a result of another model, --dtype or --batch-tokens; give --samples another name"
        raise UserError(f"{line.where}: {what}")
    if not isinstance(task, str) or task not in questions:
        return {}
    if not isinstance(index, int) or index < 0:
        raise UserError(f"{line.where}: there is no question {index!r}")
    if index >= len(questions[task]):
        return {}  # of a run with a higher --limit
    question = questions[task][index]
    numbers = isinstance(values, list) and all(isinstance(v, float) and math.isfinite(v) for v in values)
    if prompt != digest(question) or not numbers or len(values) != len(question.choices):
        raise UserError(f"{line.where}: a result of other data or another --shots; give --samples another name")
    return {(task, index): values}
