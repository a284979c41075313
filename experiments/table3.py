"""Table 3: which layers; and ELO without English."""

from argparse import Namespace
from pathlib import Path

from elo.methods import DEFAULT_LAYERS
from elo.model.config import ModelConfig
from experiments.rows import ALONE, Row, align, alignment_only, base, elo


def rows(options: Namespace) -> list[Row]:
    n = ModelConfig.load(Path(options.model)).num_hidden_layers
    places = [(1, n), (1, n // 2, n), (1, n // 2), (n // 4, 3 * n // 4), (1, 2), (n - 1, n)]
    control = alignment_only(elo())
    rows = [Row("base", base), Row("alignment only", control)]
    for layers in dict.fromkeys(",".join(map(str, sorted({max(1, place) for place in layers}))) for layers in places):
        chain = elo() if layers == f"1,{n}" else elo(layers)  # by the words that other experiments have
        rows.append(Row(f"layers {layers}", align(chain), control))
    if options.source:
        rows.append(Row(f"layers 1,{n}, no English", align(elo(DEFAULT_LAYERS, 9, *ALONE), 1, *ALONE)))
    return rows
