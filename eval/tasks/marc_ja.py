"""MARC-ja of JGLUE (github.com/yahoojapan/JGLUE): is a Japanese product review positive or negative?

The prompt is that of lm-eval 0.4.13, `tasks/japanese_leaderboard/ja_leaderboard_marc_ja.yaml`, which reports acc only;
acc_norm is computed as for every other task of lm-eval.
"""

from eval.records import Record
from eval.tasks import Question, Task


def marc_ja(record: Record) -> Question:
    context = (
        "### 指示：\n以下の製品レビューを、ポジティブまたはネガティブの感情クラスのいずれかに分類してください。\n\n"
        f"### 入力：\n{record.text('sentence')}\n\n### 応答："
    )
    return Question(context, ["ポジティブ", "ネガティブ"], record.label(("positive", "negative"), "label"))


TASKS = [
    Task(
        name="marc_ja",
        question=marc_ja,
        test=("marc_ja/valid-v1.0",),
        examples=("marc_ja/train-v1.0",),
        metrics=("acc", "acc_norm"),
        shots=3,
        description="以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。\n\n",
        delimiter="\n",
    )
]
