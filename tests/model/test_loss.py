"""The head and loss in one, its plain form and the one for CPUs, against torch's own cross-entropy."""

import flops
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from elo.cpu import loss as cpu_loss
from elo.cpu.linear import product_dtype
from elo.model import loss as plain_loss
from elo.model.loss import IGNORE
from elo.runs.sharding import CpuCrossEntropy


@pytest.fixture(params=[plain_loss.LinearCrossEntropy, CpuCrossEntropy], ids=["plain", "cpu"])
def linear_cross_entropy(request):
    return request.param()


def sample(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(53, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(301, 24, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 301, (53,), generator=generator)
    labels[[0, 7, 52]] = IGNORE
    return hidden, weight, labels


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows_at_a_time", [1, 10, 1000])
def test_value_and_gradients(rows_at_a_time, frozen, linear_cross_entropy, monkeypatch):
    monkeypatch.setitem(plain_loss.TILE_BYTES, "cpu", 301 * 4 * rows_at_a_time)
    monkeypatch.setattr(cpu_loss, "TILE_ROWS", rows_at_a_time)
    monkeypatch.setattr(cpu_loss, "TILE_BYTES", 64 * 4 * rows_at_a_time)  # five tiles, the last one smaller
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
def test_tiles_are_of_one_shape(frozen, monkeypatch):
    """For a softmax that is compiled for a shape: though the last tile is smaller, and whatever number counts."""
    monkeypatch.setitem(plain_loss.TILE_BYTES, "cpu", 301 * 4 * 20)
    found = []
    for one_shape in (False, True):
        shapes, module = set(), plain_loss.LinearCrossEntropy()
        module.one_shape = one_shape
        module.softmax_ = lambda logits, shapes=shapes: shapes.add(tuple(logits.shape)) or plain_loss.softmax_(logits)
        for ignored in (0, 3, 40, 53):
            hidden, weight, labels = sample()
            labels.clamp_(min=0)[:ignored] = IGNORE
            weight.requires_grad_(not frozen)
            loss = module(hidden, weight, labels)
            loss.backward()
            found.append((loss.detach(), hidden.grad, weight.grad))
        assert shapes == ({(18, 301)} if one_shape else {(18, 301), (17, 301), (16, 301), (13, 301)})
    for plain, filled in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(filled, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("counted", [None, 13])
def test_ignored_labels_cost_no_head(counted, frozen, linear_cross_entropy):
    """By torch's count of FLOPs: of 53 labels 13 count."""
    hidden, weight, labels = sample()
    labels.clamp_(min=0)[::4] = IGNORE
    labels[1::2] = IGNORE
    weight.requires_grad_(not frozen)
    with FlopCounterMode(display=False, custom_mapping=flops.FORMULAS) as counter:
        loss = linear_cross_entropy(hidden, weight, labels, counted)
        loss.backward()
    assert counter.get_total_flops() == 2 * 13 * 24 * 301 * (2 if frozen else 3)
    ours = loss.detach(), hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    loss = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE, reduction="sum")
    loss.backward()
    torch.testing.assert_close(ours, (loss.detach(), hidden.grad, weight.grad), rtol=1e-5, atol=1e-5)


def test_a_trained_heads_gradient_is_summed_in_fp32(monkeypatch):
    """Over tiles, beside fp64: nothing of a tile is rounded to bf16 before it is added."""
    monkeypatch.setitem(plain_loss.TILE_BYTES, "cpu", 301 * 2)
    hidden, weight, labels = sample(torch.bfloat16)
    labels = labels.clamp(min=0)
    gradient = plain_loss.LinearCrossEntropy().loss_and_gradients(hidden, weight, labels, None, False, True)[2]
    exact = [factor.detach().double().requires_grad_() for factor in (hidden, weight)]
    F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum").backward()
    assert gradient.dtype == torch.float32
    assert (gradient - exact[1].grad).norm() < 0.006 * exact[1].grad.norm()


def test_a_measurement_costs_no_gradient(linear_cross_entropy):
    """By torch's count of FLOPs: of a trained head too there is one product."""
    hidden, weight, labels = sample()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=flops.FORMULAS) as counter:
        linear_cross_entropy(hidden.detach(), weight, labels)
    assert counter.get_total_flops() == 2 * 50 * 24 * 301


@pytest.mark.parametrize("frozen", [False, True])
def test_bf16_is_summed_in_fp32(frozen, linear_cross_entropy):
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


def test_only_ignored_labels(linear_cross_entropy):
    hidden, weight, labels = sample()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_that_would_overflow_exp(frozen, linear_cross_entropy):
    hidden, weight, labels = sample()
    weight.requires_grad_(not frozen)
    loss = linear_cross_entropy(hidden * 1000, weight, labels)
    expected = F.cross_entropy(hidden * 1000 @ weight.T, labels, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "softmax",
    [plain_loss.softmax_, cpu_loss.softmax_, torch.compile(plain_loss.softmax_, backend="aot_eager", fullgraph=True)],
    ids=["plain", "cpu", "compiled"],
)
def test_softmax_in_place(softmax, dtype, monkeypatch):
    monkeypatch.setattr(cpu_loss, "BLOCK_BYTES", 301 * 4 * 4)  # the last block is smaller
    logits = (20 * torch.randn(53, 301)).to(dtype)
    exact, given = logits.double(), logits
    torch.testing.assert_close(softmax(logits), exact.logsumexp(1, keepdim=True).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(given, exact.softmax(1).to(dtype))
