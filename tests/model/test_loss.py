"""The chunked head and loss against torch's own cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

from elo.cpu.linear import product_dtype
from elo.model import loss as loss_module
from elo.model.loss import IGNORE, linear_cross_entropy, softmax_, softmax_to_compile_


def sample(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(53, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(301, 24, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 301, (53,), generator=generator)
    labels[[0, 7, 52]] = IGNORE
    return hidden, weight, labels


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows_at_a_time", [1, 10, 1000])
def test_value_and_gradients(rows_at_a_time, frozen, monkeypatch):
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 301 * 4 * rows_at_a_time)
    monkeypatch.setitem(loss_module.TILE_ROWS, "cpu", rows_at_a_time)
    monkeypatch.setitem(loss_module.TILE_BYTES, "cpu", 64 * 4 * rows_at_a_time)  # five tiles, the last one smaller
    hidden, weight, labels = sample()
    weight.requires_grad_(not frozen)
    loss = linear_cross_entropy(hidden, weight, labels)
    (loss * 0.7).backward()
    ours = loss.detach(), hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    loss = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE, reduction="sum")
    (loss * 0.7).backward()
    torch.testing.assert_close(ours, (loss.detach(), hidden.grad, weight.grad), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_softmax_to_compile_meets_one_shape(frozen, monkeypatch):
    """Though the last tiles are smaller, in rows and in columns."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 301 * 4 * 10)
    monkeypatch.setitem(loss_module.TILE_ROWS, "cpu", 10)
    monkeypatch.setitem(loss_module.TILE_BYTES, "cpu", 64 * 4 * 10)
    shapes, found = set(), []

    def softmax(logits):
        shapes.add(logits.shape)
        return softmax_to_compile_(logits)

    for function in (softmax, softmax_):
        hidden, weight, labels = sample()
        weight.requires_grad_(not frozen)
        loss = linear_cross_entropy(hidden, weight, labels, function)
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert len(shapes) == 1


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, labels = sample()
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels).backward()
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("frozen", [False, True])
def test_bf16_is_summed_in_fp32(frozen):
    hidden, weight, labels = sample(torch.bfloat16)
    weight.requires_grad_(not frozen)
    loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32
    # A CPU without bf16 instructions does not round the logits.
    logits = F.linear(*(factor.to(product_dtype(hidden)) for factor in (hidden, weight))).float()
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    exact = sample()[0]
    F.cross_entropy(exact @ weight.float().T, labels, ignore_index=IGNORE, reduction="sum").backward()
    assert (hidden.grad.float() - exact.grad).norm() < 0.02 * exact.grad.norm()


def test_only_ignored_labels():
    hidden, weight, labels = sample()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_that_would_overflow_exp(frozen):
    hidden, weight, labels = sample()
    weight.requires_grad_(not frozen)
    loss = linear_cross_entropy(hidden * 1000, weight, labels)
    expected = F.cross_entropy(hidden * 1000 @ weight.T, labels, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "softmax",
    [softmax_, softmax_to_compile_, torch.compile(softmax_to_compile_, backend="aot_eager", fullgraph=True)],
    ids=["eager", "to compile", "compiled"],
)
def test_softmax_in_place(softmax, dtype, monkeypatch):
    monkeypatch.setitem(loss_module.BLOCK_BYTES, "cpu", 301 * 4 * 4)  # the last block is smaller
    logits = (20 * torch.randn(53, 301)).to(dtype)
    exact, given = logits.double(), logits
    torch.testing.assert_close(softmax(logits), exact.logsumexp(1, keepdim=True).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(given, exact.softmax(1).to(dtype))
