"""Head and cross-entropy that train faster on a CPU.

Tiles of many tokens and few columns of the vocabulary make faster products than whole rows of logits, and stay in
cache. Where the head is trained its gradient needs each token's whole softmax, and so rows as elsewhere.
"""

import math

import torch
from torch import Tensor

from elo.common.chunks import even_chunk, row_chunks
from elo.cpu.linear import matmul_t, product_dtype

# Logits at a time: few enough to stay in the last cache of a CPU.
TILE_BYTES, TILE_ROWS = 12 * 2**20, 2**12
# fp32 copies at a time of logits in another dtype.
BLOCK_BYTES = 3 * 2**19


def softmax_(logits: Tensor) -> Tensor:
    """As `elo.model.loss.softmax_`, in cache."""
    if logits.dtype == torch.float32:
        largest = logits.amax(1, keepdim=True)
        torch.softmax(logits, 1, out=logits)
        # The largest probability is exp(the largest logit - logsumexp).
        return largest.sub_(logits.amax(1, keepdim=True).log_())
    logsumexp = torch.empty(logits.shape[0], 1)
    block = even_chunk(logits.shape[0], BLOCK_BYTES // (logits.shape[1] * 4))
    for part, its_logsumexp in zip(logits.split(block), logsumexp.split(block), strict=True):
        exact = part.float()
        its_logsumexp.copy_(softmax_(exact))
        part.copy_(exact)
    return logsumexp


def by_vocabulary(hidden: Tensor, weight: Tensor, labels: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss and its gradient at `hidden`, a tile of the vocabulary after the other.

    The gradient is softmax(hidden @ weight.T) @ weight - weight[labels]: attention of the tokens over the vocabulary,
    and computed much as flash attention is (arXiv 2205.14135): the softmax of a tile is taken by itself, and what the
    tiles so far make of the weight's rows moves towards what this one does by its share of the exponentials' sum.
    """
    dtype = product_dtype(hidden)
    hidden_grad = torch.zeros_like(hidden)
    loss = torch.zeros((), dtype=torch.float32)
    count = len(hidden) if places is None else len(places)
    size = even_chunk(count, TILE_ROWS)
    width = even_chunk(weight.shape[0], TILE_BYTES // (size * dtype.itemsize), multiple=64)
    for rows in row_chunks(count, size, places):
        h, target = hidden[rows].to(dtype), weight[labels[rows]].to(dtype)
        total = torch.zeros(h.shape, dtype=torch.float32)
        logsumexp = torch.full_like(total[:, :1], -math.inf)
        for columns in weight.split(width):
            columns = columns.to(dtype)
            tile = matmul_t(h, columns)  # (tokens, columns)
            tile_logsumexp = softmax_(tile)
            logsumexp = torch.logaddexp(logsumexp, tile_logsumexp)
            total.lerp_(matmul_t(tile, columns.T).float(), (tile_logsumexp - logsumexp).exp_())
        # Rounded as the other logits are.
        target_logit = (h.float() * target).sum(1, keepdim=True).to(dtype)
        loss += (logsumexp - target_logit).sum()
        hidden_grad[rows] = total.sub_(target).to(hidden.dtype)
    return loss, hidden_grad
