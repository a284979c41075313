"""`elo.planning` says beforehand what a run takes; here it is held against runs."""

import math

import families
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from elo import linear
from elo.config import ModelConfig
from elo.costs import METHODS, count_flops, outline
from elo.lora import LoraOptions
from elo.planning import flops_per_token

SEQ_LEN = 32


def family(variant, **changes):
    architecture, config = families.VARIANTS[variant]()
    return ModelConfig.from_json({**config.to_dict(), "architectures": [architecture.__name__], **changes})


# ---- FLOPs, against torch's count of real steps

# The counter does not know oneDNN's products, nor attention on a CPU, nor products that are added in place.
FORMULAS = {
    torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0],
    torch.ops.aten.addmm_: lambda total, a, b, *_, **__: 2 * math.prod(a) * b[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def counted(model):
    """torch's FLOPs of a step, a token: (attention, everything else)."""
    model.to_empty(device="cpu").tie_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(0, 300, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(tokens, tokens).backward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "dot_product" in str(op))
    return attention / tokens.numel(), (sum(counts.values()) - attention) / tokens.numel()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "variant", ["llama2", "llama3", "smollm2", "mistral-v0.1", "mistral-nemo", "qwen2", "qwen2.5-tied"]
)
def test_flops(variant, method):
    model = outline(family(variant), method)
    planned = count_flops(model, SEQ_LEN)
    attention, rest = counted(model)
    assert planned.total - planned.attention == pytest.approx(rest, rel=1e-9)
    # torch counts the whole square of tokens, also where only the past is computed: (n + 1) / 2 of its n columns.
    share = 1 if variant == "mistral-v0.1" else (SEQ_LEN + 1) / (2 * SEQ_LEN)  # there a window cuts: see count_flops
    assert planned.attention == pytest.approx(attention * share, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_flops_of_activation_checkpointing(method, monkeypatch):
    # F.linear, as on a GPU: the product of our own function for CPUs is recomputed although nothing needs it.
    monkeypatch.setattr(linear, "ONEDNN", False)
    model = outline(family("llama3"), method)
    planned = count_flops(model, SEQ_LEN, activation_checkpointing=True)
    for block in model.model.layers:
        block.activation_checkpointing = True
    attention, rest = counted(model)
    assert planned.total - planned.attention == pytest.approx(rest, rel=1e-9)
    assert planned.attention == pytest.approx(attention * (SEQ_LEN + 1) / (2 * SEQ_LEN), rel=1e-9)
    assert planned.recomputed > 0


def test_flops_of_options():
    config = family("llama3")
    layer_and_head = [flops_per_token(config, "elo", SEQ_LEN, layers=layers) for layers in ((1,), (1, 4), (1, 2, 4))]
    assert layer_and_head[2] - layer_and_head[1] == layer_and_head[1] - layer_and_head[0] > 0
    thick = outline(config, "lora", adapters=LoraOptions(lora_rank=20))
    assert flops_per_token(config, "lora", SEQ_LEN, rank=20) == count_flops(thick, SEQ_LEN).total
    attention, rest = counted(thick)
    assert count_flops(thick, SEQ_LEN).total == pytest.approx(rest + attention * (SEQ_LEN + 1) / (2 * SEQ_LEN))
