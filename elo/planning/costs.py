"""What a training step costs, counted on a model without memory: parameters and FLOPs.

FLOPs are those of matrix products and attention, 2 for a multiplication with its addition, as is usual; norms, softmax
and other elementwise work are a small part of the time that no FLOP count tells.
"""

from dataclasses import dataclass

from torch import nn

from elo.model.config import ModelConfig
from elo.model.decoder import Block, CausalLM, build
from elo.slicing import detach, freeze_all_but_layers
from elo.variants import lora
from elo.variants.lora import LoraLinear, LoraOptions

METHODS = ("elo", "full", "lora")


def outline(
    config: ModelConfig, method: str, layers: tuple[int, ...] | None = None, adapters: LoraOptions | None = None
) -> CausalLM:
    """The model that a method computes, on the meta device, with requires_grad where it trains.

    config: the base model's; layers: those of method elo, from 1 (default: the first and the last).
    """
    if method == "elo":
        model = build(detach(config, layers or tuple(sorted({1, config.num_hidden_layers}))))
        freeze_all_but_layers(model)
        return model
    model = build(config)
    if method == "lora":
        lora.attach(model, adapters or LoraOptions(), seed=0)
    return model


def parameters(model: nn.Module, trained: bool = False) -> int:
    """How many there are, or are trained; a tied head is the embedding and counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def steps(block: Block) -> list[tuple[nn.Module, ...]]:
    """What a block's hidden states go through in turn, side by side what has the same input; attention follows q_proj,
    k_proj and v_proj."""
    attention, mlp = block.self_attn, block.mlp
    return [
        (block.input_layernorm,),
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (block.post_attention_layernorm,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    ]


def is_trained(*modules: nn.Module) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


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


def count_flops(model: CausalLM, seq_len: int, activation_checkpointing: bool = False) -> Flops:
    """Of a step on whole windows of `seq_len` tokens; which gradients there are follows from `requires_grad`.

    A frozen weight has no gradient of its own, and what comes before everything that is trained none at all. Causal
    attention is counted as the flash kernels compute it: half of the square of tokens, its scores once more in the
    backward pass. Where a sliding window cuts there is a mask, and the whole square is computed.
    """
    config = model.config
    forward = backward = recomputed = attention = 0.0
    needs_grad = is_trained(model.model.embed_tokens)  # the hidden states at this place
    for block in model.model.layers:
        block_forward = 0.0
        for modules in steps(block):
            for linear in modules:
                if not isinstance(linear, nn.Linear):
                    continue
                product = 2 * linear.weight.numel()
                block_forward += product
                backward += product * (needs_grad + linear.weight.requires_grad)
                if isinstance(linear, LoraLinear):
                    a, b = 2 * linear.lora_A.weight.numel(), 2 * linear.lora_B.weight.numel()
                    block_forward += a + b
                    backward += a * (needs_grad + 1) + 2 * b
            needs_grad = needs_grad or is_trained(*modules)
            if block.self_attn.q_proj in modules:
                cuts = block.sliding_window is not None and block.sliding_window < seq_len
                keys = seq_len if cuts else (seq_len + 1) / 2
                product = 2 * config.num_attention_heads * config.head_dim * keys
                block_forward += 2 * product
                backward += 5 * product * needs_grad
                attention += (2 * (1 + activation_checkpointing) + 5 * needs_grad) * product
        forward += block_forward
        if activation_checkpointing:
            # Recomputing ends with the last tensor that the backward pass needs: the product of down_proj is not one.
            last = block.mlp.down_proj
            recomputed += block_forward - (0 if isinstance(last, LoraLinear) else 2 * last.weight.numel())
    head = 2 * model.lm_head.weight.numel()
    head_backward = head * (needs_grad + model.lm_head.weight.requires_grad)
    return Flops(forward + head, backward + head_backward, recomputed, attention, head + head_backward)


def flops_per_token(
    config: ModelConfig,
    method: str,
    seq_len: int,
    layers: tuple[int, ...] | None = None,
    rank: int = LoraOptions.lora_rank,
    activation_checkpointing: bool = False,
) -> float:
    """FLOPs of a training step (forward, backward, recomputation), a token.

    config: the base model's; method: elo, full or lora; layers: those of method elo, from 1 (default: the first and
    the last); rank: of method lora, on all linear layers of the blocks.
    """
    model = outline(config, method, layers, LoraOptions(lora_rank=rank))
    return count_flops(model, seq_len, activation_checkpointing).total
