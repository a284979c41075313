"""The three generation benchmarks: their question files, and how each asks, answers and is judged.

MT-Bench and Japanese MT-Bench have FastChat's format, {"question_id", "category", "turns": [first, second]}; LogicKor
has its own, {"id", "category", "questions": [first, second], "references": [text or null, ...]}.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from elo.common.errors import UserError
from elo.common.fields import Fields, shown
from eval.jsonl import Line, read_lines

TURNS = 2


@dataclass(frozen=True)
class Question:
    """`references`: what the question file itself says a good answer is, None where it says nothing."""

    id: int | str
    category: str
    turns: tuple[str, ...]
    references: tuple[str | None, ...] = (None,) * TURNS


@dataclass(frozen=True)
class Benchmark:
    """What tells one benchmark from another, as its upstream has it.

    temperatures: of each category (a temperature below 1e-4 is greedy); categories that are not listed have
    `other_temperature`. with_reference: the categories that are judged against a reference answer.
    """

    name: str
    id_field: str
    turns_field: str
    question_files: tuple[str, ...]
    max_new_tokens: int
    other_temperature: float
    temperatures: dict[str, float] = field(default_factory=dict)
    with_reference: frozenset[str] = frozenset()
    settings: tuple[str, ...] = ("default",)
    by_generation_config: bool = False  # the other options of sampling, as transformers does it

    def temperature(self, category: str) -> float:
        temperature = self.temperatures.get(category, self.other_temperature)
        return 0.0 if temperature < 1e-4 else temperature

    def prompt_name(self, category: str, turn: int) -> str:
        """Which of the judge's prompts is for a turn (from 1)."""
        if self.name == "logickor":
            name = "logickor-v1"
        else:
            name = "single-math-v1" if category in self.with_reference else "single-v1"
        return name if turn == 1 else f"{name}-multi-turn"


# FastChat's llm_judge/common.py: temperature_config and NEED_REF_CATS.
FASTCHAT = {
    "id_field": "question_id",
    "turns_field": "turns",
    "question_files": ("question.jsonl",),
    "max_new_tokens": 1024,
    "other_temperature": 0.7,
    "temperatures": dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
    | dict.fromkeys(("stem", "humanities"), 0.1),
    "with_reference": frozenset({"math", "reasoning", "coding"}),
    "by_generation_config": True,
}
BENCHMARKS = {
    "mt_bench": Benchmark("mt_bench", **FASTCHAT),
    "japanese_mt_bench": Benchmark("japanese_mt_bench", **FASTCHAT),
    # LogicKor's generator.py is greedy and lets an answer be as long as the context that it gives to a model.
    "logickor": Benchmark(
        "logickor",
        id_field="id",
        turns_field="questions",
        question_files=("question.jsonl", "questions.jsonl"),
        max_new_tokens=4096,
        other_temperature=0.0,
        settings=("default", "1-shot", "cot-1-shot"),
    ),
}


def read_questions(benchmark: Benchmark, directory: Path, limit: int | None = None) -> list[Question]:
    """The questions in a benchmark's directory, or the first `limit` of each category."""
    paths = [directory / name for name in benchmark.question_files if (directory / name).is_file()]
    if not paths:
        raise UserError(f"{directory}: no {benchmark.question_files[0]} of {benchmark.name} is here (--bench-dir)")
    questions = [_question(benchmark, line) for line in read_lines(paths[0])]
    if not questions:
        raise UserError(f"{paths[0]}: no questions")
    twice = [id for id, count in Counter(question.id for question in questions).items() if count > 1]
    if twice:
        raise UserError(f"{paths[0]}: two questions have the {benchmark.id_field} {twice[0]!r}")
    if limit is None:
        return questions
    seen: Counter[str] = Counter()
    kept = []
    for question in questions:
        seen[question.category] += 1
        if seen[question.category] <= limit:
            kept.append(question)
    return kept


def _question(benchmark: Benchmark, line: Line) -> Question:
    fields, where = line.fields, line.where
    for name in (benchmark.id_field, "category", benchmark.turns_field):
        if name not in line.record:
            raise UserError(f"{where}: no {name!r}, which each question of {benchmark.name} has")
    turns = fields.strings(benchmark.turns_field)
    if not turns or not all(map(str.strip, turns)):
        raise UserError(f"{where}: {benchmark.turns_field} must be a list of texts, none of them empty")
    references: list[str | None] = [None] * TURNS
    if benchmark.name == "logickor":
        turns = turns[:TURNS]  # one of its questions has a third, which its own scripts pass over
        given = fields.array("references", [])
        if not all(isinstance(text, str | None) for text in given):
            raise UserError(f"{where}: references must be a list of texts and nulls")
        references = [*(text or None for text in given), *references][:TURNS]
    if len(turns) > TURNS:
        raise UserError(f"{where}: {len(turns)} turns; a question has one or two")
    category = fields.string("category", allow_empty=False)
    return Question(question_id(fields, benchmark.id_field), category, tuple(turns), tuple(references))


def question_id(fields: Fields, name: str = "question_id") -> int | str:
    """The id of a question: a whole number, also where a record has it as a text, or another text."""
    value = fields.fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(f"{fields.where}: the id of a question is a number or a text, not {shown(value)}")
    return int(value) if re.fullmatch("0|[1-9][0-9]{0,17}", str(value)) else value


def model_of(path: Path, record: dict[str, object]) -> str:
    """The model whose answers a file has: FastChat names the file after it.

    LogicKor names the file after the setting, in a directory named after the model.
    """
    return f"{path.absolute().parent.name}-{path.stem}" if "outputs" in record else path.stem


def short_category(category: str) -> str:
    """The English in the parentheses of LogicKor's names, "수학(Math)"; other names as they are."""
    found = re.fullmatch(r".*\(([ -~]+)\)", category)
    return found[1] if found else category
