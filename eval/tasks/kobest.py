"""KoBEST (arXiv 2204.04541): five Korean benchmarks, from skt/kobest_v1 or the TSV files of SKT-LSL/KoBEST_datarepo.

The columns are those of skt/kobest_v1; behind them stand the names in the TSV files. Prompts, metrics and the split of
the examples are those of lm-eval 0.4.13, `tasks/kobest/*.yaml` and `utils.py`.
"""

from elo.common.errors import UserError
from eval.records import Record
from eval.tasks import Group, Question, Task

FALSE_TRUE = ("False", "True")


def boolq(record: Record) -> Question:
    context = f"{record.text('paragraph', 'Text')} 질문: {record.text('question', 'Question')} 답변: "
    return Question(context, ["아니오", "예"], record.label(FALSE_TRUE, "label", "Answer"))


def copa(record: Record) -> Question:
    kind = record.text("question").strip()
    if kind not in ("원인", "결과"):
        raise UserError(f"{record.where}: 'question' must be 원인 (cause) or 결과 (result), not {kind!r}")
    connector = " 왜냐하면" if kind == "원인" else " 그래서"
    choices = [record.text("alternative_1", "1"), record.text("alternative_2", "2")]
    # The TSV file counts from 1.
    label = record.label(("0", "1"), "label") if "label" in record else record.label(("1", "2"), "Answer")
    # lm-eval looks the right text up among the choices.
    return Question(f"{record.text('premise', 'sentence')} {connector}", choices, choices.index(choices[label]))


def wic(record: Record) -> Question:
    word = record.text("word", "Target")
    first, second = record.text("context_1", "SENTENCE1"), record.text("context_2", "SENTENCE2")
    context = f"문장1: {first} 문장2: {second} 두 문장에서 {word}가 같은 뜻으로 쓰였나?"
    return Question(context, ["아니오", "예"], record.label(FALSE_TRUE, "label", "ANSWER"))


def hellaswag(record: Record) -> Question:
    choices = [record.text(f"ending_{number}", f"choice{number}") for number in (1, 2, 3, 4)]
    return Question(f"문장: {record.text('context')}", choices, record.label(("0", "1", "2", "3"), "label"))


def sentineg(record: Record) -> Question:
    context = f"문장: {record.text('sentence', 'Text')} 긍부정:"
    return Question(context, ["부정", "긍정"], record.label(("negative", "positive"), "label", "Label"))


TASKS = [
    Task(
        name=f"kobest_{question.__name__}",
        question=question,
        test=(f"kobest/{question.__name__}/test", f"kobest/{upstream}/test"),
        examples=(f"kobest/{question.__name__}/train", f"kobest/{upstream}/train"),
        metrics=("acc", "acc_norm", "f1") if question is hellaswag else ("acc", "f1"),
    )
    for question, upstream in (
        (boolq, "BoolQ"),
        (copa, "COPA"),
        (hellaswag, "HellaSwag"),
        (sentineg, "SentiNeg"),
        (wic, "WiC"),
    )
]
GROUPS = [Group("kobest", tuple(task.name for task in TASKS), ("acc", "acc_norm", "f1"))]
