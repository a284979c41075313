"""Which GPUs a run needs, and for how long."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import ceil
from typing import Any

from elo.model.decoder import CausalLM
from elo.planning.costs import Flops, count_flops, parameters
from elo.planning.memory import Bytes, Setup, planned_memory

GIB = 2**30
# GiB that torch finds on it, and TFLOP/s of dense bf16 products with fp32 sums, by NVIDIA's data sheets.
GPUS = {
    "A100-40GB": (39.4, 312),
    "A100-80GB": (79.2, 312),
    "H100": (79.1, 989),
    "H200": (139.7, 989),
    "B200": (178.3, 2250),
    "L40S": (44.4, 362),
    "RTX-4090": (23.5, 165),
}
USABLE = 0.92  # of that; the rest is for CUDA, NCCL and the gaps between tensors: assumed, not measured
MOST_GPUS = 1024


@dataclass(frozen=True)
class Run:
    """What is planned; the fields are the options."""

    stage: str
    method: str
    gpu: str
    gpu_memory: float  # GiB
    gpu_tflops: float
    gpus: int
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
    def usable(self) -> int:
        """Bytes of a GPU."""
        return round(self.gpu_memory * GIB * USABLE)

    @property
    def windows(self) -> int:
        """Of a step, in the GPU that has the most."""
        return ceil(self.batch_windows / self.gpus)

    @property
    def setup(self) -> Setup:
        return Setup(
            tokens=min(self.micro_batch, self.windows) * self.seq_len,
            seq_len=self.seq_len,
            micro_batches=ceil(self.windows / self.micro_batch),
            shard=self.shard or self.gpus,
            dtype=self.dtype,
            activation_checkpointing=self.activation_checkpointing,
            cpu_offload=self.cpu_offload,
            optimizer_in_backward=self.optimizer_in_backward,
            gather_once=self.gather_once,
        )

    def hours(self, flops: float, tokens: float) -> float:
        """GPUs that have fewer windows than others compute on empty ones."""
        computed = tokens * self.windows * self.gpus / self.batch_windows
        return computed * flops / (self.gpus * self.gpu_tflops * 1e12 * self.utilization) / 3600


@dataclass(frozen=True)
class Plan:
    run: Run
    computed: int  # parameters
    trained: int
    flops: Flops  # a token
    memory: Bytes  # a GPU
    remedies: list[str]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.run.usable

    @property
    def hours_per_billion(self) -> float:
        return self.run.hours(self.flops.total, 1e9)

    @property
    def hours(self) -> float | None:
        return self.run.hours(self.flops.total, self.run.tokens) if self.run.tokens else None

    @property
    def name(self) -> str:
        return f"train.py --method {self.run.method}" if self.run.stage == "train" else f"{self.run.stage}.py"


def make_plan(model: CausalLM, run: Run) -> Plan:
    """model: see `methods.make`."""
    plan = Plan(
        run,
        parameters(model),
        parameters(model, trained=True),
        count_flops(model, run.seq_len, run.activation_checkpointing),
        planned_memory(model, run.setup),
        [],
    )
    return plan if plan.fits else replace(plan, remedies=remedies(model, run))


def remedies(model: CausalLM, run: Run) -> list[str]:
    """Ways to make it fit, each with as few options as will do.

    --cpu-offload and more GPUs are named only where nothing else helps. Every way named has been planned and fits.
    """
    found = fewest_options(model, run)
    if found:
        return found
    if not run.cpu_offload:
        offloaded = replace(run, cpu_offload=True)
        host = planned_memory(model, offloaded.setup).host / GIB
        found = fewest_options(model, offloaded, f"--cpu-offload (with {host:,.1f} GiB of host memory for each GPU)")
    fewest = 1 if run.setup.shard < run.gpus else 2
    for gpus in range(fewest * run.gpus, MOST_GPUS + 1, run.gpus):
        larger = replace(run, gpus=gpus, shard=None)
        more = fewest_options(model, larger, f"{gpus} GPUs" if gpus > run.gpus else "no --shard")
        if more:
            return found + more[:1]
    return found


def fewest_options(model: CausalLM, run: Run, given: str = "") -> list[str]:
    """Ways to make it fit with as few of the options that cost little time as will do."""
    ways: list[list[tuple[str, dict[str, Any]]]] = []  # each an option, with its values from the least change on
    if not run.optimizer_in_backward:
        ways.append([("--optimizer-in-backward --clip 0", {"optimizer_in_backward": True})])
    if not run.activation_checkpointing:
        ways.append([("--activation-checkpointing", {"activation_checkpointing": True})])
    if run.gather_once:
        ways.append([("no --gather-once", {"gather_once": False})])
    smaller = [run.micro_batch >> halvings for halvings in range(1, run.micro_batch.bit_length())]
    unit, name = (run.seq_len, "--micro-batch-tokens") if run.stage == "sft" else (1, "--micro-batch")
    if smaller:
        ways.append([(f"{name} {number * unit}", {"micro_batch": number}) for number in smaller])

    def fits(changes: Iterable[tuple[str, dict[str, Any]]]) -> bool:
        changed = run
        for _, fields in changes:
            changed = replace(changed, **fields)
        return planned_memory(model, changed.setup).total <= run.usable

    for size in range(len(ways) + 1):
        found = []
        for chosen in combinations(ways, size):
            fitting = next((changes for changes in product(*chosen) if fits(changes)), None)
            if fitting is not None:
                found.append(" ".join(filter(None, [given, *(option for option, _ in fitting)])))
        if found:
            return found
    return []
