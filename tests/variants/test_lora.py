"""LoRA in the model: peft's logits, gradients, loss curve and initialization."""

from contextlib import contextmanager

import families
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from elo.model.checkpoint import Checkpoint
from elo.model.decoder import build
from elo.runs.processes import process_group
from elo.runs.sharding import ParallelOptions, parallelize
from elo.variants import lora
from elo.variants.lora import LoraOptions

OPTIONS = LoraOptions(lora_rank=4, lora_alpha=12.0)
TOKENS = torch.randint(0, 300, (3, 41), generator=torch.Generator().manual_seed(0))


@contextmanager
def ours(base, options=OPTIONS, seed=0):
    model = build(base.config)
    lora.attach(model, options)
    with process_group() as world:
        parallelize(model, world, ParallelOptions("fp32", compile=False))
        base.load_into(model, lora.unadapted_name)
        lora.initialize(model, seed)
        yield model


@pytest.fixture
def small(request, tmp_path):
    return Checkpoint(families.write(request.param, tmp_path / "base"))


def peft_model(base, options=OPTIONS):
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    targets = list(options.lora_target_modules) or "all-linear"
    config = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=targets)
    return get_peft_model(model, config)


def adapters(model):
    """Of either side, by the name in the checkpoint."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def local(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def copy(source, destination):
    there = adapters(destination)
    assert there.keys() == adapters(source).keys()
    for name, parameter in adapters(source).items():
        value = local(parameter)
        (there[name].to_local() if hasattr(there[name], "to_local") else there[name]).copy_(value)


def loss(model, tokens=TOKENS):
    labels = tokens[:, 1:].contiguous()
    if isinstance(model, PeftModel):
        return model(input_ids=tokens[:, :-1], shift_labels=labels, labels=labels, use_cache=False).loss
    return model(tokens[:, :-1].contiguous(), labels) / labels.numel()


CASES = [
    *((variant, OPTIONS) for variant in families.ONE_EACH),
    ("mistral-v0.1", LoraOptions(lora_rank=2, lora_target_modules=("q_proj", "v_proj"))),
    ("qwen2", OPTIONS),
    ("qwen2.5-tied", LoraOptions(lora_rank=16, lora_alpha=8.0, lora_target_modules=("down_proj",))),
]


@pytest.mark.parametrize(("small", "options"), CASES, indirect=["small"], ids=str)
def test_logits_gradients_and_loss_curve_are_those_of_peft(small, options):
    theirs = peft_model(small, options)
    with ours(small, options) as mine:
        with torch.no_grad():  # an adapter that does something
            for parameter in adapters(theirs).values():
                parameter.normal_(0, 0.1)
        copy(theirs, mine)
        torch.testing.assert_close(mine(TOKENS), theirs(TOKENS, use_cache=False).logits, atol=2e-5, rtol=1e-5)

        trained = [list(adapters(model).values()) for model in (mine, theirs)]
        optimizers = [torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.1) for parameters in trained]
        curves = ([], [])
        for step in range(20):
            for model, curve in zip((mine, theirs), curves, strict=True):
                value = loss(model, TOKENS.roll(step, 0) + step % 5)
                value.backward()
                curve.append(value.item())
            if step == 0:
                for name, parameter in adapters(theirs).items():
                    gradient = local(adapters(mine)[name].grad)
                    torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert curves[0] == pytest.approx(curves[1], rel=1e-4)
        assert curves[0][-1] < curves[0][0]


def test_compiled_blocks_share_their_graphs(tmp_path):
    """On the backend that compiles fast."""
    base = Checkpoint(families.write("llama3", tmp_path))
    values = []
    for compiled in (False, True):
        with ours(base) as model:
            if compiled:
                torch._dynamo.reset()
                counters.clear()
                for block in model.model.layers:
                    block.compile(fullgraph=True, backend="aot_eager")
            value = loss(model)
            value.backward()
            values.append([value.item()] + [local(p.grad).norm().item() for p in adapters(model).values()])
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert counters["stats"]["unique_graphs"] <= 2


def test_initialization_is_peft_s_and_the_seed_s(tmp_path):
    base = Checkpoint(families.write("llama3", tmp_path))
    seeds = []
    for seed in (0, 0, 1):
        with ours(base, seed=seed) as model:
            seeds.append({name: local(p).clone() for name, p in adapters(model).items()})
    first = next(iter(seeds[0]))
    assert torch.equal(seeds[0][first], seeds[1][first])
    assert not torch.equal(seeds[0][first], seeds[2][first])
    for name, parameter in adapters(peft_model(base)).items():
        value = seeds[0][name]
        if "lora_B" in name:
            assert not value.any()
            assert not parameter.any()
        else:
            assert value.abs().max() < value.shape[1] ** -0.5 * 1.0001
            assert value.std().item() == pytest.approx(parameter.std().item(), rel=0.15)


def test_gradients_are_those_of_plain_autograd():
    torch.manual_seed(0)
    linear = nn.Linear(24, 20)
    layer = lora.LoraLinear(linear, LoraOptions(4, 12.0))
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(3, 10, 24, requires_grad=True)
    weights = [x, layer.lora_A.weight, layer.lora_B.weight]
    expected = F.linear(x, linear.weight, linear.bias) + 12 / 4 * x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    torch.testing.assert_close(layer(x), expected)
    gradient = torch.randn_like(expected)
    for ours_, theirs in zip(
        torch.autograd.grad(layer(x), weights, gradient), torch.autograd.grad(expected, weights, gradient), strict=True
    ):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-4)
