"""Table 2: how much text ELO needs: 1, 5 and 20 units of it, with the same alignment. Needs 21 units of text."""

from experiments.chains import Row
from experiments.kit import Kit


def rows(kit: Kit) -> list[Row]:
    options = kit.options
    largest = kit.elo(units=20)
    control = kit.alignment_only(largest)
    aligned = {units: kit.align(kit.elo(units=units), after=largest) for units in (1, 5, 20)}
    return [
        *([Row("instruct", options.instruct)] if options.instruct else []),
        Row("FFT", kit.baseline("full")),
        *(Row(f"ELO, {units} units", model, control) for units, model in aligned.items()),
        Row("alignment only", control),
    ]
