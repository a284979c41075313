"""What a training step costs, counted on a model without memory: parameters and FLOPs.

FLOPs are those of matrix products and attention, 2 for a multiplication with its addition, as is usual; norms, softmax
and other elementwise work are a small part of the time that no FLOP count tells.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from elo.common.errors import UserError
from elo.model.decoder import MLP, Attention, Block, CausalLM, RMSNorm, ScaledDotProductAttention
from elo.variants.bridge import Bridge
from elo.variants.lora import LoraLinear


class Call(NamedTuple):
    """A module at work: what a block's hidden states go through."""

    module: nn.Module
    inputs: tuple[Tensor, ...]  # on the meta device; modules with the same input are given the same tensor


# What these keep and compute is known here. A block with anything else in it is not planned.
CONTAINERS = (Block, Attention, MLP, nn.Identity)
KNOWN = (*CONTAINERS, nn.Linear, LoraLinear, Bridge, RMSNorm, ScaledDotProductAttention)
# Nor is a model with anything else beside its blocks.
ROOT = {"", "model", "model.layers", "model.embed_tokens", "model.norm", "lm_head", "whole_head", "loss"}


@lru_cache(maxsize=256)
def calls(block: Block, seq_len: int) -> list[Call]:
    """The modules of a block in the order of their work on one window, found by running it without memory.

    Raises UserError for a module that the planner does not know.
    """
    found: list[Call] = []
    hooks = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("lora_A", "lora_B")):
            continue  # a part of its LoraLinear
        if type(module) not in KNOWN:
            raise UserError(f"layer's {name}: a {type(module).__name__} is not known to the planner (elo/planning)")
        if type(module) not in CONTAINERS:
            hooks.append(module.register_forward_pre_hook(lambda module, inputs: found.append(Call(module, inputs))))
    config = block.config
    x = torch.empty(1, seq_len, config.hidden_size, device="meta")
    angles = torch.empty(seq_len, config.head_dim // 2, device="meta")
    mask = torch.empty(seq_len, seq_len, device="meta") if has_mask(block, seq_len) else None
    with torch.no_grad():
        block(x, angles, angles, mask)
    for hook in hooks:
        hook.remove()
    return found


def check_planned(model: CausalLM) -> None:
    """Raises UserError for what the planner does not know outside of the blocks, where it counts by name."""
    for name, module in model.named_modules():
        if name not in ROOT and not name.startswith("model.layers."):
            raise UserError(f"{name}: a {type(module).__name__} is not known to the planner (elo/planning)")
    if len({parameters(block) for block in model.model.layers}) > 1:
        raise UserError("layers of different sizes are not known to the planner (elo/planning)")


def has_mask(block: Block, seq_len: int) -> bool:
    """Whether its window cuts something off."""
    return block.sliding_window is not None and block.sliding_window < seq_len


@lru_cache(maxsize=1024)
def parameters(model: nn.Module, trained: bool = False) -> int:
    """How many there are, or are trained; a tied head is the embedding and counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def is_trained(*modules: nn.Module) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


@lru_cache
def outside_blocks(model: CausalLM) -> nn.ModuleList:
    """What is shared out apart from blocks."""
    of_validation = [model.whole_head] if hasattr(model, "whole_head") else []
    return nn.ModuleList([model.model.embed_tokens, model.model.norm, model.lm_head, *of_validation])


def lowest_trained(model: CausalLM) -> int:
    """The first block that there is a backward pass through: there is none below everything that is trained."""
    blocks = model.model.layers
    return 0 if is_trained(model.model.embed_tokens) else [is_trained(block) for block in blocks].index(True)


@dataclass(frozen=True)
class Flops:
    """Of a training step, a token. `attention` and `head` are parts of the others, `recomputed` is apart from them."""

    forward: float
    backward: float
    recomputed: float  # the forward pass again, of activation checkpointing
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recomputed


@lru_cache(maxsize=16)
def count_flops(model: CausalLM, seq_len: int, activation_checkpointing: bool = False) -> Flops:
    """Of a step on whole windows of `seq_len` tokens; which gradients there are follows from `requires_grad`.

    A frozen weight has no gradient of its own, and what comes before everything that is trained none at all. Causal
    attention is counted as the flash kernels compute it: half of the square of tokens, its scores once more in the
    backward pass. Where a sliding window cuts there is a mask, and the whole square is computed.
    """
    check_planned(model)
    forward = backward = recomputed = attention = 0.0
    needs_grad = is_trained(model.model.embed_tokens)  # the hidden states at this place
    for block in model.model.layers:
        block_forward = last = 0.0
        at: dict[int, bool] = {}  # whether an input needs a gradient: what has the same one is not side by side here
        for module, inputs in calls(block, seq_len):
            x_needs_grad = at.setdefault(id(inputs[0]), needs_grad)
            if isinstance(module, nn.Linear):
                product = last = 2 * module.weight.numel()
                block_forward += product
                backward += product * (x_needs_grad + module.weight.requires_grad)
                if isinstance(module, LoraLinear):
                    a, b = 2 * module.lora_A.weight.numel(), 2 * module.lora_B.weight.numel()
                    block_forward, last = block_forward + a + b, 0
                    backward += a * (x_needs_grad + 1) + 2 * b
            elif isinstance(module, ScaledDotProductAttention):
                queries, mask = inputs[0], inputs[3]
                keys = (seq_len + 1) / 2 if mask is None else seq_len
                product = 2 * queries[:, :, 0].numel() * keys
                block_forward += 2 * product
                backward += 5 * product * needs_grad
                attention += (2 + (2 * activation_checkpointing + 5) * needs_grad) * product
            needs_grad = needs_grad or is_trained(module)
        forward += block_forward
        if activation_checkpointing and needs_grad:
            # Recomputing ends with the last tensor that the backward pass needs: the last product is not one.
            recomputed += block_forward - last
    head = 2 * model.lm_head.weight.numel()
    head_backward = head * (needs_grad + model.lm_head.weight.requires_grad)
    return Flops(forward + head, backward + head_backward, recomputed, attention, head + head_backward)
