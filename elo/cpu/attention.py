"""Causal attention that trains faster on a CPU.

torch's flash kernel on a CPU multiplies tiles of 64 keys one head after the other, at a quarter of the speed of its
batched matrix products. Here a block of queries goes against all its keys at once, in many heads: the tiles are large
enough for fast products and small enough to stay in cache. As in flash attention (arXiv 2205.14135), the softmax is
computed again in the backward pass, so that sequence x sequence scores never exist as a whole.

Outside of training it is torch's operator, so that in fp32 logits are those of transformers to the last
bit; for bf16 see elo/cpu/linear.py.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elo.common.chunks import even_chunk
from elo.cpu.linear import matmul_t, prefers_onednn, product_dtype, trains

TILE_BYTES = {"batched": 5 * 2**20, "single": 2**21}  # scores at a time


class ScaledDotProductAttention(nn.Module):
    """Takes the place of the decoder's of this name."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q: (batch, heads, sequence, head_dim); k, v: (batch, kv_heads, sequence, head_dim); the result is as q."""
        dtype = product_dtype(q) if trains(self) else q.dtype
        if trains(self) and mask is None and not torch.compiler.is_compiling():
            return _CausalAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype)).to(q.dtype)
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
        x = F.scaled_dot_product_attention(
            q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return x.to(q.dtype)


class _CausalAttention(torch.autograd.Function):
    """Matrices are batched over (batch, kv_heads); those query heads that share a key-value head are rows of one."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN001
        shape, length, head_dim = q.shape, q.shape[2], q.shape[3]
        # (batch x kv_heads, sequence, head_dim); oneDNN multiplies matrices with gaps a hundred times slower.
        k, v = k.flatten(0, 1).contiguous(), v.flatten(0, 1).contiguous()
        q = q.reshape(k.shape[0], -1, length, head_dim)  # (batch x kv_heads, heads that share, sequence, head_dim)
        x = torch.empty_like(q)
        for some, rows, past in tiles(q):
            weights = attention_weights(q[some, :, rows], k[some, past])
            x[some, :, rows] = product(weights, v[some, past]).view(x[some, :, rows].shape)
        ctx.save_for_backward(q, k, v, x)
        return x.view(shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN001
        q, k, v, x = ctx.saved_tensors
        shape, scale = grad.shape, q.shape[-1] ** -0.5
        kv_shape = (shape[0], -1, *shape[2:])
        grad = grad.reshape(q.shape)
        q_grad = torch.empty_like(q)
        k_grad, v_grad = (torch.zeros(k.shape, dtype=torch.float32) for _ in range(2))
        mean = (grad * x).sum(-1, keepdim=True)  # of the gradient at a query's weights, by those weights
        for some, rows, past in tiles(q):
            queries, keys, values = q[some, :, rows], k[some, past], v[some, past]
            weights = attention_weights(queries, keys)
            x_grad = grad[some, :, rows].flatten(1, 2)  # (matrices, queries, head_dim)
            v_grad[some, past] += transposed_product(weights, x_grad)
            score_grad = product(x_grad, values.transpose(1, 2)).sub_(mean[some, :, rows].flatten(1, 2)).mul_(weights)
            q_grad[some, :, rows] = product(score_grad, keys).view(queries.shape)
            k_grad[some, past] += transposed_product(score_grad, queries.flatten(1, 2))
        return (
            q_grad.mul_(scale).view(shape),
            k_grad.mul_(scale).to(k.dtype).view(kv_shape),
            v_grad.to(v.dtype).view(kv_shape),
        )


def tiles(q: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """What is computed together: (matrices, queries, keys)."""
    matrices, shared, length, _ = q.shape
    # oneDNN has no batched product of fp32, but its single one makes up for that.
    kind, together = ("single", 1) if prefers_onednn(q) else ("batched", matrices)
    size = even_chunk(length, TILE_BYTES[kind] // (together * shared * length * q.itemsize), multiple=32)
    for first in range(0, matrices, together):
        for start in range(0, length, size):
            stop = min(start + size, length)
            yield slice(first, first + together), slice(start, stop), slice(stop)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """(matrices, heads that share x queries, keys): the softmax of the last queries of a sequence over its keys.

    q: (matrices, heads that share, queries, head_dim); k: (matrices, keys, head_dim).
    """
    queries = q.shape[2]
    scores = product((q * q.shape[-1] ** -0.5).flatten(1, 2), k.transpose(1, 2))
    scores.unflatten(1, (-1, queries))[..., -queries:] += future(queries, q.dtype)
    return torch.softmax(scores, -1, out=scores)


@lru_cache(maxsize=8)
def future(queries: int, dtype: torch.dtype) -> Tensor:
    """(queries, queries): minus infinity where a query may not look, on the CPU."""
    with torch.inference_mode(False):
        return torch.full((queries, queries), -math.inf, dtype=dtype).triu_(1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, both (matrices, rows, columns)."""
    return a @ b if len(a) > 1 else matmul_t(a[0], b[0].T)[None]


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a.transpose(1, 2) @ b."""
    # oneDNN copies a first factor that is transposed: let it be b, which is smaller.
    return a.transpose(1, 2) @ b if len(a) > 1 else product(b.transpose(1, 2), a).transpose(1, 2)
