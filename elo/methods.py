"""What `train.py` can train: ELO, the paper's baselines, and selective layer tuning, which the paper only names.

`train.py`, the planner and the benchmarks all build their models here.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from elo.model.config import ModelConfig
from elo.model.decoder import CausalLM, build
from elo.slicing import base_name, detach, freeze_all_but_layers, parse_layers
from elo.variants import bridge, lora
from elo.variants.lora import LoraOptions

METHODS = ("elo", "full", "lora", "selective")
OF_LAYERS = ("elo", "selective")  # train some of the layers
DEFAULT_LAYERS = "1,-1"  # what the paper found best: the first and the last


class Method(NamedTuple):
    model: CausalLM  # on the meta device; exactly the parameters that are trained require gradients
    base_name: Callable[[str], str | None]  # from a parameter's name to its name in the base; None if it is new
    layers: tuple[int, ...] | None = None  # those that were detached, numbered from 1


def make(
    config: ModelConfig,
    method: str,
    layers: tuple[int, ...] | None = None,
    options: LoraOptions | None = None,
    bridged: bool = False,
) -> Method:
    """One of METHODS.

    config: the base model's; layers: for OF_LAYERS (default: DEFAULT_LAYERS); options: for lora; bridged: for elo.
    """
    if method in OF_LAYERS and not layers:
        layers = parse_layers(DEFAULT_LAYERS, config.num_hidden_layers)
    if method == "elo":
        # Equations 1 and 2: these layers between the base's embedding, norm and head, which are frozen.
        model = build(detach(config, layers))
        freeze_all_but_layers(model)
        if bridged:
            bridge.attach(model, layers)
        return Method(model, partial(base_name, layers=layers), layers)
    model = build(config)
    if method == "selective":
        # The same layers inside the whole model, whose other parameters are frozen: their gradients are exact.
        freeze_all_but_layers(model, layers)
    elif method == "lora":
        # Adapters beside the frozen linear layers of the blocks.
        lora.attach(model, options or LoraOptions())
    return Method(model, lora.unadapted_name)  # the names of the base, where adapters have none
