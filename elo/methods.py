"""What `train.py` can train: ELO, the two ways that the paper compares it with, and one that it names.

Said once, for the script, the planner and the benchmarks.
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
    model: CausalLM  # what is computed, on the meta device; its parameters require gradients where they are trained
    base_name: Callable[[str], str | None]  # the base's name of a parameter, None of one that is new
    layers: tuple[int, ...] | None = None  # those that were detached, from 1


def elo(config: ModelConfig, layers: tuple[int, ...], bridged: bool = False) -> Method:
    """Layers between the base's own embedding, norm and head, which are frozen (equations 1 and 2)."""
    model = build(detach(config, layers))
    freeze_all_but_layers(model)
    if bridged:
        bridge.attach(model, layers)
    return Method(model, partial(base_name, layers=layers), layers)


def selective(config: ModelConfig, layers: tuple[int, ...]) -> Method:
    """The same layers inside the whole model, all else frozen: every gradient is exact, and nothing is detached."""
    model = build(config)
    freeze_all_but_layers(model, layers)
    return Method(model, lambda name: name)


def full(config: ModelConfig) -> Method:
    """Every parameter."""
    return Method(build(config), lambda name: name)


def low_rank(config: ModelConfig, options: LoraOptions) -> Method:
    """Adapters beside the frozen linear layers of the blocks (LoRA)."""
    model = build(config)
    lora.attach(model, options)
    return Method(model, lora.unadapted_name)


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
    if method in OF_LAYERS:
        layers = layers or parse_layers(DEFAULT_LAYERS, config.num_hidden_layers)
        return elo(config, layers, bridged) if method == "elo" else selective(config, layers)
    return low_rank(config, options or LoraOptions()) if method == "lora" else full(config)
