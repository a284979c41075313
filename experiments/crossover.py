"""Where ELO would pay: its loss beside the control's on the same text, and both costs in units of alignment."""

from collections.abc import Mapping, Sequence

import numpy as np

from eval.tables import markdown

Series = Mapping[str, Sequence[tuple[float, float, float]]]  # (units of alignment, mean, spread)

SIDES = "ELO", "alignment only"
DRAWS = 2000  # of the fits' coefficients, by their covariances
BEYOND = 10.0  # times the most text that was measured; a crossing further away is none
HEAD = ["units", "ELO minus control, bits a byte", "stage 1 is worth, units", "stage 1 took, units"]


def compare(bits: Series, hours: Series) -> str:
    """What stage 1 is worth and what it took, both in units of alignment; nothing where too few points are measured.

    Two lines in ln(units) are fitted: the control's loss, for what more text would give it, and ELO's loss minus the
    control's, which saw the same documents, so that what both have in common cancels. Ranges hold 90% of the draws.
    """
    losses, taken = ([{u: mean for u, mean, _ in series.get(side, ())} for side in SIDES] for series in (bits, hours))
    shared = sorted(units for units in losses[0].keys() & losses[1].keys() if units)
    if len(shared) < 3 or 0 not in taken[0]:
        return ""
    differences = [losses[0][units] - losses[1][units] for units in shared]
    slope, at_1 = draw(shared, differences)
    fall, _ = draw(shared, [losses[1][units] for units in shared])
    unit = np.polyfit(shared, [taken[1][units] for units in shared], 1)[0]  # hours, without the start
    if unit <= 0:  # by the noise of clocks
        return ""
    cost = taken[0][0] / unit
    lines = [HEAD]
    for units, difference in zip(shared, differences, strict=True):
        # The control has ELO's loss at units + worth.
        worth = units * np.expm1(difference / fall)
        lines.append([f"{units:g}", f"{difference:+.3f}", within(worth), f"{cost:.2f}"])
    places = np.geomspace(shared[0], BEYOND * shared[-1], 500)
    ahead = slope * np.log(places) + at_1 < fall * np.log1p(cost / places)  # in the same time; (draws, places)
    some = ahead.any(axis=1)
    said = f"The control's loss changes by {np.median(fall):+.3f} ln(units), ELO's minus the control's is "
    said += f"{np.median(at_1):+.3f} {np.median(slope):+.3f} ln(units), fitted from {shared[0]:g} to {shared[-1]:g} "
    said += f"units. If this goes on, in {some.mean():.0%} of the draws ELO is ahead in the same time somewhere up to "
    said += f"{places[-1]:g} units"
    if some.any():
        said += f", from {within(places[ahead[some].argmax(axis=1)])} units on"
    return f"{markdown(lines)}\n\n{said}.\n"


def draw(units: Sequence[float], losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Slopes in ln(units), and values at one unit, each (draws, 1)."""
    line, covariance = np.polyfit(np.log(units), losses, 1, cov=True)
    slopes, at_1 = np.random.default_rng(0).multivariate_normal(line, covariance, DRAWS).T[:, :, None]
    return slopes, at_1


def within(numbers: np.ndarray) -> str:
    low, middle, high = np.quantile(numbers, (0.05, 0.5, 0.95))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
