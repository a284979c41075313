"""Detach layers of a model with its embedding, norm and head: the ELO model (arXiv 2601.03648, section 3.1).

Layers are numbered from 1 here, as in the paper, and from 0 in a checkpoint's tensor names.
"""

import re

from torch import nn

from elo.config import ModelConfig
from elo.errors import UserError

LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")


def parse_layers(text: str, num_hidden_layers: int) -> tuple[int, ...]:
    """`"1,-1"` to layer numbers from 1, in order; -1 is the last layer. Raises UserError stating the model's number."""
    has = f"the model has {num_hidden_layers} layers"
    numbers = []
    for part in text.split(","):
        try:
            number = int(part)
        except ValueError:
            raise UserError(f"--layers {text}: {part!r} is not a layer number; give some like 1,-1 ({has})") from None
        if number == 0 or abs(number) > num_hidden_layers:
            raise UserError(f"--layers {text}: there is no layer {number}; {has}, numbered from 1 (-1 is the last)")
        numbers.append(number if number > 0 else num_hidden_layers + 1 + number)
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--layers {text}: a layer is named twice; {has}")
    if numbers != sorted(numbers):
        raise UserError(f"--layers {text}: layers must be in ascending order; {has}")
    return tuple(numbers)


def detach(config: ModelConfig, layers: tuple[int, ...]) -> ModelConfig:
    """The configuration of the model that has only these layers: a valid checkpoint of the same architecture."""
    fields = {**config.json, "num_hidden_layers": len(layers)}
    windows = [config.sliding_windows[number - 1] for number in layers]
    # Qwen2 tells by a layer's index whether it has a sliding window, and a slice renumbers the layers.
    if any(windows) and config.architecture == "Qwen2ForCausalLM":
        fields["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
        fields["max_window_layers"] = windows.count(None)
    elif fields.get("layer_types") is not None:
        fields["layer_types"] = [fields["layer_types"][number - 1] for number in layers]
    return ModelConfig.from_json(fields)


def base_name(name: str, layers: tuple[int, ...]) -> str:
    """The name in the base model of a slice's tensor: model.layers.1.* of layers (1, 32) is model.layers.31.*."""
    match = LAYER_NAME.fullmatch(name)
    return f"model.layers.{layers[int(match[1])] - 1}.{match[2]}" if match else name


def freeze_all_but_layers(model: nn.Module) -> None:
    """Equation 2 of the paper: only the detached layers are trained; embedding, norm and head stay as they are."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(LAYER_NAME.fullmatch(name) is not None)
