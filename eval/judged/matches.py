"""What there is to judge: answers in FastChat's and LogicKor's formats, and what a judge is asked about each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from elo.common.errors import UserError
from elo.common.fields import is_texts
from elo.common.terminal import note
from eval.jsonl import Line, read_lines
from eval.judged.benchmarks import Benchmark, Question, model_of, question_id
from eval.judged.judge_prompts import JudgePrompt


class Match(NamedTuple):
    """One answer of one model, and what the judge is asked about it."""

    question: Question
    model: str
    turn: int
    prompt: JudgePrompt
    user_prompt: str

    def __str__(self) -> str:
        return f"{self.model}, question {self.question.id}, turn {self.turn}"


Answers = Mapping[int | str, Sequence[str]]  # by question, a text a turn


def read_answers(paths: Sequence[Path], questions: Sequence[Question]) -> dict[str, Answers]:
    """Answers by model; FastChat's model_answer files and LogicKor's generated ones are known."""
    answers: dict[str, Answers] = {}
    for path in paths:
        lines = read_lines(path, torn=True)
        if not lines:
            raise UserError(f"{path}: no answers")
        name = model_of(path, lines[0].record)
        if name in answers:
            raise UserError(f"{path}: answers of {name} are in another file too")
        # The last answer to a question counts, as it does in FastChat.
        answers[name] = dict(map(_answer, lines))
        missing = [str(question.id) for question in questions if question.id not in answers[name]]
        if missing:
            named = ", ".join(missing[:10]) + (" ..." if len(missing) > 10 else "")
            note(f"{path}: no answers to {len(missing)} of {len(questions)} questions: {named}")
    return answers


def _answer(line: Line) -> tuple[int | str, list[str]]:
    id = "question_id"
    match line.record:
        case {"outputs": turns}:
            id = "id"
        case {"choices": [{"turns": turns}, *_]}:
            pass
        case _:
            turns = None
    if not turns or not is_texts(turns):
        raise UserError(f"{line.where}: no answers here: neither choices[0].turns (FastChat) nor outputs (LogicKor)")
    return question_id(line.fields, id), turns


def read_references(
    benchmark: Benchmark, questions: Sequence[Question], given: Path | None, bench_dir: Path, judge: str
) -> Answers:
    """The reference answers of the questions that are judged against one.

    They are in the file `given`, or in the benchmark's reference_answer.jsonl, or in its reference_answer/: FastChat
    has a file there for each judge.
    """
    needed = [question.id for question in questions if question.category in benchmark.with_reference]
    if not needed:
        return {}
    path, directory = given, bench_dir / "reference_answer"
    if path is None:
        only = list(directory.glob("*.jsonl"))
        candidates = [directory.with_suffix(".jsonl"), directory / f"{judge}.jsonl"]
        candidates += only if len(only) == 1 else []
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is None:
            names = f"; {directory} has {', '.join(sorted(file.name for file in only))}" if only else ""
            raise UserError(f"{candidates[0]}: no such file, and no --references{names}")
    references = dict(map(_answer, read_lines(path)))
    missing = [id for id in needed if id not in references]
    if missing:
        raise UserError(f"{path}: no reference answer to question {missing[0]}")
    return references


def plan(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Mapping[str, Answers],
    prompts: Mapping[str, JudgePrompt],
    references: Answers,
) -> list[Match]:
    """What to judge: a match for each turn of each answer."""
    matches = []
    for model, given in answers.items():
        for question in questions:
            texts = given.get(question.id)
            if texts is None:
                continue
            if len(texts) < len(question.turns):
                raise UserError(
                    f"{model}: the answer to question {question.id} has {len(texts)} of {len(question.turns)} turns"
                )
            for turn in range(1, len(question.turns) + 1):
                name = benchmark.prompt_name(question.category, turn)
                if name not in prompts:
                    raise UserError(f"no judge prompt {name!r}; the prompts are {', '.join(prompts) or 'none'}")
                reference = references[question.id] if question.category in benchmark.with_reference else None
                user_prompt = prompts[name].fill(question, texts[:turn], reference)
                matches.append(Match(question, model, turn, prompts[name], user_prompt))
    return matches
