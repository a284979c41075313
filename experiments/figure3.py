"""Figure 3: hours of ELO, LoRA and full training against the text, at measured speed, beside the paper's."""

from argparse import Namespace
from typing import Any

from experiments.rows import Kit, Row, base


def rows(options: Namespace) -> list[Row]:
    def measure(kit: Kit, model: str) -> dict[str, Any]:
        words = ("--model", model, "--methods", "elo,full,lora", "--figure3", "--data", *options.target)
        return kit.result("benchmarks.training_step", *words)

    return [Row("hours", base, measure=measure)]
