"""The benchmarks that are scored by log-likelihood: each module here gives TASKS, and GROUPS for averages of them.

A task is one small function from a record of its file to a question: (context, choices, gold). What stands here beside
it are the conventions of lm-eval (`lm_eval/api/task.py` and `api/samplers.py`, version 0.4.13): few-shot examples are
question, delimiter, right choice and an empty line; the choices that are scored are delimiter and choice.
"""

import importlib
import pkgutil
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from elo.common.errors import UserError
from eval.records import Record, find, read

SEED = 1234  # lm-eval's, of the choice of examples


class Question(NamedTuple):
    context: str
    choices: list[str]
    gold: int  # the index of the right one


@dataclass(frozen=True)
class Task:
    """A benchmark. test, examples: where its files may be below --data, without their endings (`eval.records.find`)."""

    name: str
    question: Callable[[Record], Question]
    test: tuple[str, ...]
    examples: tuple[str, ...]
    metrics: tuple[str, ...] = ("acc",)  # those that count for it; see eval.likelihood.metrics
    shots: int = 0
    random_examples: bool = True  # others for each question; or the first ones for all
    description: str = ""  # in front of everything
    delimiter: str = " "  # between a question and its answer
    columns: tuple[str, ...] = ()  # of a CSV file without a header

    def found(self, data: Path) -> bool:
        return bool(find(data, self.test))

    def questions(self, data: Path, shots: int | None = None, limit: int | None = None) -> list[Question]:
        """The test's questions with their examples in front. UserError naming the file and line of a bad record."""
        shots = self.shots if shots is None else shots
        questions = self._read(data, self.test)[:limit]
        if not shots:
            return [question._replace(context=self.description + question.context) for question in questions]
        pool = [
            f"{example.context}{self.delimiter}{example.choices[example.gold]}\n\n"
            for example in self._read(data, self.examples)
        ]
        if shots > len(pool):
            raise UserError(f"{find(data, self.examples)[0]}: {len(pool)} records are too few for {shots} examples")
        draw = random.Random(SEED)
        with_examples = []
        for question in questions:  # in their order: each takes the generator's next numbers
            examples = draw.sample(pool, shots) if self.random_examples else pool[:shots]
            with_examples.append(question._replace(context="".join([self.description, *examples, question.context])))
        return with_examples

    def _read(self, data: Path, stems: tuple[str, ...]) -> list[Question]:
        paths = find(data, stems)
        if not paths:
            raise UserError(f"{data / stems[0]}.*: not found; {self.name} needs it")
        questions = []
        for record in read(paths, self.columns):
            question = self.question(record)
            if not all(question.choices):
                raise UserError(f"{record.where}: a choice is empty")
            questions.append(question)
        return questions


@dataclass(frozen=True)
class Group:
    """Tasks that are averaged, each by its size as in lm-eval's groups."""

    name: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...] = ("acc",)


def load() -> tuple[dict[str, Task], dict[str, Group]]:
    """All tasks and groups of the modules in this package, by name."""
    tasks: dict[str, Task] = {}
    groups: dict[str, Group] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        content = importlib.import_module(module.name)
        tasks |= {task.name: task for task in content.TASKS}
        groups |= {group.name: group for group in getattr(content, "GROUPS", [])}
    return tasks, groups
