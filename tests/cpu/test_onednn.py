"""torch's private operators: called in one file, and not needed."""

from pathlib import Path

import families
import pytest
import torch

from elo.cpu import linear, onednn
from elo.model.checkpoint import load_model
from elo.model.packed import PackedLinear, pack_weights

ROOT = Path(__file__).parents[2]


def test_no_other_file_calls_them():
    files = [path for room in ("elo", "eval", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    assert [path.name for path in files if "ops.mkldnn" in path.read_text()] == ["onednn.py"]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_products():
    """The names are written in one place; where this fails, torch has renamed one and all got slower."""
    assert onednn.AVAILABLE
    x, weight, bias = torch.randn(3, 5), torch.randn(7, 5), torch.randn(7)
    torch.testing.assert_close(onednn.linear(x, weight, bias), x @ weight.T + bias)
    torch.testing.assert_close(onednn.linear(x, onednn.packed(weight, rows=3), bias), x @ weight.T + bias)


def test_without_them_all_goes_on(tmp_path, monkeypatch):
    model = load_model(families.write("llama3", tmp_path), "cpu", torch.float32)
    tokens = torch.arange(60).view(2, 30)
    before = model(tokens)
    monkeypatch.setattr(onednn, "AVAILABLE", False)
    monkeypatch.setattr(linear, "ONEDNN", False)
    assert not any(isinstance(module, PackedLinear) for module in pack_weights(model).modules())
    assert torch.equal(model(tokens), before)


def test_a_sum_of_bf16_products_is_fp32s_and_leaves_other_products_alone():
    a, b = torch.randn(64, 300).bfloat16(), torch.randn(300, 96).bfloat16()
    before = a.float() @ (b.float() * 1.001)
    total = torch.full((64, 96), 1e4)
    linear.add_matmul(total, a, b)
    assert (total - (a.double() @ b.double() + 1e4)).abs().max() < 2e-3  # half of what fp32 resolves at 10,000
    assert torch.equal(a.float() @ (b.float() * 1.001), before)
