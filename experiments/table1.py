"""Table 1: base, instruct, full training and ELO + alignment, with the controls on the same documents."""

from benchmarks.planning_paper import TABLE_1
from experiments.chains import Row
from experiments.kit import Kit


def rows(kit: Kit) -> list[Row]:
    options = kit.options
    hours = [row[-1] for row in TABLE_1.get(kit.model_name, ())]  # of full training, ELO and its alignment
    full, both = ({"hours": hours[0]}, {"hours": hours[1] + hours[2]}) if hours else ({}, {})
    elo = kit.elo()
    aligned, control = kit.align(elo), kit.alignment_only(elo)
    return [
        Row("base", options.model),
        *([Row("instruct", options.instruct)] if options.instruct else []),
        Row("FFT", kit.baseline("full"), paper=full),
        Row("ELO + alignment", aligned, control, both),
        Row("alignment only", control),
        Row("ELO without alignment", kit.align(elo, 0)),
        Row("LoRA", kit.baseline("lora")),
        Row("selective layer tuning", kit.baseline("selective")),
        kit.in_time_of(Row("ELO + alignment", aligned, control)),
    ]
