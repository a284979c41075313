"""What the planner counts, FLOPs and parameters, against torch's count of real steps and published figures."""

from statistics import fmean

import families
import flops
import pytest
import torch
from planner import SEQ_LEN, family
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import planning_paper
from elo.common.errors import UserError
from elo.cpu import linear
from elo.methods import METHODS, make
from elo.planning.costs import count_flops, parameters
from elo.variants.lora import LoraOptions


def counted(model):
    """torch's FLOPs of a step, a token: (attention, everything else)."""
    model.to_empty(device="cpu").tie_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(0, 300, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False, custom_mapping=flops.FORMULAS) as counter:
        model(tokens, tokens).backward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "dot_product" in str(op))
    return attention / tokens.numel(), (sum(counts.values()) - attention) / tokens.numel()


@pytest.mark.parametrize("method", [*METHODS, "bridged"])
@pytest.mark.parametrize("variant", families.VARIANTS)
def test_flops(variant, method):
    config = family(variant)
    model = make(config, "elo", bridged=True).model if method == "bridged" else make(config, method).model
    planned = count_flops(model, SEQ_LEN)
    attention, rest = counted(model)
    assert planned.total - planned.attention == pytest.approx(rest, rel=1e-9)
    # torch counts the whole square of tokens, also where only the past is computed: (n + 1) / 2 of its n columns.
    # Where a window cuts there is a mask, and the whole is computed.
    shares = [1 if block.sliding_window else (SEQ_LEN + 1) / (2 * SEQ_LEN) for block in model.model.layers]
    assert planned.attention == pytest.approx(attention * fmean(shares), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_flops_of_activation_checkpointing(method, monkeypatch):
    # F.linear, as on a GPU: the product of our own function for CPUs is recomputed although nothing needs it.
    monkeypatch.setattr(linear, "ONEDNN", False)
    model = make(family("llama3"), method, (2, 4)).model  # nothing is recomputed below what is trained
    planned = count_flops(model, SEQ_LEN, activation_checkpointing=True)
    for block in model.model.layers:
        block.activation_checkpointing = True
    attention, rest = counted(model)
    assert planned.total - planned.attention == pytest.approx(rest, rel=1e-9)
    assert planned.attention == pytest.approx(attention * (SEQ_LEN + 1) / (2 * SEQ_LEN), rel=1e-9)
    assert planned.recomputed > 0


def test_flops_of_options():
    config = family("llama3")
    layer_and_head = [
        count_flops(make(config, "elo", layers).model, SEQ_LEN).total for layers in ((1,), (1, 4), (1, 2, 4))
    ]
    assert layer_and_head[2] - layer_and_head[1] == layer_and_head[1] - layer_and_head[0] > 0
    thick = make(config, "lora", options=LoraOptions(lora_rank=20)).model
    planned = count_flops(thick, SEQ_LEN).total
    attention, rest = counted(thick)
    assert planned == pytest.approx(rest + attention * (SEQ_LEN + 1) / (2 * SEQ_LEN))


@pytest.mark.parametrize("model", planning_paper.PUBLIC)
def test_parameters_are_those_published(model):
    assert parameters(make(planning_paper.config(model), "full").model) == planning_paper.PUBLIC[model][1]


def test_parameters_of_methods():
    config = planning_paper.config("Llama-3.1-8B")
    layer, vocabulary = 218_112_000, 128256 * 4096
    elo = make(config, "elo", (1, 16, 32)).model
    assert parameters(elo, trained=True) == 3 * layer
    assert parameters(elo) == 3 * layer + 2 * vocabulary + 4096
    lora = make(config, "lora", options=LoraOptions(lora_rank=16)).model
    widths = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)  # q, o; k, v; gate, up, down
    assert parameters(lora, trained=True) == 32 * 16 * widths


def test_a_module_that_is_not_known_is_refused():
    model = make(family("llama3"), "full").model
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    with pytest.raises(UserError, match="layer's mlp.act_fn: a GELU is not known to the planner"):
        count_flops(model, SEQ_LEN)
    model = make(family("llama3"), "full").model
    model.model.embed_norm = torch.nn.Identity()
    with pytest.raises(UserError, match="model.embed_norm: a Identity is not known to the planner"):
        count_flops(model, SEQ_LEN)
    model = make(family("llama3"), "full").model
    model.model.layers[2].mlp.down_proj = torch.nn.Linear(112, 48, bias=True, device="meta")
    with pytest.raises(UserError, match="layers of different sizes are not known"):
        count_flops(model, SEQ_LEN)
