"""What is planned: a stage with its options, on GPUs of a kind."""

from dataclasses import dataclass, field
from math import ceil
from typing import Any

from elo.common.chunks import even_chunk
from elo.planning.memory import Setup

GIB = 2**30
USABLE = 0.92  # of a GPU's memory; the rest is for CUDA, NCCL and the gaps between tensors: assumed, not measured


def described(unit: str, what: str) -> Any:
    """A field that an option changes."""
    return field(metadata={"unit": unit, "what": what})


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, and how it is built in."""

    memory: float = described("GIB", "as torch finds it")
    tflops: float = described("TFLOPS", "peak of products in --dtype, with fp32 sums and without sparsity")
    bandwidth: float = described("GB/S", "of its memory")
    link: float = described("GB/S", "to the other GPUs of its node, in one direction")  # NVLink, else PCIe
    host: float = described("GB/S", "to the host, in one direction")
    # As in NVIDIA's nodes; of single cards assumed.
    network: float = described("GB/S", "to other nodes, in one direction")
    multiprocessors: int = described("N", "of them")


# By NVIDIA's data sheets, which add up both directions of links: the SXM models, for bf16.
GPUS = {
    "A100-40GB": Gpu(39.4, 312, 1555, 300, 32, 25, 108),
    "A100-80GB": Gpu(79.2, 312, 2039, 300, 32, 25, 108),
    "H100": Gpu(79.1, 989, 3350, 450, 64, 50, 132),
    "H200": Gpu(139.7, 989, 4800, 450, 64, 50, 132),
    "B200": Gpu(178.3, 2250, 7700, 900, 64, 50, 148),
    "L40S": Gpu(44.4, 362, 864, 32, 32, 25, 142),
    "RTX-4090": Gpu(23.5, 165, 1008, 32, 32, 1.25, 128),
}


@dataclass(frozen=True)
class Run:
    """The fields are the options."""

    stage: str
    method: str
    gpu: str
    kind: Gpu
    gpus: int
    gpus_per_node: int
    shard: int | None
    seq_len: int
    batch_windows: int  # a step, over all GPUs; of sft conversations, taken to be as long as --seq-len
    micro_batch: int
    dtype: str
    utilization: float
    activation_checkpointing: bool
    cpu_offload: bool
    optimizer_in_backward: bool
    gather_once: bool
    tokens: float | None

    @property
    def name(self) -> str:
        return f"train.py --method {self.method}" if self.stage == "train" else f"{self.stage}.py"

    @property
    def amount(self) -> str:
        return f"{self.tokens / 1e9:,.2f} * 10^9 tokens" if self.tokens else "10^9 tokens"

    @property
    def peak(self) -> str:
        return f"{self.utilization:.0%} of {self.kind.tflops:g} TFLOP/s a GPU"

    @property
    def usable(self) -> int:
        """Bytes of a GPU."""
        return round(self.kind.memory * GIB * USABLE)

    @property
    def windows(self) -> int:
        """Of a step, in the GPU that has the most."""
        return ceil(self.batch_windows / self.gpus)

    @property
    def setup(self) -> Setup:
        same = {name: getattr(self, name) for name in Setup.__dataclass_fields__ if hasattr(self, name)}
        # Windows come in equal parts, conversations as many together as may be.
        most = min(self.micro_batch, self.windows)
        same["tokens"] = (most if self.stage == "sft" else even_chunk(self.windows, most)) * self.seq_len
        same |= {"shard": self.shard or self.gpus, "multiprocessors": self.kind.multiprocessors}
        return Setup(**same, micro_batches=ceil(self.windows / self.micro_batch))

    @property
    def settings(self) -> list[str]:
        """What decides on speed and memory alone, as options of the stage."""
        is_sft = self.stage == "sft"
        words = [
            f"--micro-batch-tokens {self.micro_batch * self.seq_len}" if is_sft else f"--micro-batch {self.micro_batch}"
        ]
        words += [f"--shard {self.shard}"] if self.shard not in (None, self.gpus) else []
        flags = ("activation_checkpointing", "cpu_offload", "gather_once")
        words += [f"--{name.replace('_', '-')}" for name in flags if getattr(self, name)]
        return words + ["--optimizer-in-backward --clip 0"] * self.optimizer_in_backward
