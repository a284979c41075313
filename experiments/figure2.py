"""Figure 2: how much alignment after one stage 1, with the control at every point. Needs 13 units of text."""

from argparse import Namespace

from experiments.rows import Row, align, alignment_only, elo

ALONG = "units of alignment"  # which is the last word of a row's name


def rows(options: Namespace) -> list[Row]:
    controls = {units: alignment_only(elo(), units) for units in (0, 0.5, 1, 1.5, 2, 3, 4)}
    rows = [Row(f"ELO + {n:g}", align(elo(), n), control if n else None) for n, control in controls.items()]
    return rows + [Row(f"alignment only, {units:g}", control) for units, control in controls.items()]
