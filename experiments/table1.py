"""Table 1: base, instruct, full training and ELO + alignment, with the controls on the same documents."""

from argparse import Namespace

from elo.methods import DEFAULT_LAYERS
from experiments.rows import Row, align, alignment_only, base, baseline, elo, found_scale, in_time_of, instruct


def rows(options: Namespace) -> list[Row]:
    control = alignment_only(elo())
    whole = Row("ELO + alignment", align(elo()), control)
    rows = [Row("base", base), Row("instruct", instruct), Row("FFT", baseline("full"))]
    rows += [whole, Row("ELO without alignment", align(elo(), 0))]
    for name, more, scales in (("ELO", (), ("0.25", "0.5", "auto")), ("ELO, bridge", ("--bridge",), ("0.5", "1"))):
        chain = elo(DEFAULT_LAYERS, 9, *more)
        for scale in scales:
            scaled = ("--scale", found_scale(chain) if scale == "auto" else scale) if scale != "1" else ()
            rows.append(Row(f"{name}, scale {scale} + alignment", align(chain, 1, *scaled), control))
            rows.append(Row(f"{name}, scale {scale}, without alignment", align(chain, 0, *scaled)))
    rows += [Row("alignment only", control), Row("LoRA", baseline("lora"))]
    rows += [Row("selective layer tuning", baseline("selective")), in_time_of(whole)]
    return [*rows, in_time_of(whole, "LoRA", "lora")]
