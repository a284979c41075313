"""Head and cross-entropy in one operation that never holds tokens x vocabulary logits.

At a vocabulary of 128,256 the logits of 8,192 tokens are 4.2 GB in fp32, more than the whole two-layer model. Here
a chunk of tokens goes through head, softmax and gradient while it is in cache, and only the gradient of the hidden
states (tokens x hidden) stays. `F.linear_cross_entropy` of torch 2.13 does the same, but accumulates the loss over
chunks in bf16 when the input is bf16, and its chunks are slow on a CPU.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from elo.common.chunks import even_chunk
from elo.cpu.linear import add_matmul, matmul_t, product_dtype

IGNORE = -100  # a label that does not count, as in torch.nn.functional.cross_entropy

# Logits at a time: enough for fast matrix products, few enough to be small beside the model and, on a CPU, to stay in
# its last cache.
TILE_BYTES = {"cpu": 12 * 2**20, "cuda": 2**29}
TILE_ROWS = {"cpu": 2**12, "cuda": 2**16}
# The same where all logits of a token must be there at once.
CHUNK_BYTES = {"cpu": 50 * 2**20, "cuda": 2**29}
# fp32 copies at a time of logits in another dtype: on a CPU few enough to stay in its cache.
BLOCK_BYTES = {"cpu": 3 * 2**19, "cuda": 2**28}


# Replaces each row of logits by its softmax, computed in fp32; returns the rows' logsumexp, (rows, 1) in fp32.
Softmax = Callable[[Tensor], Tensor]


def softmax_(logits: Tensor) -> Tensor:
    """A `Softmax` of torch's own operators."""
    if logits.dtype == torch.float32:
        largest = logits.amax(1, keepdim=True)
        torch.softmax(logits, 1, out=logits)
        # The largest probability is exp(the largest logit - logsumexp).
        return largest.sub_(logits.amax(1, keepdim=True).log_())
    logsumexp = torch.empty(logits.shape[0], 1, device=logits.device)
    block = even_chunk(logits.shape[0], BLOCK_BYTES[logits.device.type] // (logits.shape[1] * 4))
    for part, its_logsumexp in zip(logits.split(block), logsumexp.split(block), strict=True):
        exact = part.float()
        its_logsumexp.copy_(softmax_(exact))
        part.copy_(exact)
    return logsumexp


def softmax_to_compile_(logits: Tensor) -> Tensor:
    """A `Softmax` that torch.compile makes into one kernel."""
    exact = logits.float()
    largest = exact.amax(1, keepdim=True)
    exponentials = (exact - largest).exp()
    total = exponentials.sum(1, keepdim=True)
    logits.copy_(exponentials / total)
    return largest + total.log()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, softmax: Softmax = softmax_) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against `labels`, in nats, as an fp32 scalar.

    hidden: (tokens, hidden_size); weight: (vocabulary, hidden_size); labels: (tokens,), IGNORE where none counts.
    The matrix products are in the dtype of `hidden`, softmax and sum in fp32. A weight that requires no gradient
    costs nothing beyond the gradient of `hidden`.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, softmax)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, softmax: Softmax) -> Tensor:  # noqa: ANN001
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if needs_hidden and not needs_weight:
            loss, hidden_grad, weight_grad = *_by_vocabulary(hidden, weight, labels, softmax), None
        else:
            needs = needs_hidden, needs_weight
            loss, hidden_grad, weight_grad = _by_tokens(hidden, weight, labels, softmax, *needs)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # noqa: ANN001
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * grad,
            None if weight_grad is None else (weight_grad * grad).to(ctx.weight_dtype),
            None,
            None,
        )


def _by_vocabulary(hidden: Tensor, weight: Tensor, labels: Tensor, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """The loss and its gradient at `hidden`, a tile of the vocabulary after the other.

    The gradient is softmax(hidden @ weight.T) @ weight - weight[labels]: attention of the tokens over the vocabulary,
    and computed much as flash attention is (arXiv 2205.14135): the softmax of a tile is taken by itself, and what the
    tiles so far make of the weight's rows moves towards what this one does by its share of the exponentials' sum.
    Tiles of many tokens and few columns make faster products than whole rows of logits, and stay in cache.
    """
    kind, dtype = hidden.device.type, product_dtype(hidden)
    hidden_grad = torch.empty_like(hidden)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    count = even_chunk(hidden.shape[0], TILE_ROWS[kind])
    width = even_chunk(weight.shape[0], TILE_BYTES[kind] // (count * dtype.itemsize), multiple=64)
    for rows in (slice(start, start + count) for start in range(0, hidden.shape[0], count)):
        h, counts = hidden[rows].to(dtype), (labels[rows] != IGNORE)[:, None]
        target = weight[labels[rows].where(counts[:, 0], 0)].to(dtype)
        total = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
        logsumexp = torch.full_like(total[:, :1], -math.inf)
        for columns in weight.split(width):
            columns = columns.to(dtype)
            tile = matmul_t(h, columns)  # (tokens, columns)
            tile_logsumexp = _fill_and(softmax, tile, count, width)
            logsumexp = torch.logaddexp(logsumexp, tile_logsumexp)
            total.lerp_(matmul_t(tile, columns.T).float(), (tile_logsumexp - logsumexp).exp_())
        # Rounded as the other logits are.
        target_logit = (h.float() * target).sum(1, keepdim=True).to(dtype)
        loss += ((logsumexp - target_logit) * counts).sum()
        hidden_grad[rows] = total.sub_(target).mul_(counts)
    return loss, hidden_grad


def _fill_and(softmax: Softmax, tile: Tensor, rows: int, columns: int) -> Tensor:
    """`softmax` of a tile that may be smaller than the others: one that is compiled gets a single shape."""
    if tile.shape == (rows, columns) or softmax is softmax_:
        return softmax(tile)
    filled = tile.new_full((rows, columns), -math.inf)
    filled[: tile.shape[0], : tile.shape[1]] = tile
    filled[tile.shape[0] :] = 0
    logsumexp = softmax(filled)[: tile.shape[0]]
    tile.copy_(filled[: tile.shape[0], : tile.shape[1]])
    return logsumexp


def _by_tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor, softmax: Softmax, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and its gradients at `hidden` and `weight`, some tokens after the others.

    The weight's gradient needs each token's whole softmax before the first product, so a chunk has all of its logits.
    """
    product, dtype = F.linear, hidden.dtype
    if needs_weight:
        product, dtype = matmul_t, product_dtype(hidden)
        weight = weight.to(dtype)
    hidden_grad = torch.empty_like(hidden) if needs_hidden else None
    weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    counts = labels != IGNORE
    targets = labels.where(counts, 0)

    chunk = even_chunk(hidden.shape[0], CHUNK_BYTES[hidden.device.type] // (weight.shape[0] * dtype.itemsize))
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        h, count, target = hidden[rows].to(dtype), counts[rows, None], targets[rows]
        logits = product(h, weight)  # (chunk, vocabulary)
        target_logit = logits.gather(1, target[:, None])
        logsumexp = _fill_and(softmax, logits, chunk, weight.shape[0])
        loss += ((logsumexp - target_logit) * count).sum()
        # The gradient at the logits is softmax - one_hot(label); the one-hot is applied as a row of the weight.
        if needs_hidden:
            hidden_grad[rows] = (matmul_t(logits, weight.T) - weight[target]) * count
        if needs_weight:
            add_matmul(weight_grad, logits.T, h * count)
            weight_grad.index_add_(0, target, (h * count).float(), alpha=-1)
    return loss, hidden_grad, weight_grad
