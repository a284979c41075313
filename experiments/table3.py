"""Table 3: which layers; and ELO without English."""

from pathlib import Path

from elo.model.config import ModelConfig
from experiments.chains import Row
from experiments.kit import Kit

PAPER = {"Llama-3.1-8B": {"1,32": 7.76, "8,24": 5.0}}  # LogicKor


def rows(kit: Kit) -> list[Row]:
    n = ModelConfig.load(Path(kit.options.model)).num_hidden_layers
    paper = PAPER.get(kit.model_name, {})
    places = [(1, n), (1, n // 2, n), (1, n // 2), (n // 4, 3 * n // 4), (1, 2), (n - 1, n)]
    choices = dict.fromkeys(",".join(map(str, sorted({max(1, place) for place in layers}))) for layers in places)
    first = kit.elo(layers=f"1,{n}")
    alone = ("--target-fraction", "1")
    found = [Row("base", kit.options.model), Row("alignment only", kit.alignment_only(first))]
    for layers in choices:
        logickor = {"logickor": paper[layers]} if layers in paper else {}
        found.append(Row(f"layers {layers}", kit.align(kit.elo(layers)), is_elo=True, paper=logickor))
    if kit.options.source:
        found.append(Row(f"layers 1,{n}, no English", kit.align(kit.elo(f"1,{n}", more=alone), more=alone)))
    return found
