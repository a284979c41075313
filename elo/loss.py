"""Head and cross-entropy in one operation that never holds tokens x vocabulary logits.

At a vocabulary of 128,256 the logits of 8,192 tokens are 4.2 GB in fp32, more than the whole two-layer model. Here
a chunk of tokens goes through head, softmax and gradient while it is in cache, and only the gradient of the hidden
states (tokens x hidden) stays. `F.linear_cross_entropy` of torch 2.13 does the same, but accumulates the loss over
chunks in bf16 when the input is bf16, and its chunks are slow on a CPU.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from elo.linear import matmul_t

IGNORE = -100  # a label that does not count, as in torch.nn.functional.cross_entropy

# Logits at a time in the matrix products: enough rows for them to be fast, few enough to be small beside the model. On
# a CPU also less than the 32 MiB from which on glibc takes fresh pages from the kernel for every tensor.
CHUNK_BYTES = {"cpu": 25 * 2**20, "cuda": 2**29}
# fp32 logits at a time in the softmax, which passes over them five times: on a CPU a part that stays in its cache.
BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**30}


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against `labels`, in nats, as an fp32 scalar.

    hidden: (tokens, hidden_size); weight: (vocabulary, hidden_size); labels: (tokens,), IGNORE where none counts.
    The matrix products are in the dtype of `hidden`, softmax and sum in fp32. A weight that requires no gradient
    costs nothing beyond the gradient of `hidden`.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:  # noqa: ANN001
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        counts = labels != IGNORE
        product = matmul_t if needs_hidden or needs_weight else F.linear
        targets = labels.where(counts, 0)

        chunk = even_chunk(hidden.shape[0], CHUNK_BYTES[hidden.device.type] // (weight.shape[0] * hidden.itemsize))
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            h, count, target = hidden[rows], counts[rows, None], targets[rows]
            logits = product(h, weight)  # (chunk, vocabulary)
            losses, row_sum = _exponentiate(logits, target)
            loss += (losses * count).sum()

            # The gradient at the logits is softmax - one_hot(label). Both parts are applied on the small side of the
            # matrix products: the row sums after them, the one-hot as a row of the weight.
            if needs_hidden:
                hidden_grad[rows] = (matmul_t(logits, weight.T) / row_sum - weight[target]) * count
            if needs_weight:
                weight_grad += matmul_t(logits.T, (h * (count / row_sum)).to(h.dtype).T)
                weight_grad.index_add_(0, target, (h * count).float(), alpha=-1)

        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # noqa: ANN001
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * grad,
            None if weight_grad is None else (weight_grad * grad).to(ctx.weight_dtype),
            None,
        )


def _exponentiate(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Replace each row of logits by exp(row - max(row)), its softmax but for the sum.

    Returns each row's cross-entropy and its sum, both (rows, 1) in fp32.
    """
    losses = torch.empty(logits.shape[0], 1, device=logits.device)
    row_sum = torch.empty_like(losses)
    block = even_chunk(logits.shape[0], BLOCK_BYTES[logits.device.type] // (logits.shape[1] * 4))
    for start in range(0, logits.shape[0], block):
        rows = slice(start, start + block)
        part = logits[rows].float()  # the same memory if it is fp32 already
        largest = part.amax(1, keepdim=True)
        losses[rows] = largest - part.gather(1, target[rows, None])
        row_sum[rows] = part.sub_(largest).exp_().sum(1, keepdim=True)
        if part.dtype != logits.dtype:
            logits[rows] = part
    return losses.add_(row_sum.log()), row_sum


def even_chunk(rows: int, most: int) -> int:
    """The size of the fewest chunks of at most `most` rows, none of them much smaller than the others."""
    return math.ceil(rows / math.ceil(rows / max(1, most))) if rows else 1
