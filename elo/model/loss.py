"""Head and cross-entropy in one operation that never holds tokens x vocabulary logits.

At a vocabulary of 128,256 the logits of 8,192 tokens are 4.2 GB in fp32, more than the whole two-layer model. Here a
tile of some tokens at a time goes through head, softmax and gradient, and only the gradient of the hidden states
(tokens x hidden) stays. `F.linear_cross_entropy` of torch 2.13 does the same, but sums the loss of its chunks in bf16
if the input is bf16, and its chunks are slow on a CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elo.common.chunks import even_chunk, row_chunks

IGNORE = -100  # a label that does not count, as in torch.nn.functional.cross_entropy

# A tile of logits: enough for fast matrix products, few enough to be small beside the model.
TILE_BYTES = {"cpu": 50 * 2**20, "cuda": 2**29}


def softmax_(logits: Tensor) -> Tensor:
    """Replaces each row by its softmax, computed in fp32; returns the rows' logsumexp, (rows, 1) in fp32."""
    exact = logits.float()
    largest = exact.amax(1, keepdim=True)
    exact.sub_(largest).exp_()
    total = exact.sum(1, keepdim=True)
    logits.copy_(exact.div_(total))
    return largest + total.log()


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32, whatever the dtype of the factors."""
    if a.device.type == "cuda" and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class LinearCrossEntropy(nn.Module):
    """Summed cross-entropy of `hidden @ weight.T` against `labels`, in nats, as an fp32 scalar.

    hidden: (tokens, hidden_size); weight: (vocabulary, hidden_size); labels: (tokens,), IGNORE for tokens that do not
    count, which are left out of the products. counted: how many count, if the caller knows; finding out would wait for
    the GPU. Matrix products are in the dtype of `hidden`, softmax and sums in fp32. A frozen weight costs nothing
    beyond the gradient of `hidden`; the gradient of a trained one is in fp32 if its `grad_dtype` is.
    """

    one_shape = False  # fill up the last tile: for a softmax that is compiled for one shape
    # What is faster in another way on some devices: products are x @ weight.T, in the dtype that is chosen for x.
    softmax_, matmul_t, add_product_ = staticmethod(softmax_), staticmethod(F.linear), staticmethod(add_product_)

    @staticmethod
    def product_dtype(x: Tensor) -> torch.dtype:
        return x.dtype

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, counted: int | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            weight = weight.detach()  # else ctx.needs_input_grad still says that it needs a gradient
        return _LinearCrossEntropy.apply(hidden, weight, labels, counted, self)

    def loss_and_gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        places: Tensor | None,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, and the gradients that are needed; that of the weight in fp32.

        places: the indices of the labels that count, None if all do.
        """
        weight = weight.to(self.product_dtype(hidden))
        hidden_grad = torch.zeros_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        count = len(labels) if places is None else len(places)
        row_bytes = len(weight) * weight.itemsize
        size = tile_rows(len(labels) if self.one_shape else count, row_bytes, hidden.device.type)
        for rows in row_chunks(count, size, places):
            h, label = hidden[rows].to(weight.dtype), labels[rows, None]
            real = len(h)
            if self.one_shape and real < size:
                h, label = F.pad(h, (0, 0, 0, size - real)), F.pad(label, (0, 0, 0, size - real))
            logits = self.matmul_t(h, weight)  # (rows, vocabulary)
            label_logit = logits.gather(1, label)
            losses = self.softmax_(logits) - label_logit
            loss += losses[:real].sum()
            # The gradient at the logits is softmax - one_hot(label).
            logits.scatter_(1, label, losses.neg().expm1_().to(logits.dtype))
            if needs_hidden:
                hidden_grad[rows] = self.matmul_t(logits, weight.T)[:real].to(hidden.dtype)
            if needs_weight:
                self.add_product_(weight_grad, logits.T, h)
            del logits  # before there is the next one
        return loss, hidden_grad, weight_grad


def tile_rows(count: int, row_bytes: int, device: str) -> int:
    """How many of `count` tokens go through the head together; row_bytes: a token's logits."""
    return even_chunk(count, TILE_BYTES[device] // row_bytes)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while each tile of logits exists."""

    @staticmethod
    def forward(
        ctx,  # noqa: ANN001
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        counted: int | None,
        module: LinearCrossEntropy,
    ) -> Tensor:
        counts = labels != IGNORE
        counted = int(counts.sum()) if counted is None else counted
        places = None if counted == len(labels) else counts.nonzero_static(size=counted).flatten()
        loss, *gradients = module.loss_and_gradients(hidden, weight, labels, places, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * grad,
            None if weight_grad is None else weight_grad.mul_(grad),  # in place: a copy could be gigabytes
            None,
            None,
            None,
        )
