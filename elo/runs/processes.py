"""The processes of a run: always one process group, also for a single process, and how they end together."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from elo.common.errors import EarlyExit, ProcessLostError, UserError, is_out_of_memory, message_line
from elo.common.terminal import say
from elo.runs.devices import fix_collectives, take_device
from elo.runs.signals import StopSignal, end_with_torchrun

LEFT = "left"  # the key in the store under which the first process that leaves early says why
STOPPED = "stopped"


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
    locked: list[int] = field(default_factory=list)  # directories, open as long as their locks are held

    def say(self, *lines: str) -> None:
        """Lines on stdout, once."""
        if self.rank == 0:
            for line in lines:
                say(line)

    def wait(self) -> None:
        """Wait for every process to call this. A signal can interrupt it, unlike `dist.barrier`."""
        barrier = dist.barrier(self.host_group, async_op=True)
        while not barrier.is_completed():
            time.sleep(0.005)
        barrier.wait()

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's value, on every process."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def on_rank_0(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function gives on rank 0, on every process; if it raises UserError or EarlyExit, all do."""
        value, exception = None, None
        if self.rank == 0:
            try:
                value = function(*arguments)
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
        """Leave the reason for the others, who will find that this process is gone."""
        with suppress(RuntimeError):  # the store is gone if torchrun is
            self.store.compare_set(LEFT, "", reason)


@contextmanager
def process_group() -> Iterator[World]:
    """Join torchrun's processes, or be the only one.

    When a process ends, the others find their connections to it closed. If it left a reason in the store, they end in
    the same way: they stop too, or raise its UserError. If not, it was killed, and they raise ProcessLostError.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = take_device(local_rank)
    if device.type == "cuda":
        fix_collectives()
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
        is_lost = is_lost_connection(error)
        if is_lost:
            raise _reason_of_loss(world) from error
        if is_out_of_memory(error):
            less = "smaller batches need less, and python -m elo.planning --best finds a stage's options"
            error = UserError(f"process {rank}: {message_line(error) or 'out of memory'}; {less}")
        world.tell_why(str(error) if isinstance(error, UserError) else f"process {rank} failed, see above: {error}")
        raise error
    finally:
        stop.leaving = True
        for directory in world.locked:
            os.close(directory)
        if not is_lost:  # else it could wait for the process that is gone
            dist.destroy_process_group()
        stop.restore()


def is_lost_connection(error: Exception) -> bool:
    """NCCL and the store raise `DistError`s; gloo has no exception class of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _reason_of_loss(world: World) -> EarlyExit | UserError:
    why = None
    with suppress(RuntimeError):
        if world.store.check([LEFT]):
            why = world.store.get(LEFT).decode()
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
