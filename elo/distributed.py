"""Processes, devices and sharding: everything that depends on torchrun and CUDA.

There is always one process group and always `fully_shard`, also with one process: it carries the mixed precision,
so that there is one path through the code.
"""

import ctypes
import os
import platform
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from elo.errors import EarlyExit, ProcessLostError, UserError
from elo.loss import softmax_to_compile_
from elo.model import CausalLM
from elo.options import Parser, positive_int
from elo.signals import StopSignal, end_with_torchrun

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LEFT = "left"  # the key in the store under which the first process that leaves early says why
STOPPED = "stopped"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    host_group: dist.ProcessGroup  # gloo, on the host, patient: one process may tokenize for hours
    saving_group: dist.ProcessGroup  # another one, for the thread that writes states
    store: dist.Store
    stop: StopSignal

    def say(self, message: str) -> None:
        """A line on stdout, once."""
        if self.rank == 0:
            print(message, flush=True)

    def wait(self) -> None:
        """Until every process has come here. A signal ends the waiting, as it could not in `dist.barrier` itself."""
        barrier = dist.barrier(self.host_group, async_op=True)
        while not barrier.is_completed():
            time.sleep(0.005)
        barrier.wait()

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's value, on every process."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def on_rank_0(self, function: Callable[[], Any]) -> Any:
        """What `function` gives on rank 0, on every process; if it raises UserError or EarlyExit, all do."""
        value, exception = None, None
        if self.rank == 0:
            try:
                value = function()
            except (UserError, EarlyExit) as raised:
                exception = raised
        value, exception = self.from_rank_0((value, exception))
        if exception is not None:
            raise exception
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, on every process."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in fp64."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def tell_why(self, reason: str) -> None:
        """Leave word for the others, who will find that this process is gone."""
        with suppress(RuntimeError):  # the store is gone if torchrun is
            self.store.compare_set(LEFT, "", reason)

    def why_lost(self) -> str | None:
        """The word that the first process left, or None if it could not."""
        with suppress(RuntimeError):
            if self.store.check([LEFT]):
                return self.store.get(LEFT).decode()
        return None


@contextmanager
def process_group() -> Iterator[World]:
    """Join torchrun's processes, or be the only one.

    Where a process ends, the others find their connections to it closed. If it left word why, they end likewise: they
    too stop, or raise its UserError. If not, it was killed, and they raise ProcessLostError.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = take_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=30)))
        end_with_torchrun()
    else:
        store, rank, size = dist.HashStore(), 0, 1
    # A group that torchrun has restarted may find the store of the one before.
    store = dist.PrefixStore(f"elo-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    patient, saving = (dist.new_group(backend="gloo", timeout=timedelta(days=7)) for _ in range(2))
    stop = StopSignal()
    world = World(rank, size, local_rank, device, patient, saving, store, stop)
    stop.listen()
    is_lost = False
    try:
        yield world
    except EarlyExit:
        world.tell_why(STOPPED)
        raise
    except Exception as error:
        is_lost = _is_lost_connection(error)
        if is_lost:
            raise _reason_of_loss(world) from error
        world.tell_why(str(error) if isinstance(error, UserError) else f"process {rank} failed, see above: {error}")
        raise
    finally:
        stop.leaving = True
        if not is_lost:  # else it could wait for the process that is gone
            dist.destroy_process_group()
        stop.restore()


def _is_lost_connection(error: Exception) -> bool:
    """gloo has no exception class of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _reason_of_loss(world: World) -> EarlyExit | UserError:
    why = world.why_lost()
    if why == STOPPED:
        reason = EarlyExit("stopped, because another process was")
    elif why is not None:
        reason = UserError(why)
    else:
        reason = ProcessLostError(
            f"process {world.rank}: another process of this run was killed or cannot be reached any more; "
            "the same command goes on from the last saved state, if there is one"
        )
    reason.at_once = True
    return reason


# ---- the layout of a model


