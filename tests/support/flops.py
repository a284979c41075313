"""What torch's counter of FLOPs does not know: oneDNN's products, attention on a CPU, products added in place."""

import math

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

FORMULAS = {
    torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0],
    torch.ops.aten.addmm_: lambda total, a, b, *_, **__: 2 * math.prod(a) * b[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
