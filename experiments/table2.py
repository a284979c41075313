"""Table 2: how much text ELO needs: 1, 5 and 20 units of it, with the same alignment. Needs 21 units of text."""

from argparse import Namespace

from experiments.rows import Row, align, alignment_only, baseline, elo, instruct


def rows(options: Namespace) -> list[Row]:
    largest = elo(units=20)
    control = alignment_only(largest)
    amounts = {"1 unit": 1, "5 units": 5, "20 units": 20}
    rows = [Row(f"ELO, {name}", align(elo(units=n), 1, "--after", largest), control) for name, n in amounts.items()]
    return [Row("instruct", instruct), Row("FFT", baseline("full")), *rows, Row("alignment only", control)]