@dataclass(frozen=True)
class ParallelOptions:
    """How a model is laid out over the processes and what is traded for memory."""

    dtype: str
    compile: bool
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    shard: int | None = None

    @staticmethod
    def add_arguments(parser: Parser) -> None:
        group = parser.add_argument_group("computation and memory")
        group.add_argument("--dtype", choices=DTYPES, default="bf16", help="of computation (%(default)s)")
        group.add_argument(
            "--compile", action=BooleanOptionalAction, default=torch.cuda.is_available(), help=(
            "blocks and softmax (default: on CUDA)"))  # fmt: skip
        group.add_argument("--activation-checkpointing", action="store_true", help="recompute blocks in the backward")
        group.add_argument("--cpu-offload", action="store_true", help="keep parameters and optimizer in host memory")
        group.add_argument("--shard", type=positive_int, metavar="N", help=(
            "shard over N processes and replicate such groups (default: shard over all)"))  # fmt: skip

    @staticmethod
    def from_arguments(arguments: Namespace, world: World) -> "ParallelOptions":
        """Raises UserError if --shard does not divide the number of processes."""
        if arguments.shard and world.size % arguments.shard:
            raise UserError(f"--shard {arguments.shard} does not divide the {world.size} processes of this run")
        return ParallelOptions(**{name: getattr(arguments, name) for name in ParallelOptions.__dataclass_fields__})


def make_mesh(world: World, shard: int | None) -> DeviceMesh:
    """Over all processes; with `shard`, groups of so many, neighbours by rank, that hold the model once each."""
    if shard in (None, world.size):
        return init_device_mesh(world.device.type, (world.size,))
    return init_device_mesh(world.device.type, (world.size // shard, shard), mesh_dim_names=("replicate", "shard"))


def parallelize(model: CausalLM, world: World, options: ParallelOptions) -> CausalLM:
    """Compile each block and the loss's softmax, shard each block and the rest; then give all memory, yet to be filled.

    Trained parameters are held in fp32 and computed in `options.dtype`, gradients are reduced in fp32. Frozen ones
    are held in that dtype as well: nothing is ever added to them. Where each process has the whole model, they are
    left as they are: fully_shard would compute with a copy of them.
    """
    set_for_training(world.device)
    dtype = DTYPES[options.dtype]
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for parameter in frozen:
        parameter.data = parameter.data.to(dtype)
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if options.cpu_offload else OffloadPolicy()
    shard = partial(
        fully_shard,
        mesh=make_mesh(world, options.shard),
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        offload_policy=offload,
        ignored_params=frozen if (options.shard or world.size) == 1 and not options.cpu_offload else None,
    )
    compiled = {"fullgraph": True, "options": {"deterministic": True}}  # kernels chosen by timing could change
    if options.compile:
        model.softmax = torch.compile(softmax_to_compile_, **compiled)
    for block in model.model.layers:
        block.activation_checkpointing = options.activation_checkpointing
        if options.compile:
            block.compile(**compiled)
        shard(block)
    shard(model)
    if not any(p.requires_grad for name, p in model.named_parameters() if not name.startswith("model.layers.")):
        # A frozen embedding and head never change: gather them once and keep them.
        model.set_reshard_after_backward(False, recurse=False)
    model.to_empty(device="cpu" if options.cpu_offload else world.device)
    model.tie_weights()
    return model


# ---- the device: everything that asks for CUDA


def inference_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def take_device(local_rank: int) -> torch.device:
    """This process's GPU, or the CPU where there is none. Raises UserError if the node has fewer GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs of this node")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def set_for_training(device: torch.device) -> None:
    """What this process does from now on to compute the same numbers every time, and fast."""
    if device.type == "cuda":
        make_deterministic()
    else:
        keep_freed_memory()


def make_deterministic() -> None:
    """Let CUDA give the same numbers every time, without which no resumed run equals the uninterrupted one.

    cuDNN's attention is ruled out by that, and the flash kernel takes its place: the backward pass of the former adds
    in whatever order its blocks end.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a search for errors that costs time


def keep_freed_memory() -> None:
    """Keep what a CPU's tensors free for those that follow, unless the environment sets the allocator otherwise.

    glibc hands large blocks back to the kernel, which clears every page anew when they come again: a tenth or more of
    the time of a full training step (docs/performance.md).
    """
    is_set = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt and not is_set:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest point so far: of the GPU's allocator, or of the resident process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of torch's generators, which dropout draws from. Whatever else is random here is drawn from --seed anew."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
