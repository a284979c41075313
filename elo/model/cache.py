"""The key-value cache that generation needs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from elo.model.config import ModelConfig

# Takes the keys and values of new tokens, each (batch, kv_heads, new, head_dim), and gives those of all so far.
Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class KVCache:
    """The keys and values of the tokens that each sequence of a batch has so far.

    The token at position p lies in slot p, so sequences of different lengths need no padding in front. What lies
    behind a sequence's length is never looked at and is overwritten by its next tokens.
    """

    def __init__(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        self.lengths = [0] * batch  # tokens held of each sequence
        empty = torch.zeros(batch, config.num_key_value_heads, 0, config.head_dim, device=device, dtype=dtype)
        self.layers = [(empty, empty)] * config.num_hidden_layers

    @property
    def capacity(self) -> int:
        """The slots of a sequence for which there is memory."""
        return self.layers[0][0].shape[2]

    def keep(self, rows: list[int]) -> None:
        """Drop the other sequences."""
        self.lengths = [self.lengths[row] for row in rows]
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]

    def truncate(self, length: int) -> None:
        """Forget the tokens from position `length` on."""
        self.lengths = [min(length, held) for held in self.lengths]

    def new_positions(self, new: int) -> Tensor:
        """(batch, new): where each sequence's next tokens go. Makes room for them."""
        needed = max(self.lengths) + new
        if needed > self.capacity:
            more = 2 ** max(8, (needed - 1).bit_length()) - self.capacity
            # Zeros: a slot that only a longer sequence has used yet is multiplied by an attention weight of 0.
            self.layers = [
                (F.pad(keys, (0, 0, 0, more)), F.pad(values, (0, 0, 0, more))) for keys, values in self.layers
            ]
        device = self.layers[0][0].device
        return torch.tensor(self.lengths, device=device)[:, None] + torch.arange(new, device=device)

    def mask(self, positions: Tensor, window: int | None) -> Tensor | None:
        """(batch, 1, new, slots), True where a new token may look; None if that is everywhere, or all of the past."""
        slots = max(self.lengths) + positions.shape[1]
        starts, cuts = set(self.lengths), window is not None and window < slots
        if not cuts and (starts == {0} or (positions.shape[1] == 1 and len(starts) == 1)):
            return None
        slot, position = torch.arange(slots, device=positions.device), positions[:, None, :, None]
        return (slot <= position) & (slot > position - window) if cuts else slot <= position

    def extend(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the new tokens' keys and values of a layer into their slots; gives all slots in use."""
        held_keys, held_values = self.layers[layer]
        slots = max(self.lengths) + positions.shape[1]
        if min(self.lengths) == max(self.lengths):  # the same slots of every row: a copy, much faster than an index
            held_keys[:, :, self.lengths[0] : slots], held_values[:, :, self.lengths[0] : slots] = keys, values
        else:
            rows = torch.arange(len(positions), device=positions.device)[:, None]
            held_keys[rows, :, positions] = keys.transpose(1, 2)
            held_values[rows, :, positions] = values.transpose(1, 2)
        return held_keys[:, :, :slots], held_values[:, :, :slots]
