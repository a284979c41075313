"""The figures of log-likelihood benchmarks, as lm-eval 0.4.13 computes them (`process_results` in `api/task.py`).

acc: the likeliest choice is the right one. acc_norm: the likeliest per character of its text is. (Characters are
Unicode code points, without the delimiter in front of a choice; lm-eval calls the variant with bytes acc_bytes.)
f1: the unweighted mean of the classes' F1 scores (`macro_f1_score` in `tasks/kobest/utils.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

METRICS = ("acc", "acc_norm", "f1")


@dataclass(frozen=True)
class Sample:
    """One question's result."""

    gold: int
    loglikelihoods: list[float]  # in nats, of each choice
    lengths: list[int]  # characters of each choice

    @property
    def prediction(self) -> int:
        return best(self.loglikelihoods)

    @property
    def prediction_norm(self) -> int:
        return best([value / length for value, length in zip(self.loglikelihoods, self.lengths, strict=True)])


def best(values: Sequence[float]) -> int:
    """The index of the largest, the first of equals."""
    return max(range(len(values)), key=values.__getitem__)


def figures(samples: Sequence[Sample]) -> dict[str, float]:
    """A task's figures from its samples, and their number `n`."""
    n = len(samples)
    return {
        "acc": sum(sample.prediction == sample.gold for sample in samples) / n,
        "acc_norm": sum(sample.prediction_norm == sample.gold for sample in samples) / n,
        "f1": macro_f1([sample.gold for sample in samples], [sample.prediction for sample in samples]),
        "n": n,
    }


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
