"""Figure 3: hours of ELO, LoRA and full training against the text, at measured speed, beside the paper's."""

from argparse import Namespace
from typing import Any

from experiments.inputs import field
from experiments.rows import Kit, Row, base, shared


def rows(options: Namespace) -> list[Row]:
    given = ["--methods", "elo,full,lora", "--figure3", "--rounds", "1", "--dtype", "bf16", *shared(options.training)]
    given += ["--text-field", field(options, "target")]

    def measure(kit: Kit, model: str, figures: dict[str, Any]) -> None:
        figures |= kit.result("benchmarks.training_step", "--model", model, *given, "--data", *options.target)

    return [Row("hours", base, measure=measure)]
