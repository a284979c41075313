"""Figure 3: hours of ELO, LoRA and full training against the text, at measured speed, beside the paper's."""

from argparse import Namespace
from typing import Any

from experiments.rows import Kit, Row, base


def rows(options: Namespace) -> list[Row]:
    pairs = zip(options.training, options.training[1:], strict=False)
    same = [part for pair in pairs if pair[0] in ("--dtype", "--seq-len") for part in pair]
    given = ("--methods", "elo,full,lora", "--figure3", "--rounds", "1", "--dtype", "bf16", *same)

    def measure(kit: Kit, model: str) -> dict[str, Any]:
        return kit.result("benchmarks.training_step", "--model", model, *given, "--data", *options.target)

    return [Row("hours", base, measure=measure)]
