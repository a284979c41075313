"""Processes, devices and sharding: everything that depends on torchrun and CUDA.

There is always one process group and always `fully_shard`, also with one process: it carries the mixed precision,
so that there is one path through the code.
"""

import os
import signal
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from elo.errors import UserError
from elo.model import CausalLM
from elo.options import Parser

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh
    host_group: dist.ProcessGroup  # gloo, on the host, patient: one process may tokenize for hours

    def say(self, message: str) -> None:
        """A line on stdout, once."""
        if self.rank == 0:
            print(message, flush=True)

    def wait(self) -> None:
        """Until every process has come here."""
        dist.barrier(self.host_group)

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's value, on every process."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks; only on rank 0, elsewhere nothing."""
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.host_group)
        return values or []

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in fp64."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return total.tolist()


@contextmanager
def process_group() -> Iterator[World]:
    """Join torchrun's processes, or be the only one."""
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs of this node")
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        size = dist.get_world_size()
        mesh = init_device_mesh(device.type, (size,))
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        yield World(dist.get_rank(), size, local_rank, device, mesh, patient)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class ParallelOptions:
    """How a model is laid out over the processes and what is traded for memory."""

    dtype: str
    compile: bool
    activation_checkpointing: bool = False
    cpu_offload: bool = False

    @staticmethod
    def add_arguments(parser: Parser) -> None:
        group = parser.add_argument_group("computation and memory")
        group.add_argument("--dtype", choices=DTYPES, default="bf16", help="of computation (%(default)s)")
        compiles = torch.cuda.is_available()
        group.add_argument(
            "--compile", action=BooleanOptionalAction, default=compiles, help="blocks (default: on CUDA)"
        )
        group.add_argument("--activation-checkpointing", action="store_true", help="recompute blocks in the backward")
        group.add_argument("--cpu-offload", action="store_true", help="keep parameters and optimizer in host memory")

    @staticmethod
    def from_arguments(arguments: Namespace) -> "ParallelOptions":
        return ParallelOptions(**{name: getattr(arguments, name) for name in ParallelOptions.__dataclass_fields__})


def parallelize(model: CausalLM, world: World, options: ParallelOptions) -> CausalLM:
    """Compile each block, shard it, shard the rest; then give the model memory on the device, yet to be filled.

    Trained parameters are held in fp32 and computed in `options.dtype`, gradients are reduced in fp32. Frozen ones
    are held in that dtype as well: nothing is ever added to them.
    """
    dtype = DTYPES[options.dtype]
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if options.cpu_offload else OffloadPolicy()
    shard = partial(
        fully_shard,
        mesh=world.mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        offload_policy=offload,
    )
    for block in model.model.layers:
        block.activation_checkpointing = options.activation_checkpointing
        if options.compile:
            block.compile(fullgraph=True)
        shard(block)
    shard(model)
    if not any(p.requires_grad for name, p in model.named_parameters() if not name.startswith("model.layers.")):
        # A frozen embedding and head never change: gather them once and keep them.
        model.set_reshard_after_backward(False, recurse=False)
    return model.to_empty(device="cpu" if options.cpu_offload else world.device)


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest point so far: of the GPU's allocator, or of the resident process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StopSignal:
    """Remembers SIGTERM and Ctrl-C, so that the loop can save before it leaves.

    Repeats change nothing: at a terminal each worker gets Ctrl-C twice, once from the terminal and once from torchrun,
    which kills its workers 30 seconds later.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopSignal":
        self.previous = [signal.signal(number, self._remember) for number in self.SIGNALS]
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def __exit__(self, *exception: object) -> None:
        for number, handler in zip(self.SIGNALS, self.previous, strict=True):
            signal.signal(number, handler)


def inference_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
