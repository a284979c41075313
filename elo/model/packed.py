"""A model for inference on a CPU: fewer and larger products, of weights that lie as its kernels want them."""

import torch
from torch import Tensor, nn

from elo.cpu import onednn
from elo.cpu.memory import keep_freed_memory
from elo.model.decoder import MLP, Attention, CausalLM


class PackedLinear(nn.Module):
    """Linear layers of the same input as one, whose weight lies as oneDNN's kernels for this CPU want it.

    On a few rows that takes half the time of `F.linear`, which finds the weight in rows and, for fp32, calls MKL.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
        self.weight = onednn.packed(weight.detach(), rows=8)
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        return onednn.linear(x, self.weight, self.bias)


class PackedAttention(Attention):
    """Queries, keys and values are one product; all else is the decoder's."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv_proj(x).split(self.widths, -1)


class PackedMLP(MLP):
    """The gate and what passes through it are one product; all else is the decoder's."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate_up_proj(x).chunk(2, dim=-1)


def _pack_attention(attention: Attention) -> None:
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    attention.widths = [layer.out_features for layer in layers]
    attention.qkv_proj, attention.o_proj = PackedLinear(*layers), PackedLinear(attention.o_proj)
    del attention.q_proj, attention.k_proj, attention.v_proj
    attention.__class__ = PackedAttention


def _pack_mlp(mlp: MLP) -> None:
    mlp.gate_up_proj, mlp.down_proj = PackedLinear(mlp.gate_proj, mlp.up_proj), PackedLinear(mlp.down_proj)
    del mlp.gate_proj, mlp.up_proj
    mlp.__class__ = PackedMLP


def pack_weights(model: CausalLM) -> CausalLM:
    """Make a model on a CPU faster, in place, and the whole process: see `cpu.memory.keep_freed_memory`.

    The weights can then be neither trained nor saved.
    """
    weight = model.lm_head.weight
    if weight.device.type == "cpu":
        keep_freed_memory()
    has_kernels = onednn.AVAILABLE and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if not has_kernels or weight.device.type != "cpu":
        return model
    if weight.dtype == torch.bfloat16 and not onednn.HAS_BF16:
        return model
    for block in model.model.layers:
        # What these do not know stays as it is.
        if type(block.self_attn) is Attention:
            _pack_attention(block.self_attn)
        if type(block.mlp) is MLP:
            _pack_mlp(block.mlp)
    model.lm_head = PackedLinear(model.lm_head)
    return model
