"""How long a step takes: a prediction, by what its parts compute and move.

Products take their FLOPs at the assumed utilization, or the time in which their weights are read. Collectives and
--cpu-offload move weights and gradients meanwhile, and cost what they take longer, and copies in a GPU's memory.
"""

from dataclasses import astuple, dataclass

from elo.common.chunks import even_chunk
from elo.model.decoder import CausalLM
from elo.planning.costs import Flops, is_trained, lowest_trained, outside_blocks, parameters
from elo.planning.memory import FP32
from elo.planning.run import Run

GB = 0.8e9  # bytes that a GB/s of memory or links moves in a second: assumed, and about what NCCL reaches on NVLink
HOST_MEMORY = 40e9  # bytes/s that AdamW of --cpu-offload moves for each GPU: assumed, half of a DGX H100's share
# Bytes a parameter: clipping reads its gradient twice and writes it, AdamW reads 4 numbers and writes 3.
ADAMW = 10 * FP32


@dataclass(frozen=True)
class Step:
    """Seconds of a step in the GPU that has the most to do, each part beside the others."""

    products: float  # and attention
    copies: float  # in a GPU's memory, of gathered weights and of gradients that are reduced
    waiting: float  # for other GPUs and the host
    optimizer: float

    @property
    def seconds(self) -> float:
        return sum(astuple(self))


def predict(model: CausalLM, run: Run, flops: Flops) -> Step:
    """model: see `methods.make`; flops: see `count_flops`."""
    setup, blocks, size = run.setup, list(model.model.layers), run.setup.itemsize
    rate, memory = run.kind.tflops * 1e12 * run.utilization, run.kind.bandwidth * GB
    # A product computes as many FLOPs for a token as its weights have bytes in bf16, which are read once.
    tokens = max(even_chunk(run.windows, run.micro_batch) * run.seq_len, size / 2 * rate / memory)

    # What is gathered and reduced in the passes of a micro-batch. A frozen embedding and head stay where they are.
    whole = setup.shard == 1 and not run.cpu_offload
    root = outside_blocks(model)
    forward = [*blocks, *([root] if is_trained(root) else [])]
    backward = [] if run.gather_once else blocks[lowest_trained(model) :]
    passes = ((flops.forward, forward, []), (flops.backward + flops.recomputed, backward, forward))
    times = 1 if run.gather_once else setup.micro_batches  # a step
    copies = waiting = 0.0
    for computed, gathered, reduced in passes:
        weights = sum(parameters(module, trained=whole) for module in gathered)
        trained = sum(parameters(module, trained=True) for module in gathered)
        gradients = sum(parameters(module, trained=True) for module in reduced)
        # Written by the collective, read, and written where they belong; gradients are read, written in fp32, and read.
        copied = (3 * size * weights + (size + 2 * FP32) * gradients) / memory
        moved = collectives(run, size * weights, FP32 * gradients)
        if run.cpu_offload:
            on_host = size * (weights - trained) + FP32 * (trained + gradients)
            moved += on_host / setup.shard / (run.kind.host * GB)
        copies += times * copied
        waiting += times * max(0.0, moved - computed * tokens / rate - copied)
    trained = parameters(model, trained=True)
    if times < setup.micro_batches:  # whole gradients are added up in fp32, and written once more to be reduced
        copies += trained * ((setup.micro_batches - times) * (size + 2 * FP32) + 3 * FP32) / memory
    optimizer = ADAMW * trained / setup.shard / memory
    if run.cpu_offload:  # where the gradients of micro-batches are added up too
        optimizer = (ADAMW + 3 * FP32 * (times - 1)) * trained / setup.shard / HOST_MEMORY
    return Step(flops.total * tokens * setup.micro_batches / rate, copies, waiting, optimizer)


def collectives(run: Run, gathered: float, reduced: float) -> float:
    """Seconds for so many bytes of whole weights and gradients, in rings: within a node over its links, and between
    nodes over the network cards of all GPUs of a node at once. Replicas then add up shards of gradients."""
    shard, gpu = run.setup.shard, run.kind
    ring = gpu.link if shard <= run.gpus_per_node else min(gpu.link, run.gpus_per_node * gpu.network)
    between = gpu.link if run.gpus <= run.gpus_per_node else min(gpu.link, gpu.network)
    seconds = (gathered + reduced) * (1 - 1 / shard) / (ring * GB)
    return seconds + 2 * reduced / shard * (1 - shard / run.gpus) / (between * GB)
