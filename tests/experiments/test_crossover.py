"""The crossover of losses that follow the fitted law, whose answer is known."""

import math
import re

from experiments.crossover import compare

UNITS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


def measured(gain: float, slope: float = 0.1) -> tuple[dict, dict]:
    """ELO's loss is lower by `gain` at one unit; its stage 1 takes 0.6 units, and the start of an alignment 0.4."""
    losses = {"ELO": (1.5 - gain, slope), "alignment only": (1.5, 0.1)}
    bits = {name: [(u, at_1 - fall * math.log(u), 0.0) for u in UNITS] for name, (at_1, fall) in losses.items()}
    hours = {name: [(u, 0.05 * (u + 0.4 + 0.6 * (name == "ELO")), 0.0) for u in UNITS] for name in losses}
    hours["ELO"].append((0.0, 0.05 * 0.6, 0.0))
    return bits, hours


def test_what_stage_1_is_worth():
    text = compare(*measured(0.03))
    for units in UNITS:
        same = math.exp(0.3) * units
        assert f"| {units:g} | -0.030 | {same - units:.2f} (" in text
        assert f"to {same - units:.2f}) | 0.60 |" in text
    # exp(0.3) u = u + 0.6
    start = float(re.search(r"100% of the draws ELO is ahead .* from ([\d.]+) \(", text)[1])
    assert abs(start / (0.6 / (math.exp(0.3) - 1)) - 1) < 0.02


def test_never():
    """A loss that is behind, and falls no faster."""
    text = compare(*measured(-0.05))
    assert "in 0% of the draws" in text and "units on" not in text
    assert "| -0." in text


def test_a_fall_that_is_steeper_crosses_beyond_what_was_measured():
    text = compare(*measured(-0.05, slope=0.13))
    start = float(re.search(r"from ([\d.]+) \(", text)[1])
    assert start > UNITS[-1]
    # where the fitted losses meet: 1.55 - 0.13 ln u = 1.5 - 0.1 ln(u + 0.6)
    assert abs(1.55 - 0.13 * math.log(start) - (1.5 - 0.1 * math.log(start + 0.6))) < 0.002


def test_what_both_have_in_common_changes_no_worth():
    """Losses that follow no line: the difference still does."""
    bits, hours = measured(0.03)
    bumps = dict(zip(UNITS, (0.02, -0.01, 0.0, 0.01, -0.03, 0.02), strict=True))
    bumpy = {name: [(u, loss + bumps[u], 0.0) for u, loss, _ in points] for name, points in bits.items()}
    assert "is -0.030 +0.000 ln(units)" in (text := compare(bumpy, hours)).replace("-0.000", "+0.000")
    worth = float(re.search(r"^\| 4 \| -0.030 \| ([\d.]+) ", text, re.MULTILINE)[1])
    assert abs(worth / (4 * math.expm1(0.3)) - 1) < 0.2  # by the line of the control alone it would be 0.4


def test_too_few_points_tell_nothing():
    bits, hours = measured(0.03)
    bits["ELO"] = bits["ELO"][:2]
    assert compare(bits, hours) == ""
    assert compare({}, {}) == ""
    bits, hours = measured(0.03)
    assert compare(bits, {**hours, "ELO": hours["ELO"][:-1]}) == ""  # what stage 1 alone took is not known
    slower = [(u, 1.0 - 0.01 * u, 0.0) for u in UNITS]  # more text in less time: no cost is to be had of that
    assert compare(bits, {**hours, "alignment only": slower}) == ""
