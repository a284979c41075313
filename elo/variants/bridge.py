"""A frozen affine map in the place of the layers that a slice leaves out (`train.py --bridge`).

In the base, a detached layer gets the output of its neighbour, not that of the detached layer below. The map estimates
the former from the latter: fitted on the base by least squares, never trained, and used in stage 1 only. It is not part
of the slice that is written.
"""

import torch
from torch import Tensor, nn

from elo.common.errors import UserError
from elo.cpu.linear import Linear, product_dtype
from elo.data.corpus import Windows
from elo.model.checkpoint import EMBEDDING, Checkpoint
from elo.model.decoder import CausalLM, build
from elo.runs.devices import DTYPES
from elo.runs.processes import World


class Bridge(Linear):
    """Its weights are buffers: saved in a run's states, but not in checkpoints, and neither trained nor sharded."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, device="meta")
        for name in ("weight", "bias"):
            self.register_buffer(name, self._parameters.pop(name).detach())


def attach(model: CausalLM, layers: tuple[int, ...]) -> None:
    """Put bridges, still empty, into a slice. Raises UserError if all its layers are neighbours in the base."""
    uppers = [block for at, block in enumerate(model.model.layers) if at and layers[at] > layers[at - 1] + 1]
    if not uppers:
        raise UserError(f"--bridge: no layers are left out between those of --layers {','.join(map(str, layers))}")
    for upper in uppers:
        upper.bridge = Bridge(model.config.hidden_size)
        upper.register_forward_pre_hook(lambda block, inputs: (block.bridge(inputs[0]), *inputs[1:]))


def fit(
    model: CausalLM,
    layers: tuple[int, ...],
    base: Checkpoint,
    windows: Windows,
    dtype: str,
    world: World,
    has_state: bool = False,
) -> None:
    """Fit the bridges of a slice, equally on every process, and say how well. Raises UserError for too little text.

    has_state: a state of the run will fill them.
    """
    bridges = [module.to(world.device, DTYPES[dtype]) for module in model.modules() if isinstance(module, Bridge)]
    if has_state:
        return
    maps = world.on_rank_0(lambda: fit_all(layers, base, windows, DTYPES[dtype], world))
    for bridge, (weight, bias, _) in zip(bridges, maps, strict=True):
        bridge.weight.copy_(weight)
        bridge.bias.copy_(bias)
    missed = ", ".join(f"{missed:.1%}" for *_, missed in maps)
    world.say(f"bridge: {missed} of the upper layer's input is missed")


@torch.no_grad()
def fit_all(layers: tuple[int, ...], base: Checkpoint, windows: Windows, dtype: torch.dtype, world: World) -> list:
    """`least_squares` for each gap, on the run's first windows, with one layer of the base in memory at a time."""
    length = windows.seq_len
    count = -(-16 * base.config.hidden_size // max(1, length - 1))  # with half as many the fit is worse
    if (windows.tokens - 1) // length < count or length == 1:
        raise UserError(f"--bridge: its fit takes {count * length:,} tokens, and the text has {windows.tokens:,}")
    x = base.tensor(EMBEDDING)[torch.stack([windows[at][0] for at in range(count)])].to(world.device, dtype)
    x, maps = x.to(product_dtype(x)), []
    decoder = build(base.config).model.to(x.dtype)
    decoder.embed_tokens = decoder.norm = nn.Identity()
    for index, block in enumerate(list(decoder.layers)[: layers[-1] - 1]):
        base.load_into(block.to_empty(device=world.device), lambda name, index=index: f"model.layers.{index}.{name}")
        decoder.layers = nn.ModuleList([block])
        x = torch.cat([decoder(window) for window in x.split(1)])  # (windows, sequence, hidden)
        block.to("meta")
        if index + 1 in layers:
            lower = x
        elif index + 2 in layers[1:]:
            maps.append(least_squares(lower[:, 1:], x[:, 1:]))  # a first token's are far larger than all others
    return maps


def least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """The W and b that minimize |W x + b - y|^2 / |y|^2, and the mean of that; x, y: (windows, tokens, hidden)."""
    gram = cross = torch.zeros((), dtype=torch.float64, device=x.device)
    for lower, upper in zip(x, y, strict=True):
        size = upper.double().norm(dim=-1, keepdim=True)
        lower = torch.cat([lower, torch.ones_like(size)], dim=-1) / size
        gram, cross = gram + lower.T @ lower, cross + lower.T @ (upper / size)
    if not gram.isfinite().all():
        raise UserError("--bridge: the base has hidden states that are not finite, or 0")
    try:
        solution = torch.linalg.pinv(gram, hermitian=True) @ cross  # the smallest one where several are as good
    except torch.linalg.LinAlgError as error:
        raise UserError(f"--bridge: no map can be fitted to the base's hidden states: {error}") from None
    missed = 1 - (solution * cross).sum().item() / x[..., 0].numel()
    return solution[:-1].T.float().cpu(), solution[-1].float().cpu(), missed
