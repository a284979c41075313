"""Table 3: which layers; and ELO without English."""

from pathlib import Path

from elo.model.config import ModelConfig
from experiments.chains import Row
from experiments.kit import Kit

PAPER = {"Llama-3.1-8B": {"1,32": 7.76, "8,24": 5.0}}  # LogicKor


def rows(kit: Kit) -> list[Row]:
    n = ModelConfig.load(Path(kit.options.model)).num_hidden_layers
    paper = PAPER.get(kit.model_name, {})
    control, alone = kit.alignment_only(kit.elo()), ("--target-fraction", "1")
    places = [(1, n), (1, n // 2, n), (1, n // 2), (n // 4, 3 * n // 4), (1, 2), (n - 1, n)]
    found = [Row("base", kit.options.model), Row("alignment only", control)]
    for layers in dict.fromkeys(",".join(map(str, sorted({max(1, place) for place in layers}))) for layers in places):
        logickor = {"logickor": paper[layers]} if layers in paper else {}
        elo = kit.elo() if layers == f"1,{n}" else kit.elo(layers)  # by the words that other experiments have
        found.append(Row(f"layers {layers}", kit.align(elo), control, logickor))
    if kit.options.source:
        found.append(Row(f"layers 1,{n}, no English", kit.align(kit.elo(more=alone), more=alone)))
    return found
