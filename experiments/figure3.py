"""Figure 3: hours of ELO, LoRA and full training against the text, at measured speed, beside the paper's."""

from argparse import Namespace

from experiments.rows import JSON, Kit, Row


def rows(options: Namespace) -> list[Row]:
    def measured(kit: Kit) -> str:
        words = ("--model", options.model, "--methods", "elo,full,lora", "--figure3", "--data", *options.target)
        return kit.runs.do("benchmarks.training_step", *words, *JSON)

    return [Row("hours", measured, is_model=False)]
