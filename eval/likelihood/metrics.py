"""The figures of log-likelihood benchmarks, as lm-eval 0.4.13 computes them (`process_results` in `api/task.py`).

acc: the likeliest choice is the right one. acc_norm: the likeliest per character of its text is. (Characters are
Unicode code points, without the delimiter in front of a choice; lm-eval calls the variant with bytes acc_bytes.)
f1: the unweighted mean of the classes' F1 scores (`macro_f1_score` in `tasks/kobest/utils.py`).
"""

from collections.abc import Iterable, Sequence

from eval.tasks import Question

METRICS = ("acc", "acc_norm", "f1")


def best(values: Iterable[float]) -> int:
    """The index of the largest, the first of equals."""
    values = list(values)
    return values.index(max(values))


def figures(questions: Sequence[Question], loglikelihoods: Sequence[Sequence[float]]) -> dict[str, float]:
    """A task's figures, and the number `n` of its questions. loglikelihoods: in nats, of each question's choices."""
    gold, n = [question.gold for question in questions], len(questions)
    predicted = list(map(best, loglikelihoods))
    normed = [
        best(value / len(choice) for value, choice in zip(values, question.choices, strict=True))
        for question, values in zip(questions, loglikelihoods, strict=True)
    ]
    acc, acc_norm = (sum(g == c for g, c in zip(gold, chosen, strict=True)) / n for chosen in (predicted, normed))
    return {"acc": acc, "acc_norm": acc_norm, "f1": macro_f1(gold, predicted), "n": n}


def macro_f1(gold: Sequence[int], predicted: Sequence[int]) -> float:
    """The mean over the classes that occur in either of 2 TP / (2 TP + FP + FN)."""
    scores = []
    for label in sorted({*gold, *predicted}):
        hits = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
        scores.append(2 * hits / (gold.count(label) + predicted.count(label)))
    return sum(scores) / len(scores)


def weighted(results: Sequence[dict[str, float]], metric: str) -> float:
    """A group's figure: the tasks' figures, each weighted by its size."""
    return sum(result[metric] * result["n"] for result in results) / sum(result["n"] for result in results)
