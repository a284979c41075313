"""Spikes: marks a step whose loss or gradient norm is out of the range of the steps before it.

The rule is a robust z-score. Over the last `WINDOW` steps, m is the median and s = 1.4826 * the median distance from m.
For a normal distribution s is the standard deviation, but the outliers that it is meant to find do not move it.
- A loss is a spike above m + max(8 s, 0.1 m): 8 s, because the losses of small batches have long tails, and a tenth,
  because a smooth curve has nearly no s.
- A gradient norm is out of range above m + max(16 s, 2 m), or below m / 20. Norms vary more than losses.
Nothing is marked in the first `FEWEST` steps. Marked steps stay in the window, so that a loss that has jumped for good
is marked for half a window, not for ever.
"""

import statistics
from collections import deque
from collections.abc import Iterable

WINDOW = 100
FEWEST = 20


class Health:
    """The last steps, each as (loss, gradient norm)."""

    def __init__(self, before: Iterable[tuple[float, float]] = ()) -> None:
        self.steps = deque(before, maxlen=WINDOW)

    def judge(self, loss: float, norm: float) -> list[str]:
        """What is wrong with a step, of "loss" and "grad_norm"; then counts it to the steps before the next."""
        wrong = []
        if len(self.steps) >= FEWEST:
            losses, norms = (list(values) for values in zip(*self.steps, strict=True))
            middle, spread = middle_and_spread(losses)
            if loss > middle + max(8 * spread, 0.1 * middle):
                wrong.append("loss")
            middle, spread = middle_and_spread(norms)
            if norm > middle + max(16 * spread, 2 * middle) or norm < middle / 20:
                wrong.append("grad_norm")
        self.steps.append((loss, norm))
        return wrong


def middle_and_spread(values: list[float]) -> tuple[float, float]:
    """Median, and the standard deviation as the median absolute deviation estimates it."""
    middle = statistics.median(values)
    return middle, 1.4826 * statistics.median(abs(value - middle) for value in values)
