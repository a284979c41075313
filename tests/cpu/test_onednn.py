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
