"""`align.py --scale`: how much of the update of stage 1 goes back into the model."""

import math
from pathlib import Path

from elo.common.errors import UserError
from elo.common.fields import is_number
from elo.common.options import not_negative
from elo.common.written import RUN, Written
from elo.model.decoder import CausalLM
from elo.runs.processes import World
from elo.slicing import Replaced
from elo.validation import HeldOut

AUTO, TRIED = "auto", (0.0, 0.1, 0.25, 0.5, 1.0)


def scales(text: str) -> str | list[float]:
    return AUTO if text == AUTO else [not_negative(part) for part in text.split(",")]


def load_best(replaced: Replaced, model: CausalLM, held_out: HeldOut, out: Path, world: World) -> None:
    """--scale auto: load the model, before alignment, with the scales that give the fewest bits per held-out byte.

    The search tries one scale for all layers, then varies each layer's in turn: all combinations would be too many. The
    result is kept in run.json, because a run that resumes has to start from the same model, even if its --validation
    has changed.
    """
    known = world.on_rank_0(lambda: Written(out).run.get("scale"))
    if known is not None:
        if not isinstance(known, list) or len(known) != len(replaced.layers) or not all(map(is_number, known)):
            raise UserError(f"{out / RUN}: scale must have a number for each of the layers {replaced.layers}; mend it")
        replaced.scales = tuple(known)
        replaced.load_into(model)
        return
    found: dict[tuple[float, ...], float] = {}

    def bits(scales: tuple[float, ...]) -> float:
        if scales not in found:
            replaced.scales = scales
            replaced.load_into(model, replaced.trained_name if found else lambda name: name)
            world.wait()  # for the slowest disk, outside of collectives that time out
            value = held_out.evaluate(model, world)["validation_bits_per_byte"]
            found[scales] = value if math.isfinite(value) else math.inf
        return found[scales]

    best = min(((scale,) * len(replaced.layers) for scale in TRIED), key=bits)
    for layer in range(len(best)):
        best = min(((*best[:layer], scale, *best[layer + 1 :]) for scale in TRIED), key=bits)
    replaced.scales = best
    replaced.load_into(model, replaced.trained_name)
    listed = "; ".join(f"{value:.4f} at {shown(scales)}" for scales, value in found.items())
    world.say(f"--scale auto: {shown(best)}, of held-out bits per byte {listed}")
    if world.rank == 0:
        written = Written(out)
        written.run["scale"] = best
        written.save()


def shown(scales: tuple[float, ...]) -> str:
    return ",".join(f"{scale:g}" for scale in scales)
