"""Where ELO would pay: its loss and the control's, each fitted against the text that all parameters are trained on."""

from collections.abc import Mapping, Sequence

import numpy as np

Series = Mapping[str, Sequence[tuple[float, float, float]]]  # (units of alignment, mean, spread)

DRAWS = 2000  # of the fits' coefficients, by their covariances
BEYOND = 100.0  # times the most text that was measured; a crossing further away is none
HEAD = ["units", "control with that loss, units", "stage 1 is worth, units", "stage 1 took, units"]


def compare(bits: Series, hours: Series) -> str:
    """What stage 1 is worth and what it took, both in units of alignment; nothing where too few points are measured.

    A loss is fitted as a + b * ln(units). The ranges hold 90% of the draws.
    """
    measured = [[point for point in bits.get(name, ()) if point[0]] for name in ("ELO", "alignment only")]
    shared = sorted({point[0] for point in measured[0]} & {point[0] for point in measured[1]})
    if len(shared) < 3:
        return ""
    elo, control = (draw(points) for points in measured)
    taken = {name: {units: mean for units, mean, _ in hours[name]} for name in ("ELO", "alignment only")}
    unit = np.polyfit(shared, [taken["alignment only"][units] for units in shared], 1)[0]  # hours, without the start
    cost = float(np.mean([taken["ELO"][units] - taken["alignment only"][units] for units in shared])) / unit
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for units, loss, _ in measured[0]:
        same = np.exp((loss - control[:, 1]) / control[:, 0])
        lines.append(f"| {units:g} | {within(same)} | {within(same - units)} | {cost:.2f} |")
    places = np.geomspace(shared[0], BEYOND * shared[-1], 500)
    ahead = value(elo, places) < value(control, places + cost)  # in the same time; (draws, places)
    some = ahead.any(axis=1)
    said = f"The control's loss is {np.median(control[:, 1]):.3f} {np.median(control[:, 0]):+.3f} ln(units), "
    said += f"ELO's {np.median(elo[:, 1]):.3f} {np.median(elo[:, 0]):+.3f} ln(units), fitted from {shared[0]:g} to "
    said += f"{shared[-1]:g} units. In {some.mean():.0%} of the draws ELO is ahead in the same time somewhere up to "
    said += f"{places[-1]:g} units"
    if some.any():
        said += f", from {within(places[ahead[some].argmax(axis=1)])} units on"
    return "\n".join([*lines, "", said + ".\n"])


def draw(points: Sequence[tuple[float, float, float]]) -> np.ndarray:
    """Slopes and losses at one unit, (draws, 2)."""
    units, losses, _ = zip(*points, strict=True)
    line, covariance = np.polyfit(np.log(units), losses, 1, cov=True)
    return np.random.default_rng(0).multivariate_normal(line, covariance, DRAWS)


def value(lines: np.ndarray, units: np.ndarray) -> np.ndarray:
    return lines[:, :1] * np.log(units) + lines[:, 1:]


def within(numbers: np.ndarray) -> str:
    low, middle, high = np.quantile(numbers, (0.05, 0.5, 0.95))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
