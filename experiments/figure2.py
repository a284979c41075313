"""Figure 2: how much alignment after one stage 1, with the control at every point. Needs 13 units of text."""

from experiments.chains import Row
from experiments.kit import Kit

PAPER = {"Llama-3.1-8B": {0: 4.5, 1: 7.76, 1.5: 7.78}}  # LogicKor


def rows(kit: Kit) -> list[Row]:
    paper = PAPER.get(kit.model_name, {})
    elo, found = kit.elo(), []
    for units in (0, 0.5, 1, 1.5, 2, 3, 4):
        logickor = {"logickor": paper[units]} if units in paper else {}
        aligned, control = kit.align(elo, units), kit.alignment_only(elo, units)
        found += [
            Row(f"ELO + {units:g}", aligned, control if units else None, logickor, series="ELO + alignment", at=units),
            Row(f"alignment only, {units:g}", control, series="alignment only", at=units),
        ]
    return found
