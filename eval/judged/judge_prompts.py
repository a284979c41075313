"""What a judge is asked, and the rating in what it says.

A file of prompts has FastChat's format, a line a prompt: {"name", "type": "single", "system_prompt",
"prompt_template", "output_format"}. A template's slots are FastChat's, {question} and {answer} of the first turn,
{question_1}, {answer_1}, {ref_answer_1} and the same with 2; and, for references that only some questions have,
{reference_1} and {reference_2}: the prompt's own "reference_template" filled with {reference}, or nothing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from elo.common.errors import UserError
from eval.jsonl import Line, read_lines
from eval.judged.benchmarks import Benchmark, Question

OWN = Path(__file__).parent / "data"
SLOTS = (
    *("question", "answer", "question_1", "question_2", "answer_1", "answer_2"),
    *("ref_answer_1", "ref_answer_2", "reference_1", "reference_2"),
)
UNPARSED = -1  # FastChat's score for a judgment in which it finds no rating

# FastChat's llm_judge/common.py: one_score_pattern and its backup; and LogicKor's evaluator.py.
# At most nine digits here: a judge's text is no more to be trusted than any other.
RATING = (re.compile(r"\[\[(\d{1,9}\.?\d{0,9})\]\]"), re.compile(r"\[(\d{1,9}\.?\d{0,9})\]"))
KOREAN_RATING = (re.compile(r"점수:\s*(\d{1,9}(?:\.\d{1,9})?)(?!\d|[.,]\d)"),)  # 8,5 is not 8
SCALE = (0, 10)

# What a judge's thoughts stand between, as models and servers write them: <think>, [THINK] (Magistral), Kimi's,
# Cohere's, Granite's, and the channels of gpt-oss and Gemma, whole or with their special tokens left out. In quotes
# they are none.
_TAG = r"(?:\w+:)?(?:think(?:ing)?|thoughts?|reasoning|scratchpad)"
THOUGHT_BEGINS = re.compile(
    rf"(?<![`'\"“‘「『])(?:<{_TAG}(?:\s[^<>]*)?>|\[THINK\]|◁think▷|<\|(?:begin_of_thought|START_THINKING)\|>"
    r"|<\|channel\|?>\s*(?:analysis|commentary|thought)|\Aanalysis(?=[A-Z])|\AHere is my thought process:)",
    re.IGNORECASE,
)
THOUGHT_ENDS = re.compile(
    rf"(?<![`'\"“‘「『])(?:</{_TAG}\s*>|\[/THINK\]|◁/think▷|<\|(?:end_of_thought|END_THINKING)\|>"
    r"|<\|channel\|>\s*final[^\n|]*(?:<\|constrain\|>\w*)?<\|message\|>|<channel\|>|assistantfinal"
    r"|Here is my response:)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class JudgePrompt:
    name: str
    system: str
    template: str
    reference_template: str
    patterns: tuple[re.Pattern[str], ...]
    where: str

    def fill(self, question: Question, answers: Sequence[str], references: Sequence[str] | None) -> str:
        """The text for the judge, of as many turns as there are answers.

        references: of the answer file that goes with this kind of prompt, a turn each.
        """
        texts = {"question": question.turns[0], "answer": answers[0]}
        turns = zip(question.turns, answers, question.references, strict=False)
        for turn, (asked, given, own) in enumerate(turns, start=1):
            texts[f"question_{turn}"], texts[f"answer_{turn}"] = asked, given
            texts[f"reference_{turn}"] = self.reference_template.format(reference=own) if own else ""
        for turn, text in enumerate(references or [], start=1):
            texts[f"ref_answer_{turn}"] = text
        missing = [slot for slot in slots(self.template) if slot not in texts]
        if missing:
            raise UserError(f"{self.where}: question {question.id} has nothing for the slot {{{missing[0]}}}")
        return self.template.format(**texts)

    def rating(self, judgment: str) -> int | float:
        """The judge's rating, or `UNPARSED` where there is none on the scale."""
        text = after_thought(judgment).replace("*", "")  # Markdown
        for pattern in self.patterns:
            if found := pattern.search(text):
                rating = int(found[1]) if found[1].isdecimal() else float(found[1])
                return rating if SCALE[0] <= rating <= SCALE[1] else UNPARSED
        return UNPARSED


def after_thought(judgment: str) -> str:
    """What a judge says when it has thought; nothing of a thought that has no end."""
    ends = [end.end() for end in THOUGHT_ENDS.finditer(judgment)]
    said = judgment[ends[-1] :] if ends else judgment
    begins = THOUGHT_BEGINS.search(said)
    return said[: begins.start()] if begins else said


def slots(template: str) -> list[str]:
    """The names in braces. ValueError for a slot with a format, which could ask for gigabytes of spaces."""
    parsed = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template) if name is not None]
    for name, spec, conversion in parsed:
        if spec or conversion:
            raise ValueError(f"the slot {{{name}}} has a format")
    return [name for name, _, _ in parsed]


def read_prompts(benchmark: Benchmark, path: Path | None) -> Mapping[str, JudgePrompt]:
    """The prompts by name: those of a file, and this project's own for what it does not have.

    The project has its own for LogicKor, and for the second turn of Japanese MT-Bench, whose published file lacks it.
    """
    prompts: dict[str, JudgePrompt] = {}
    for file in (OWN / f"{benchmark.name}_judge_prompts.jsonl", path):
        if file is not None and (file == path or file.is_file()):
            lines = [line for line in read_lines(file) if line.record.get("type", "single") == "single"]
            prompts |= {prompt.name: prompt for prompt in map(_prompt, lines)}
    return prompts


def _prompt(line: Line) -> JudgePrompt:
    where, text = line.where, line.fields.string
    template = text("prompt_template")
    reference = text("reference_template") if line.fields.given("reference_template") else ""
    for slotted, known in ((template, SLOTS), (reference, ("reference",))):
        try:
            unknown = [slot for slot in slots(slotted) if slot not in known]
        except ValueError as error:
            raise UserError(f"{where}: not a template: {error}") from None
        if unknown:
            raise UserError(f"{where}: unknown slot {{{unknown[0]}}}; there are {', '.join(known)}")
    output = text("output_format")
    if re.fullmatch(r"\[\[\w+\]\]", output):
        patterns = RATING
    elif output.startswith("점수:"):
        patterns = KOREAN_RATING
    else:
        raise UserError(f'{where}: output_format {output!r:.60}; ratings are read as "[[rating]]" or "점수: 7.5"')
    return JudgePrompt(text("name"), text("system_prompt"), template, reference, patterns, where)
