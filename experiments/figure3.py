"""Figure 3: hours of ELO, LoRA and full training against the text, at measured speed, beside the paper's."""

from experiments.chains import Row, Run
from experiments.kit import JSON, Kit


def rows(kit: Kit) -> list[Row]:
    words = (
        "--model",
        kit.options.model,
        "--methods",
        "elo,full,lora",
        "--figure3",
        "--data",
        *kit.options.target,
        *JSON,
    )
    return [Row("hours", Run("benchmarks.training_step", words))]
