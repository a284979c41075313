"""Linear layers that train on the faster of a CPU's two matrix libraries.

torch multiplies fp32 matrices with MKL, which on AMD processors runs at less than half the speed of oneDNN, the library
that torch takes for bf16. The operator used here is the one to which torch.compile lowers linear layers on a CPU.
Without gradients this is `torch.nn.functional.linear`, so that logits are those of transformers to the last bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def prefers_onednn(x: Tensor) -> bool:
    """torch.compile chooses its own library, and cannot lower this operator with a weight that training changes."""
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def matmul_t(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias inside of an autograd function. x: (..., in); weight: (out, in), of any strides."""
    if prefers_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(x, weight)
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


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if prefers_onednn(x) and torch.is_grad_enabled():
            return _Linear.apply(x, self.weight, self.bias)
        return super().forward(x)
