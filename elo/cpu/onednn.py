"""oneDNN's matrix products, most by operators that are private to torch: no other file calls those.

torch.compile lowers linear layers to them. Where one of them is missing, `AVAILABLE` is False and whoever asks first,
as all do, takes `F.linear`: the same products of unpacked weights, at torch's own speed.
"""

import torch
from torch import Tensor

OPERATORS = "_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported"
AVAILABLE = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS)
HAS_BF16 = AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias. x: (..., in); weight: (out, in) of any strides, or as `packed` has made it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packed(weight: Tensor, rows: int) -> Tensor:
    """A weight as the kernels for this CPU want it if x has about so many rows; only `linear` can use it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b of bf16 factors, summed in fp32; by bf16 instructions where the CPU has them."""
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"  # of fp32 factors, which loses nothing of these
    try:
        total.addmm_(a.float(), b.float())
    finally:
        matmul.fp32_precision = before
