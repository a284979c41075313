"""Causal attention for training on a CPU, against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from elo.cpu import attention as module
from elo.cpu.attention import ScaledDotProductAttention

attention = ScaledDotProductAttention()


def sample(heads, kv_heads, length, head_dim, batch=2, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    shapes = [(batch, count, length, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    return [tensor.requires_grad_() for tensor in (q, k, v)], grad


def with_gradients(function, inputs, grad):
    x = function(*inputs)
    return [x.detach(), *torch.autograd.grad(x, inputs, grad)]


def reference(inputs, grad):
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    return with_gradients(
        lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True), exact, grad.double()
    )


@pytest.mark.parametrize("tile_rows", [1, 40, 1000])  # 32 queries at a time at least, 40 in a few blocks, all
@pytest.mark.parametrize(("heads", "kv_heads", "length", "head_dim"), [(6, 2, 75, 12), (4, 4, 64, 8), (3, 1, 1, 16)])
def test_values_and_gradients(heads, kv_heads, length, head_dim, tile_rows, monkeypatch):
    tile_bytes = 2 * heads * length * 4 * tile_rows
    monkeypatch.setattr(module, "TILE_BYTES", {"batched": tile_bytes, "single": tile_bytes})
    inputs, grad = sample(heads, kv_heads, length, head_dim)
    # As they come from the projections: heads are no contiguous dimension.
    inputs = [tensor.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_() for tensor in inputs]
    found = with_gradients(
        lambda *qkv: attention(*qkv, None), inputs, grad.transpose(2, 3).contiguous().transpose(2, 3)
    )
    for mine, exact in zip(found, reference(inputs, grad), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("multiplies_bf16", [False, True])
def test_bf16_is_as_exact_as_torch(multiplies_bf16, monkeypatch):
    """Also on a processor that has products of it, and where many blocks of queries add to a key's gradient."""
    if multiplies_bf16:
        monkeypatch.setattr(module, "product_dtype", lambda x: x.dtype)
        monkeypatch.setattr(module, "TILE_BYTES", {"batched": 1, "single": 1})
    inputs, grad = sample(9, 3, 300, 64, dtype=torch.bfloat16)
    exact = reference(inputs, grad)
    ours = with_gradients(lambda *qkv: attention(*qkv, None), inputs, grad)
    theirs = with_gradients(
        lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True), inputs, grad
    )
    errors = [
        [((a.double() - b).norm() / b.norm()).item() for a, b in zip(x, exact, strict=True)] for x in (ours, theirs)
    ]
    assert max(errors[0]) < 1.2 * max(errors[1])


def test_outside_of_training_it_is_torchs_operator():
    inputs, _ = sample(6, 2, 75, 12)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    assert torch.equal(ScaledDotProductAttention().eval()(*inputs, None), expected)


@pytest.mark.parametrize("kv_heads", [2, 6])
def test_products_get_matrices_without_gaps(kv_heads, monkeypatch):
    """oneDNN computes others a hundred times slower; they come about with a single sequence."""
    multiply = module.matmul_t

    def dense(x, weight):
        assert torch.ops.aten.is_non_overlapping_and_dense(weight)
        return multiply(x, weight)

    monkeypatch.setattr(module, "matmul_t", dense)
    monkeypatch.setattr(module, "prefers_onednn", lambda q: True)
    inputs, grad = sample(6, kv_heads, 75, 12, batch=1)
    inputs = [tensor.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_() for tensor in inputs]
    found = with_gradients(lambda *qkv: attention(*qkv, None), inputs, grad)
    for mine, exact in zip(found, reference(inputs, grad), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)
