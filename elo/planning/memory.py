"""The bytes that a training step holds at its highest point in each process, counted on a model without memory.

It follows `elo.runs.sharding` (fully_shard: trained weights in fp32 shards, frozen ones in the dtype of computation; a
block's weights gathered while it is at work, the next one's on their way; gradients reduced in fp32; with --gather-once
all weights gathered, and gradients whole in fp32 until the last micro-batch reduces them), `elo.model.loss`
(its tiles, and the gradient of a trained head in fp32) and what autograd keeps of `elo.model.decoder` without
torch.compile, which keeps less.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import ceil

from torch import nn

from elo.common.chunks import even_chunk
from elo.cpu import loss as cpu_loss
from elo.cpu.linear import ONEDNN
from elo.model import loss
from elo.model.decoder import MLP, Block, CausalLM, RMSNorm, ScaledDotProductAttention
from elo.planning.costs import calls, has_mask, is_trained, lowest_trained, outside_blocks, parameters
from elo.runs.devices import DTYPES
from elo.variants.lora import LoraLinear

FP32 = 4  # bytes of trained weights, reduced gradients, optimizer state, softmax and loss


@dataclass(frozen=True)
class Setup:
    """The options of a run that decide on its memory."""

    tokens: int  # at a time in a process: windows of a micro-batch times their length
    seq_len: int  # of a window
    micro_batches: int = 1  # a step
    shard: int = 1  # processes that hold the model together
    dtype: str = "bf16"
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    optimizer_in_backward: bool = False
    gather_once: bool = False
    device: str = "cuda"
    multiprocessors: int = 132  # of a GPU; the default is an H100's

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Bytes:
    """What one process holds at a moment of a step."""

    moment: str
    weights: int  # shards of them, and buffers
    optimizer: int
    gradients: int  # shards of them, and on their way to them
    gathered: int  # whole weights
    activations: int
    loss: int  # its buffers, the gradients of head and hidden states
    host: int = 0  # of weights, gradients and optimizer, with --cpu-offload

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self)[1:-1])


def planned_memory(model: CausalLM, setup: Setup) -> Bytes:
    """The highest moment of a step, from the second one on: the first makes the optimizer's state.

    model: see `methods.make`. The host's highest moment may be another one.
    """
    found = list(moments(model, setup))
    return replace(max(found, key=lambda moment: moment.total), host=max(moment.host for moment in found))


def moments(model: CausalLM, setup: Setup) -> Iterator[Bytes]:
    """The moments among which the highest one is."""
    config, size, tokens = model.config, setup.itemsize, setup.tokens
    blocks = model.model.layers  # all have weights of the same sizes
    lowest, root = lowest_trained(model), outside_blocks(model)
    root_is_trained, head_is_trained = is_trained(root), is_trained(model.lm_head)
    # What fully_shard computes with is a copy, except for frozen weights that a process has whole.
    whole = setup.shard == 1 and not setup.cpu_offload
    root_weights, *block_weights = (size * parameters(module, trained=whole) for module in (root, *blocks))
    hidden = size * config.hidden_size * tokens
    head, embedding = model.lm_head.weight.numel(), model.model.embed_tokens.weight.numel()

    weights = sum(sharded(module, setup) for module in (root, *blocks))
    unsharded = size * sum(buffer.numel() for buffer in model.buffers())  # each process has all of them
    root_shard, *block_shards = (sharded(module, setup, trained=True) for module in (root, *blocks))
    all_shards = root_shard + sum(block_shards)

    # The sum over micro-batches: of whole gradients until the last one's backward pass, or of shards of them.
    is_whole, is_sharded = ((setup.micro_batches > 1) & (setup.gather_once == once) for once in (True, False))
    whole_root, *whole_blocks = (is_whole * FP32 * parameters(module, trained=True) for module in (root, *blocks))
    in_place = is_whole and size == FP32  # a gradient goes as soon as it is added
    head_gradient = FP32 * head * (head_is_trained and not is_whole)

    def moment(
        name: str, gathered: int, gradients: int = 0, done: int = 0, activations: int = 0, loss: int = 0
    ) -> Bytes:
        """`gradients`: whole ones and buffers; `done`: the shards that are complete."""
        held = all_shards if is_sharded else 0 if setup.optimizer_in_backward else done
        shards = weights, 2 * all_shards, held
        if setup.cpu_offload:
            return Bytes(name, unsharded, 0, gradients, gathered, activations, loss, sum(shards))
        return Bytes(name, weights + unsharded, 2 * all_shards, gradients + held, gathered, activations, loss)

    # Forward pass and loss: all activations are there. The buffer in which the last block was gathered still is.
    at_work = [block_activations(block, setup) if number >= lowest else 0 for number, block in enumerate(blocks)]
    # Of each block until its backward pass.
    kept = [min(hidden, size) if setup.activation_checkpointing else size for size in at_work]
    masks = mask_bytes(model, setup)
    ahead = block_weights[0] if setup.shard > 1 and not setup.gather_once else 0
    of_norm = replace(setup, dtype="fp32") if is_trained(model.model.norm) else setup
    activations = masks + sum(kept) + norm_bytes(model.model.norm, config.hidden_size * tokens, of_norm)
    buffers = hidden + loss_buffers(model, setup)
    gathered = root_weights + (sum(block_weights) if setup.gather_once else ahead)
    whole_gradients = whole_root + sum(whole_blocks)
    yield moment("loss", gathered, whole_gradients, activations=activations + hidden, loss=buffers)
    if head_is_trained:
        buffers = 2 * hidden + FP32 * head
        yield moment("gradient of the head", gathered, whole_gradients, activations=activations, loss=buffers)

    # Backward pass, block by block, the next one gathered meanwhile.
    waiting = done = 0  # the buffer of gradients that are being reduced; the shards that are complete
    for number in reversed(range(lowest, len(blocks))):
        block, block_shard = blocks[number], block_shards[number]
        trained = parameters(block, trained=True)
        last = [call.module for call in calls(block, setup.seq_len) if isinstance(call.module, nn.Linear)][-1]
        if not setup.gather_once:
            gathered = root_weights + block_weights[number] + (ahead if number else 0)
        before, name = masks + sum(kept[:number]), f"backward pass of block {number + 1}"
        recomputed = at_work[number] if setup.activation_checkpointing else 0
        # The gradients of the block's output, of the two factors in the MLP, and of their product's weight.
        inner = hidden + 2 * size * last.in_features * tokens
        gradients = whole_gradients + waiting + size * parameters(last, trained=True)
        yield moment(name, gathered, gradients, done, before + kept[number] + recomputed + inner, head_gradient)
        if setup.device == "cuda":
            gradients = whole_gradients + waiting + size * parameters(block.mlp, trained=True) * (not in_place)
            inner = hidden + attention_work(block, setup) + (hidden if setup.activation_checkpointing else 0)
            inner += block_activations(block, setup, up_to_attention=True)
            yield moment(f"attention in the {name}", gathered, gradients, done, before + inner, head_gradient)
        gradients = whole_gradients + waiting + size * trained * (not in_place)
        yield moment(f"end of the {name}", gathered, gradients, done, before + 4 * hidden, head_gradient)
        gathered -= block_weights[number]
        whole_gradients -= whole_blocks[number]
        gradients = whole_gradients + FP32 * trained + max(whole_blocks[number] or size * trained, block_shard)
        yield moment(f"reduction after the {name}", gathered, gradients, done, before + hidden, head_gradient)
        waiting, done = FP32 * trained or waiting, done + block_shard

    if root_is_trained:
        in_fp32 = 0 if size == FP32 else FP32 * config.hidden_size * tokens
        gradients = whole_root + waiting + FP32 * embedding
        yield moment("gradient of the embedding", root_weights, gradients, done, hidden + in_fp32, head_gradient)
        gradients = 2 * FP32 * parameters(root)  # and as the collective takes them
        yield moment("reduction of the gradients of embedding and head", 0, gradients, done)
    yield moment("optimizer", 0 if root_is_trained else root_weights, done=all_shards)


def sharded(module: nn.Module, setup: Setup, trained: bool = False) -> int:
    """Bytes of a shard of the weights, or of the gradients of those that are trained. Rows are dealt out: the first
    process may have one more than others."""
    return sum(
        (FP32 if p.requires_grad else setup.itemsize) * ceil(p.shape[0] / setup.shard) * p[0].numel()
        for p in module.parameters()
        if p.requires_grad or not trained
    )


def block_activations(block: Block, setup: Setup, up_to_attention: bool = False) -> int:
    """All that autograd keeps of a block, without the mask, which is the same in many."""
    size, windows = setup.itemsize, setup.tokens // setup.seq_len
    total = 0
    after_attention = False
    counted: set[int] = set()  # what has the same input keeps it once
    for module, inputs in calls(block, setup.seq_len):
        x = inputs[0]
        if isinstance(module, RMSNorm):
            total += norm_bytes(module, x.numel(), setup)
        elif isinstance(module, ScaledDotProductAttention):
            _, k, v, mask = inputs
            on_cpu = setup.device == "cpu"
            copies = 1 if mask is None or on_cpu else x.shape[1] // k.shape[1]
            normalizer = 0 if mask is None and on_cpu else FP32 * x[..., 0].numel()  # of softmax, a number a query
            # Queries, keys, values and the result.
            total += size * (2 * x.numel() + copies * (k.numel() + v.numel())) + normalizer
            if up_to_attention:
                return windows * total
            after_attention = True
            continue
        elif id(x) not in counted and (module.weight.requires_grad or isinstance(module, LoraLinear)):
            # The result of attention lies as the product after it wants it, but on a CPU, which makes a copy.
            total += size * x.numel() * (setup.device == "cpu" or not after_attention)
            counted.add(id(x))
        if isinstance(module, LoraLinear):
            total += size * module.lora_A.out_features * setup.seq_len
        after_attention = False
    # The gate, its SiLU, and what passes through it.
    total += size * sum(3 * m.down_proj.in_features for m in block.modules() if isinstance(m, MLP)) * setup.seq_len
    return windows * total


def attention_work(block: Block, setup: Setup) -> int:
    """What attention's backward pass on CUDA holds beside what is kept for it.

    Gradients of its result, of queries, keys and values, of grouped ones also for each query head, and sums of the
    queries' gradients in fp32: one with a mask or in fp32, but of the flash kernel, to be deterministic, so many that
    every multiprocessor has one (`nsplits` of mha_bwd in torch's cuda/flash_attn/flash_api.cpp and FlashAttention-2).
    """
    q, k, _, mask = next(call.inputs for call in calls(block, setup.seq_len) if len(call.inputs) > 1)
    _, heads, seq_len, head_dim = q.shape
    windows, unit = setup.tokens // setup.seq_len, 32 if head_dim <= 128 else 64
    gradients = 4 * q.numel() + (2 * k.numel() if k.shape[1] < heads else 0)
    sums = ceil(setup.multiprocessors / (windows * heads)) if mask is None and setup.itemsize < FP32 else 1
    rows, columns = 128 * ceil(seq_len / 128), unit * ceil(head_dim / unit)
    return windows * (setup.itemsize * gradients + FP32 * heads * rows * (sums * columns + 1))


def mask_bytes(model: CausalLM, setup: Setup) -> int:
    """Of the sliding windows: one mask for each, whatever the number of layers."""
    cut = {block.sliding_window for block in model.model.layers if has_mask(block, setup.seq_len)}
    return len(cut) * setup.itemsize * setup.seq_len**2


def norm_bytes(norm: RMSNorm, elements: int, setup: Setup) -> int:
    """Its input and a number for each vector. A CPU has no operator for it: it keeps the input in fp32, and what the
    weight is multiplied with."""
    root_mean_squares = FP32 * elements // norm.weight.numel()
    if setup.device == "cuda":
        return setup.itemsize * elements + root_mean_squares
    return FP32 * elements * (1 + norm.weight.requires_grad) + root_mean_squares


def loss_buffers(model: CausalLM, setup: Setup) -> int:
    """Of `loss.LinearCrossEntropy` in its forward pass, without the gradient of the hidden states."""
    vocabulary, width = model.lm_head.weight.shape
    size, tokens, trained = setup.itemsize, setup.tokens, model.lm_head.weight.requires_grad
    is_rounded = size != FP32
    head_gradient = FP32 * vocabulary * width * trained
    if setup.device == "cuda":
        rows = loss.tile_rows(tokens, vocabulary * size, "cuda")
        logits = rows * vocabulary * size
        # Beside them a copy in fp32, which a compiled softmax has none of; later what they make of the head.
        return head_gradient + logits + max(FP32 * rows * vocabulary * is_rounded, size * rows * width)

    onednn = size == FP32 and ONEDNN  # it takes no transposed factor, but copies it

    def block(rows: int, columns: int) -> int:
        """Some rows of logits in fp32, where they are not so already."""
        return even_chunk(rows, cpu_loss.BLOCK_BYTES // (columns * FP32)) * columns * FP32 * is_rounded

    if not trained:
        rows = even_chunk(tokens, cpu_loss.TILE_ROWS)
        columns = even_chunk(vocabulary, cpu_loss.TILE_BYTES // (rows * size), multiple=64)
        tile = rows * columns * size
        earlier = tile if columns < vocabulary else 0  # a tile goes when the next one is there
        product = rows * width * (FP32 + size * is_rounded) + columns * width * FP32 * onednn
        work = tile + max(earlier, block(rows, columns), product)
        return rows * width * (size + FP32) + max(work, rows * width * 2 * FP32)
    rows = loss.tile_rows(tokens, vocabulary * size, "cpu")
    logits = rows * vocabulary * size
    # The head's gradient is summed of fp32 factors, those of a model in fp32 by oneDNN apart.
    product = FP32 * vocabulary * (width * onednn + rows * (is_rounded or ONEDNN))
    return head_gradient + logits + max(block(rows, vocabulary), product)
