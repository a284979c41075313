"""What could take the place of the loss and of attention, each as small as it can be measured."""

import inspect
import math
from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

from benchmarks.gpu.measuring import need_gpu

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (tokens, hidden), labels -> sum, gradient of the hidden
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (batch, heads, sequence, head_dim) each, causal
FP8, LARGEST = torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max


def fast(function: Callable, device: torch.device) -> Callable:
    """In one kernel on a GPU, of one shape, as `elo.runs.compilation` has it."""
    if device.type == "cpu":
        return function
    return torch.compile(function, fullgraph=True, dynamic=False, options={"deterministic": True})


# ---- the loss with a frozen head


def exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logit - the row's largest), by a power of two, in fp32; their sum, by which products with them are divided;
    the rows' logsumexp."""
    exact = logits.float()
    largest = exact.amax(1, keepdim=True)
    powers = ((exact - largest) * math.log2(math.e)).exp2()
    total = powers.sum(1, keepdim=True)
    return powers, total, largest + total.log()


def exponentials_(logits: Tensor) -> tuple[Tensor, Tensor]:
    powers, total, logsumexp = exponentials(logits)
    logits.copy_(powers)
    return total, logsumexp


def quantized_exponentials(logits: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """In fp8, (tiles, rows, columns)."""
    powers, total, logsumexp = exponentials(logits)
    return (powers * LARGEST).to(FP8).unflatten(1, (-1, columns)).transpose(0, 1).contiguous(), total, logsumexp


def by_rows(weight: Tensor, rows: int, block: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> Loss:
    """Some tokens at a time, with all of their logits. block: hidden states, labels -> product, divisor, losses."""

    def compute(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        gradient, loss = torch.empty_like(hidden), torch.zeros((), device=hidden.device)
        for part in (slice(start, start + rows) for start in range(0, len(hidden), rows)):
            product, divisor, losses = block(hidden[part], labels[part, None])
            loss += losses.sum()
            gradient[part] = product / divisor - weight[labels[part]]
        return loss, gradient

    return compute


def row_blocks(weight: Tensor, rows: int) -> Loss:
    kernel = fast(exponentials_, weight.device)

    def block(hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = F.linear(hidden, weight)  # (rows, vocabulary)
        label_logit = logits.gather(1, labels)
        total, logsumexp = kernel(logits)
        return logits @ weight, total, logsumexp - label_logit

    return by_rows(weight, rows, block)


def fp8_head(weight: Tensor, rows: int, columns: int) -> Loss:
    """Row blocks with both products in fp8. The head is frozen: quantized once, along either dimension."""
    by_row = to_fp8(weight)
    by_column = [to_fp8(tile.T.contiguous()) for tile in weight.split(columns)]  # (hidden, columns)
    quantize, kernel = fast(to_fp8, weight.device), fast(quantized_exponentials, weight.device)
    unit = torch.full((rows, 1), 1 / LARGEST, device=weight.device)

    def block(hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = scaled_mm(*quantize(hidden), *by_row, fast_sums=True)
        label_logit = logits.gather(1, labels)
        tiles, total, logsumexp = kernel(logits, columns)
        parts = (scaled_mm(t, unit, *w, fast_sums=False).float() for t, w in zip(tiles, by_column, strict=True))
        return sum(parts), total, logsumexp - label_logit

    return by_rows(weight, rows, block)


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, inner), each row by a scale of its own: (rows, 1) in fp32."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / LARGEST
    return (x / scale).to(FP8), scale


def scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, fast_sums: bool) -> Tensor:
    """a @ b.T of two such, in bf16; fast_sums: in the tensor cores' own, shorter numbers. Emulated on a CPU."""
    if a.device.type == "cpu":
        return ((a.float() @ b.float().T) * a_scale * b_scale.T).bfloat16()
    scales = {"scale_a": a_scale, "scale_b": b_scale.T}
    return torch._scaled_mm(a, b.T, **scales, out_dtype=torch.bfloat16, use_fast_accum=fast_sums)


def column_tiles(weight: Tensor, columns: int) -> Loss:
    """All tokens, with equally many columns of the vocabulary at a time, as flash attention goes over keys."""
    kernel = fast(exponentials_, weight.device)

    def compute(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.zeros(hidden.shape, device=hidden.device)
        logsumexp = torch.full_like(gradient[:, :1], -math.inf)
        for tile in weight.split(columns):
            logits = F.linear(hidden, tile)
            total, of_tile = kernel(logits)
            logsumexp = torch.logaddexp(logsumexp, of_tile)
            gradient.lerp_((logits @ tile).float() / total, (of_tile - logsumexp).exp_())
        target = weight[labels]
        label_logit = (hidden.float() * target).sum(1, keepdim=True)
        return (logsumexp - label_logit).sum(), gradient.sub_(target).to(hidden.dtype)

    return compute


def by_autograd(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    def compute(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden.detach().requires_grad_()
        loss = loss_of(hidden, labels)
        loss.backward()
        return loss.detach(), hidden.grad

    return compute


def whole_logits(weight: Tensor) -> Loss:
    return by_autograd(lambda hidden, labels: F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum"))


def liger(weight: Tensor) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    need_gpu(weight.device)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return by_autograd(lambda hidden, labels: loss(weight, hidden, labels))


def apple(weight: Tensor) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    need_gpu(weight.device)
    return by_autograd(lambda hidden, labels: linear_cross_entropy(hidden, weight, labels, reduction="sum"))


# ---- attention


def fused(backend: SDPBackend = SDPBackend.FLASH_ATTENTION) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return attend


def flash_3() -> Attend:
    """From now on, for this process."""
    activate_flash_attention_impl("FA3")
    return fused()


def flex(length: int, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    need_gpu(device)
    mask = create_block_mask(lambda b, h, query, key: query >= key, None, None, length, length, device=device)
    compiled = fast(flex_attention, device)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def packed(lengths: list[int], device: torch.device) -> Attend:
    """Of sequences one after the other: (tokens, heads, head_dim) each."""
    from torch.nn.attention.varlen import varlen_attn

    need_gpu(device)
    ends = torch.tensor([0, *accumulate(lengths)], device=device, dtype=torch.int32)
    # torch 2.11 takes grouped queries unasked.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    longest = max(lengths)
    return lambda q, k, v: varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), **grouped)
