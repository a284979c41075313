"""Linear layers that train on the fastest matrix products of a CPU; on other devices they are torch's.

torch multiplies fp32 matrices with MKL, which on AMD processors makes no use of AVX-512 and then runs at less than half
the speed of oneDNN; without AVX-512 MKL is the faster one. bf16 matrices have no fast product at all on a CPU without
AVX-512 or AMX: torch's is 8 to 30 times slower than its fp32 one. There both factors go to fp32, which changes no
value, and the product is rounded to bf16: what processors that have the instructions do.

Outside of training these are torch's own operators, so that in fp32 logits are those of transformers to the
last bit. In bf16 the two round in other places: of SmolLM2 on 1,024 tokens their logits differ by up to 1.7, and from
fp32's those of transformers by 0.14 (root mean square), ours by 0.12.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elo.cpu import onednn

ONEDNN = onednn.AVAILABLE and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrices of x's dtype and device are best multiplied."""
    return torch.float32 if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not onednn.HAS_BF16 else x.dtype


def prefers_onednn(x: Tensor) -> bool:
    """torch.compile chooses its own library, and cannot lower this operator with a weight that training changes."""
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def matmul_t(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias inside of an autograd function. x: (..., in); weight: (out, in), of any strides."""
    dtype = product_dtype(x)
    if dtype != x.dtype:
        return matmul_t(x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)).to(x.dtype)
    if prefers_onednn(x):
        return onednn.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32, of bf16 factors too: a product in bf16 would round before it adds."""
    if a.dtype == torch.bfloat16:
        onednn.add_product_(total, a, b)
    elif ONEDNN:
        total += matmul_t(a.contiguous(), b.T)  # which is as fast as its factors are without gaps
    else:
        total.addmm_(a, b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN001
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)  # of a frozen one not its input
        return matmul_t(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # noqa: ANN001
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            matmul_t(grad, weight.T) if needs_x else None,
            matmul_t(rows.T, x.flatten(0, -2).T) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def trains(module: nn.Module) -> bool:
    """Whether a backward pass for training may follow."""
    return module.training and torch.is_grad_enabled()


class Linear(nn.Linear):
    """Takes the place of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        own = prefers_onednn(x) or (product_dtype(x) != x.dtype and not torch.compiler.is_compiling())
        if own and trains(self):
            return _Linear.apply(x, self.weight, self.bias)
        return super().forward(x)
