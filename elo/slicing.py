"""Detach layers of a model with its embedding, norm and head: the ELO model (arXiv 2601.03648, section 3.1).

Layers are numbered from 1 here, as in the paper, and from 0 in a checkpoint's tensor names.
"""

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from torch import Tensor, nn

from elo.common.errors import UserError
from elo.common.fields import read_json_object
from elo.common.terminal import note
from elo.model.checkpoint import Checkpoint, are_equal
from elo.model.config import ModelConfig
from elo.runs.replacing import read_written

LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")


def parse_layers(text: str, num_hidden_layers: int) -> tuple[int, ...]:
    """`"1,-1"` to layer numbers from 1; -1 is the last. Raises UserError unless all exist, in ascending order."""
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
    return ModelConfig.from_json(config.architecture.renumbered(config.json, config.sliding_windows, layers))


def base_name(name: str, layers: tuple[int, ...]) -> str:
    """A tensor's name in the slice to that in the base: of layers (1, 32), model.layers.1.* is model.layers.31.*."""
    match = LAYER_NAME.fullmatch(name)
    return f"model.layers.{layers[int(match[1])] - 1}.{match[2]}" if match else name


def slice_name(name: str, layers: tuple[int, ...]) -> str | None:
    """The inverse of `base_name`; None for a tensor that is in none of these layers."""
    match = LAYER_NAME.fullmatch(name)
    if match is None or int(match[1]) + 1 not in layers:
        return None
    return f"model.layers.{layers.index(int(match[1]) + 1)}.{match[2]}"


def freeze_all_but_layers(model: nn.Module, layers: tuple[int, ...] | None = None) -> None:
    """Equation 2 of the paper: only decoder layers are trained, never embedding, norm and head.

    layers: those to train, numbered from 1 (default: all that the model has).
    """
    for name, parameter in model.named_parameters():
        match = LAYER_NAME.fullmatch(name)
        parameter.requires_grad_(match is not None and (layers is None or int(match[1]) + 1 in layers))


class Replaced(Checkpoint):
    """Layer replacement: a base model with the layers of a stage-1 result in their places. Tensors are read on demand.

    A layer with the scale a is theta_0 + a (theta_ELO - theta_0), computed in fp32 and rounded once. The paper's scale
    is 1, which gives the trained values to the bit, as 0 gives those of the base.
    """

    def __init__(self, base: Checkpoint, elo: Path, scales: Sequence[float] | str | None = None) -> None:
        """scales: one for all layers, or one for each; a name such as "auto" stands for 1 until they are chosen.

        Raises UserError if `elo` is not a slice of this base, and for another number of scales.
        """
        vars(self).update(vars(base))  # instead of reading the base's headers again
        self.trained, self.layers = open_slice(elo, base)
        count = len(self.layers)
        given = [1.0] if scales is None or isinstance(scales, str) else [*scales]
        if len(given) not in (1, count):
            raise UserError(f"--scale: {len(given)} values for the {count} layers of {elo}; give one, or one for each")
        self.scales = tuple(given * count)[:count]

    def trained_name(self, name: str) -> str | None:
        """For `load_into`, to load the trained layers only: the name of a tensor that is in one of them, else None."""
        return name if slice_name(name, self.layers) else None

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        in_slice = slice_name(name, self.layers)
        scale = 0.0 if in_slice is None else self.scales[int(LAYER_NAME.fullmatch(in_slice)[1])]
        if scale == 1:
            return self.trained.rows(in_slice, start, stop)
        before = super().rows(name, start, stop)
        if scale == 0:
            return before
        after = self.trained.rows(in_slice, start, stop)
        scaled = (before.float() + scale * (after.float() - before.float())).to(before.dtype)
        if not scaled.isfinite().all():
            raise UserError(f"--scale {scale:g}: {name} would have values that are not finite in {before.dtype}")
        return scaled


def open_slice(directory: Path, base: Checkpoint) -> tuple[Checkpoint, tuple[int, ...]]:
    """A stage-1 result and the numbers of its layers in `base`.

    Raises UserError if it was not detached from this base: its configuration, embedding, norm or head differs. If only
    other layers may differ, a line on stderr says so.
    """
    notes_path, number = directory / "elo.json", base.config.num_hidden_layers
    layers = read_json_object(notes_path).get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, int) for layer in layers):
        raise UserError(f"{notes_path}: no layers there; --elo takes a result of train.py --method elo")
    layers = parse_layers(",".join(map(str, layers)), number)
    trained, expected = Checkpoint(directory), detach(base.config, layers)
    for field in fields(ModelConfig):
        found, wanted = getattr(trained.config, field.name), getattr(expected, field.name)
        if field.compare and found != wanted:
            of = f"layers {','.join(map(str, layers))} of {base.directory}"
            raise UserError(f"{directory}: {field.name} is {found}, but of {of} alone it is {wanted}")
    for name in trained.names():
        if LAYER_NAME.fullmatch(name) is None and not are_equal(trained, name, base, name):
            raise UserError(f"{directory}: {name}, which stage 1 froze, differs from that of {base.directory}")
    run = read_written(directory)
    if run.is_run and run.run["data"].get("base model") not in (None, base.fingerprint()):
        note(
            f"{directory}: its run did not begin with the files of {base.directory}; if these are no copy, its layers "
            "were trained for another model, which has the same embedding, norm and head"
        )
    return trained, layers
