"""The file of --samples: a line of JSON for each question, written as results come, read when a run is continued."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from elo.common.errors import UserError
from elo.common.files import read_file_lines
from eval.jsonl import LARGEST, LONGEST_LINE, digest
from eval.likelihood.metrics import best
from eval.tasks import Question


class SamplesFile:
    """Results of one model, in any order; a last line that a kill cut short is taken away.

    Besides what the line says, `prompt` is a fingerprint of the question as the model saw it and `model` one of the
    model, the dtype and the size of a batch. A file with any other is refused: its results would be taken for this
    run's.
    """

    def __init__(self, path: Path, model: str, questions: dict[str, Sequence[Question]]) -> None:
        self.path, self.model, self.questions = path, model, questions

    def read(self) -> dict[tuple[str, int], list[float]]:
        """The log-likelihoods of the choices by task and index, of this run's tasks only."""
        try:
            done, complete = {}, 0
            lines = read_file_lines(self.path, LARGEST, LONGEST_LINE) if self.path.exists() else ()
            for number, line in enumerate(lines, start=1):
                if line.endswith(b"\n"):
                    complete += len(line)
                    done |= self._parse(line, f"{self.path}:{number}") if line.strip() else {}
                    continue
                start = b'{"task": '
                if not (line.startswith(start) or start.startswith(line)):
                    raise UserError(f"{self.path}:{number}: not a file of results; give --samples another name")
                with open(self.path, "r+b") as file:
                    file.truncate(complete)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab"):
                pass
        except OSError as error:
            raise UserError(f"--samples {self.path}: {error.strerror or error}") from None
        return done

    def _parse(self, line: bytes, where: str) -> dict[tuple[str, int], list[float]]:
        try:
            result = json.loads(line)
            task, index, values = result["task"], result["index"], result["loglikelihoods"]
            model, prompt = result["model"], result["prompt"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{where}: not a result of this command; give --samples another name") from None
        if model != self.model:
            raise UserError(
                f"{where}: a result of another model, --dtype or --batch-tokens; give --samples another name"
            )
        if not isinstance(task, str) or task not in self.questions:
            return {}
        questions = self.questions[task]
        if not isinstance(index, int) or index < 0:
            raise UserError(f"{where}: there is no question {index!r}")
        if index >= len(questions):
            return {}  # of a run with a higher --limit
        numbers = isinstance(values, list) and all(isinstance(v, float) and math.isfinite(v) for v in values)
        if prompt != fingerprint(questions[index]) or not numbers or len(values) != len(questions[index].choices):
            raise UserError(f"{where}: a result of other data or another --shots; give --samples another name")
        return {(task, index): values}

    def open(self) -> IO[str]:
        return open(self.path, "a", encoding="utf-8", newline="\n")

    def line(self, task: str, index: int, loglikelihoods: list[float]) -> str:
        question = self.questions[task][index]
        result: dict[str, Any] = {
            "task": task,
            "index": index,
            "gold": question.gold,
            "loglikelihoods": loglikelihoods,
            "prediction": best(loglikelihoods),
            "prompt": fingerprint(question),
            "model": self.model,
        }
        return json.dumps(result) + "\n"


def fingerprint(question: Question) -> str:
    return digest(question)
