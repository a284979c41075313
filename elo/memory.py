"""The bytes that a training step holds at its highest point in each process, counted on a model without memory.

It follows `elo.distributed` (fully_shard: trained weights in fp32 shards, frozen ones in the dtype of computation; a
block's weights gathered while it is at work, the next one's on their way; gradients reduced in fp32), `elo.loss` (its
tiles, and the gradient of a trained head in fp32) and what autograd keeps of `elo.model` without torch.compile, which
keeps less.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import ceil

from torch import nn

from elo import loss
from elo.costs import is_trained, parameters
from elo.distributed import DTYPES
from elo.lora import LoraLinear
from elo.loss import even_chunk
from elo.model import Block, CausalLM

FP32 = 4  # bytes of trained weights, reduced gradients, optimizer state, softmax and loss


@dataclass(frozen=True)
class Setup:
    """The options of a run that decide on its memory."""

    tokens: int  # at a time in a process: windows of a micro-batch times their length
    micro_batches: int = 1  # a step
    shard: int = 1  # processes that hold the model together
    dtype: str = "bf16"
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    optimizer_in_backward: bool = False
    device: str = "cuda"

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Bytes:
    """What one process holds at a moment of a step."""

    moment: str
    weights: int  # shards of them
    optimizer: int
    gradients: int  # shards of them, and on their way to them
    gathered: int  # whole weights
    activations: int
    loss: int  # its buffers, the gradients of head and hidden states
    host: int = 0  # of weights, gradients and optimizer, with --cpu-offload

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self)[1:-1])


def peak_memory(model: CausalLM, setup: Setup) -> Bytes:
    """The highest moment of a step after the first one, when the optimizer has its state. model: see `costs.outline`."""
    return max(moments(model, setup), key=lambda moment: moment.total)


def moments(model: CausalLM, setup: Setup) -> Iterator[Bytes]:
    """The moments among which the highest one is."""
    config, blocks, size, tokens = model.config, model.model.layers, setup.itemsize, setup.tokens
    hidden = size * config.hidden_size * tokens
    root = [model.model.embed_tokens, model.model.norm, model.lm_head]
    head_is_trained = model.lm_head.weight.requires_grad
    head_gradient = size * model.lm_head.weight.numel() * head_is_trained
    root_weights = sum({id(p): size * p.numel() for module in root for p in module.parameters()}.values())

    def moment(
        name: str,
        gradients: int = 0,
        done: int = 0,
        gathered: int = root_weights,
        activations: int = 0,
        loss: int = 0,
    ) -> Bytes:
        """`gradients`: whole ones and buffers; `done`: bytes of shards that are complete."""
        held = sharded_gradients if setup.micro_batches > 1 else 0 if setup.optimizer_in_backward else done
        state = (weights, optimizer, held)
        if setup.cpu_offload:
            return Bytes(name, 0, 0, gradients, gathered, activations, loss, sum(state))
        return Bytes(name, weights, optimizer, gradients + held, gathered, activations, loss)

    weights = sum(shard_bytes(p, setup.shard, FP32 if p.requires_grad else size) for p in model.parameters())
    sharded_gradients = trained_shards(model, setup.shard)
    optimizer = 2 * sharded_gradients

    # Forward pass and loss: all activations are there. Of the last block the buffer of its gathering still is.
    kept = [kept_activations(block, setup) for block in blocks]
    ahead = size * parameters(blocks[-1]) if setup.shard > 1 else 0
    normed = norm_bytes(model.model.norm, setup)
    yield moment(
        "loss",
        gathered=root_weights + ahead,
        activations=sum(kept) + normed + hidden,
        loss=hidden + loss_buffers(model, setup),
    )
    if head_is_trained:
        whole = model.lm_head.weight.numel()
        scaled = 2 * FP32 * whole + (head_gradient if size != FP32 else 0)
        yield moment(
            "gradient of the head",
            gathered=root_weights + ahead,
            activations=sum(kept) + normed,
            loss=2 * hidden + scaled,
        )

    # Backward pass, block by block.
    waiting = done = 0  # the buffer of the gradients that are being reduced; shards of gradients
    for number in reversed(range(len(blocks))):
        block = blocks[number]
        trained = parameters(block, trained=True)
        gathered = root_weights + size * parameters(block)
        gathered += size * parameters(blocks[number - 1]) if setup.shard > 1 and number else 0
        before = sum(kept[:number])
        at_work = kept[number]
        if setup.activation_checkpointing:
            at_work += block_activations(block, setup)
        name = f"backward pass of block {number + 1}"
        yield moment(
            name,
            gradients=waiting + size * parameters(block.mlp.down_proj, trained=True),
            done=done,
            gathered=gathered,
            # The gradients of the block's output, of the two products in the MLP, and of their product.
            activations=before + at_work + hidden + 2 * size * config.intermediate_size * tokens,
            loss=head_gradient,
        )
        yield moment(
            name + ", its end",
            gradients=waiting + size * trained,
            done=done,
            gathered=gathered,
            activations=before + 4 * hidden,
            loss=head_gradient,
        )
        whole, shard = FP32 * trained, trained_shards(block, setup.shard)
        yield moment(
            f"reduction of block {number + 1}",
            gradients=whole + max(size * trained, shard),
            done=done,
            gathered=gathered - size * parameters(block),
            activations=before + hidden,
            loss=head_gradient,
        )
        waiting, done = whole, done + shard

    if is_trained(*root):
        trained = root_weights // size
        whole, shard = FP32 * trained, sharded_gradients - done
        both = head_gradient + size * model.model.embed_tokens.weight.numel()
        yield moment("gradient of the embedding", gradients=waiting + both, done=done, activations=hidden)
        yield moment(
            "reduction of embedding and head", gradients=whole + max(root_weights, shard), done=done, gathered=0
        )
    yield moment("optimizer", done=sharded_gradients, gathered=0 if is_trained(*root) else root_weights)


def shard_bytes(parameter: nn.Parameter, shard: int, itemsize: int) -> int:
    """Rows are dealt out, so that the first process may have one more of them than others."""
    return itemsize * ceil(parameter.shape[0] / shard) * parameter[0].numel()


def trained_shards(module: nn.Module, shard: int) -> int:
    return sum(shard_bytes(p, shard, FP32) for p in module.parameters() if p.requires_grad)


def kept_activations(block: Block, setup: Setup) -> int:
    """From the forward pass for the backward pass: its input alone where the block is recomputed."""
    if setup.activation_checkpointing:
        return setup.itemsize * block.mlp.down_proj.out_features * setup.tokens
    return block_activations(block, setup)


def block_activations(block: Block, setup: Setup) -> int:
    """All that autograd keeps of a block."""
    attention, mlp, size = block.self_attn, block.mlp, setup.itemsize
    queries, keys, inner = (m.out_features for m in (attention.q_proj, attention.k_proj, mlp.gate_proj))
    # A weight's gradient needs the input; what has the same input keeps it once.
    inputs = [
        linear.in_features
        for linear in (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj)
        if linear.weight.requires_grad or isinstance(linear, LoraLinear)
    ]
    thin = [m.lora_A.out_features for m in block.modules() if isinstance(m, LoraLinear)]
    # Queries, keys, values; gate, its SiLU, up. The result of attention is o_proj's input, on a CPU a copy of it.
    elements = sum(inputs) + sum(thin) + queries + 2 * keys + 3 * inner
    elements += queries if setup.device == "cpu" or not attention.o_proj.weight.requires_grad else 0
    normalizer = FP32 * queries // attention.head_dim  # of softmax, a number a head
    norms = norm_bytes(block.input_layernorm, setup) + norm_bytes(block.post_attention_layernorm, setup)
    return (size * elements + normalizer) * setup.tokens + norms


def norm_bytes(norm: nn.Module, setup: Setup) -> int:
    """Its input. A CPU has no operator for it and keeps that in fp32, and what the weight is multiplied with."""
    if setup.device == "cuda":
        return setup.itemsize * norm.weight.numel() * setup.tokens
    return FP32 * norm.weight.numel() * (1 + norm.weight.requires_grad) * setup.tokens


def loss_buffers(model: CausalLM, setup: Setup) -> int:
    """Of `loss.linear_cross_entropy` in its forward pass, without the gradient of the hidden states."""
    vocabulary, width = model.lm_head.weight.shape
    size, tokens, device = setup.itemsize, setup.tokens, setup.device
    # Products that are added up in fp32 come into being apart, but for fp32 on a GPU: `linear.add_matmul`.
    product = size if size != FP32 or device == "cpu" else 0
    if not model.lm_head.weight.requires_grad:
        rows = even_chunk(tokens, loss.TILE_ROWS[device])
        columns = even_chunk(vocabulary, loss.TILE_BYTES[device] // (rows * size), multiple=64)
        tile = rows * columns * (FP32 if size == FP32 else FP32 + size) + rows * width * product
        return rows * width * (size + FP32) + max(tile, rows * width * 2 * FP32)
    rows = even_chunk(tokens, loss.CHUNK_BYTES[device] // (vocabulary * size))
    block = even_chunk(rows, loss.BLOCK_BYTES[device] // (vocabulary * FP32)) if size != FP32 else 0
    work = max(block * vocabulary * FP32, vocabulary * width * product)
    return vocabulary * width * FP32 + rows * vocabulary * size + work
