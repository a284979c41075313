"""What a process of the benchmark measures its machine with: time, memory, and the fastest matrix product there is."""

import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F

from elo.common.errors import UserError
from elo.cpu import onednn
from elo.runs.devices import DTYPES

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
# Square ones, and those of a small model's layers and head: what is fastest differs by library and processor.
SHAPES = ((2048, 2048, 2048), (4096, 4096, 4096), (2048, 576, 1536), (2048, 1536, 576), (2048, 576, 6144))
P, R = ParamSpec("P"), TypeVar("R")


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Stopwatch:
    """The seconds that parts of a step have taken; without a device, which would wait at their borders, of none."""

    def __init__(self, device: torch.device | None) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.device is None:
            yield
            return
        synchronize(self.device)
        started = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def timed(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.part(name):
                return function(*args, **kwargs)

        return call


class Memory:
    """The bytes that a process takes beyond those it had when this was made, at their highest point.

    On a CPU that is resident memory: parameters, optimizer state, activations, and also what libraries keep for
    themselves. On a GPU it is what the allocator gave out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cpu" and not CLEAR_REFS.exists():
            raise UserError("peak memory on a CPU is read from Linux's /proc, which is not here")
        self.restart()
        self.before = self._read("VmRSS") if device.type == "cpu" else torch.accelerator.memory_allocated(device)

    def restart(self) -> None:
        """Forget how high it was so far."""
        gc.collect()
        if self.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self.device)
            return
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # hand freed memory back, so that it is not taken for memory in use
        CLEAR_REFS.write_text("5")  # sets the high-water mark to the present use (man 5 proc)

    def peak(self) -> int:
        if self.device.type != "cpu":
            return torch.accelerator.max_memory_allocated(self.device) - self.before
        return self._read("VmHWM") - self.before

    @staticmethod
    def _read(field: str) -> int:
        return int(re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)[1]) * 1024


def matmul_peak(dtype: str, device: torch.device, seconds: float = 0.25) -> dict[str, float | str]:
    """The most FLOPs a second that a matrix product x @ w.T reaches here, and which one it is.

    Of every product that torch has and every shape the best of those that run within `seconds`, and of these the best:
    what no training step can exceed.
    """
    products: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"torch": F.linear}
    if device.type == "cpu" and onednn.AVAILABLE:
        products["oneDNN"] = onednn.linear
    best: dict[str, float | str] = {"flops_per_second": 0.0, "product": ""}
    for rows, inner, columns in SHAPES:
        x = torch.randn(rows, inner, device=device).to(DTYPES[dtype])
        w = torch.randn(columns, inner, device=device).to(DTYPES[dtype])
        for name, product in products.items():
            product(x, w)  # the first time it chooses its kernel
            now, end = 0.0, time.perf_counter() + seconds
            while now < end:
                synchronize(device)
                started = time.perf_counter()
                product(x, w)
                synchronize(device)
                now = time.perf_counter()
                rate = 2 * rows * inner * columns / (now - started)
                if rate > best["flops_per_second"]:
                    best = {"flops_per_second": rate, "product": f"{name} {rows}x{inner}x{columns}"}
    return best
