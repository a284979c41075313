"""Time, equal bits, errors, and where a step's time goes."""

import gc
import json
import time
from collections.abc import Callable, Iterable
from math import ceil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from elo.common.errors import message_line

Row = dict[str, Any]  # of a case; "case" is its name
SAMPLES, SAMPLE_SECONDS = 5, {"cuda": 0.1, "cpu": 0.001}
# By words in a kernel's name, in lower case; whichever comes first: Inductor's carry the names of all they fuse.
KINDS = {
    "other": ("triton_poi", "triton_red", "triton_per"),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "products": ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk", "aten::linear", "aten::mm", "aten::addmm"),
    "copies": ("memcpy", "memset", "copy", "nccl", "chunk_cat", "catarray", "aten::to"),
}
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # a trace's categories of what a GPU does


class NotHereError(Exception):
    """A case is left out: the message says what it needs."""


def need_gpu(device: torch.device) -> None:
    if device.type == "cpu":
        raise NotHereError("needs a GPU")


def attempt(case: str, measure: Callable[[], Row]) -> Row:
    """What `measure` gives, or why there is nothing: a case that fails leaves the others alone."""
    try:
        return {"case": case, **measure()}
    except NotHereError as missing:
        return {"case": case, "left_out": str(missing)}
    except ModuleNotFoundError as error:
        return {"case": case, "left_out": f"{error.name} is not installed"}
    except Exception as error:
        return {"case": case, "error": f"{type(error).__name__}: {message_line(error)[:300]}"}
    finally:
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def call_seconds(function: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Of a call, the mean of so many one after the other; on a GPU by its own clock."""
    if device.type == "cpu":
        started = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - started) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Of a call, the median of samples of many calls, after two that warm up."""
    function()
    calls = ceil(SAMPLE_SECONDS[device.type] / max(1e-5, call_seconds(function, device)))
    return median(call_seconds(function, device, min(calls, 100)) for _ in range(SAMPLES))


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.float() - truth).norm() / truth.norm()).item()


def split(events: Iterable[Row]) -> dict[str, float]:
    """The shares of the time from the first event's start to the last one's end: KINDS and "idle".

    events: of a Chrome trace, {"name", "ts", "dur"} in µs. Where several run at once the time is the first one's: a
    copy beside a product that began before it costs nothing.
    """
    ordered = sorted(events, key=lambda event: event["ts"])
    if not ordered:
        raise NotHereError("the profiler saw nothing")
    spent = dict.fromkeys([*KINDS, "idle"], 0.0)
    now = begun = ordered[0]["ts"]
    for event in ordered:
        start, end, name = max(now, event["ts"]), event["ts"] + event["dur"], event["name"].lower()
        if end > now:
            kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
            spent["idle"] += start - now
            spent[kind] += end - start
            now = end
    return {kind: time / max(1e-9, now - begun) for kind, time in spent.items()}


def profiled(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The `split` of what `work` has a GPU do; on a CPU of torch's operators, from outside."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
    with TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(Path(folder, "trace.json")))
        trace = json.loads(Path(folder, "trace.json").read_text(errors="replace"))
    return split(event for event in trace["traceEvents"] if event.get("cat") in (ON_GPU if on_gpu else ("cpu_op",)))
