"""Logits and gradients of the decoder against transformers, for every family and variant."""

from pathlib import Path

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from elo.model.checkpoint import load_model
from elo.model.loss import IGNORE
from elo.runs.sharding import use_faster_operators

SMOLLM2 = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"


@pytest.mark.parametrize("variant", families.VARIANTS)
def test_logits_and_gradients_equal_transformers(variant, tmp_path):
    families.write(variant, tmp_path)
    ours = load_model(tmp_path, "cpu", torch.float32).requires_grad_()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, families.SMALL["vocab_size"], (3, 40), generator=torch.Generator().manual_seed(1))
    tokens[:, :2] = torch.tensor([2, families.SMALL["vocab_size"] - 5])  # some variants' pad_token_id

    expected = theirs(tokens).logits
    assert 0.3 < expected.std() < 3
    torch.testing.assert_close(ours(tokens), expected, atol=2e-6, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), expected, atol=2e-6, rtol=0)
        for length in range(4, 10):  # about the size of the windows
            few = tokens[:, :length]
            torch.testing.assert_close(ours(few), theirs(few).logits, atol=2e-6, rtol=0)

    # Training has matrix products and attention of its own, as far from the exact logits as those of transformers.
    use_faster_operators(ours.train())
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)(tokens).logits
    assert (ours(tokens) - exact).norm() < 1.2 * (expected - exact).norm()
    torch.testing.assert_close(ours(tokens), expected, atol=2e-5, rtol=0)

    labels = tokens.roll(-1, 1)
    labels[:, -1] = labels[0, 3] = IGNORE
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    our_loss = ours(tokens, labels)
    our_loss.backward()
    torch.testing.assert_close(our_loss, loss.detach(), rtol=1e-5, atol=0)
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        error = (gradients[name].grad - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4, f"{name}: {error}"


@torch.inference_mode()
@pytest.mark.parametrize("variant", [*families.VARIANTS, "SmolLM2-135M-Instruct"])
def test_bf16_is_as_near_to_fp32_as_that_of_transformers(variant, tmp_path):
    """Two correct programs round bf16 in other places, so that neither is the other's reference; fp32 is of both."""
    directory = SMOLLM2
    if variant in families.VARIANTS:
        directory = families.write(variant, tmp_path)
    elif not (SMOLLM2 / "config.json").exists():
        pytest.skip(f"no {SMOLLM2}")
    exact = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.randint(0, exact.config.vocab_size, (16, 40), generator=torch.Generator().manual_seed(1))
    expected = exact(tokens).logits
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)(tokens).logits.float()
    ours = load_model(directory, "cpu", torch.bfloat16)(tokens).float()
    assert (ours - expected).norm() < 1.1 * (theirs - expected).norm()
