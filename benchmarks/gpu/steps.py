"""E: ELO's step beside that of transformers. F: full training of all layers. G: a run that is stopped and resumed.

Each case is a process of its own, so that what one sets there does not reach another.
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import train
from benchmarks.gpu.measuring import Row, attempt, need_gpu, profiled
from benchmarks.gpu.shapes import Shape
from benchmarks.sides import apart
from benchmarks.training_step import steps
from benchmarks.training_step.machine import Memory, Stopwatch, synchronize
from benchmarks.training_step.steps import Case, TimedBatches
from elo.common.errors import EarlyExit
from elo.model.checkpoint import Checkpoint
from elo.runs.devices import inference_device
from elo.runs.directory import Metrics
from elo.runs.processes import process_group

PROFILED = 3  # steps
STEPS, STOPPED = 6, 3  # of `train.py`


def measure(case: Case) -> Row:
    base = Checkpoint(case.model)
    with process_group() as world:
        memory, watch, windows = Memory(world.device), Stopwatch(None), steps.open_windows(case, base)
        batches = TimedBatches(windows, case.batch, world, watch, case.micro_batches)
        make = steps.elo_step if case.implementation == "elo" else steps.transformers_step
        _, step = make(case, base, batches, world, watch)
        loss, _ = step(0), step(1)  # these compile
        spent: list[float] = []
        while sum(spent) < case.seconds:
            synchronize(world.device)
            started = time.perf_counter()
            step(2 + len(spent))
            synchronize(world.device)
            spent.append(time.perf_counter() - started)
        work = lambda: [step(number) for number in range(PROFILED)]  # noqa: E731
        shares = attempt("profiler", lambda: {"split": profiled(work, world.device)})
        del shares["case"]
        rate = round(case.batch * case.seq_len / median(spent))
        row = {"ms": 1e3 * median(spent), "tokens_per_second": rate, "loss": loss}
        return row | {"memory_gb": memory.peak() / 1e9} | shares


def rows(shape: Shape, folder: Path, method: str, windows: int, choices: dict[str, dict[str, Any]]) -> Iterator[Row]:
    for name, choice in choices.items():
        case = Case(
            model=str(folder / "base"), method=method, dtype="bf16", batch=windows, seq_len=shape.seq_len,
            layers=(1, shape.config.num_hidden_layers) if method == "elo" else (), seconds=shape.seconds, **choice,
        )  # fmt: skip

        def measured(case: Case = case) -> Row:
            if case.implementation == "compiled":  # by minutes on a CPU
                need_gpu(inference_device())
            return apart(measure, case)

        yield attempt(name, measured)


def elo(shape: Shape, folder: Path) -> Iterator[Row]:
    count = {"micro_batches": shape.micro_batches}
    usual, together = f"{shape.micro_batches} x {shape.windows} windows", shape.micro_batches * shape.windows
    ours = {"implementation": "elo", "reads_ahead": True}
    choices = {f"ELO, {usual}": ours | count, f"ELO, 1 x {together} windows": ours}
    for name, how in (("transformers", "eager"), ("compiled", "compiled"), ("Liger", "Liger's loss")):
        choices[f"transformers, {how}, {usual}"] = {"implementation": name, **count}
    choices[f"ELO, {usual}, gathered once"] = ours | count | {"gather_once": True}
    choices[f"ELO, {usual}, nothing read ahead"] = ours | count | {"reads_ahead": False}
    return rows(shape, folder, "elo", together, choices)


def full(shape: Shape, folder: Path) -> Iterator[Row]:
    ours = {"implementation": "elo", "reads_ahead": True}
    choices = {
        "ours, fp32 masters": ours,
        "ours, fp32 masters, activation checkpointing": ours | {"activation_checkpointing": True},
        "transformers, pure bf16": {"implementation": "transformers"},
        "transformers, fp32 masters, autocast": {"implementation": "autocast"},
    }
    return rows(shape, folder, "full", shape.windows // 2, choices)


# ---- resuming


def resume(shape: Shape, folder: Path) -> Iterator[Row]:
    yield attempt(f"train.py, {STEPS} steps, and stopped after {STOPPED} and resumed", lambda: compare(shape, folder))


def compare(shape: Shape, folder: Path) -> Row:
    words = ["--model", folder / "base", "--target", folder / "base/text.jsonl", "--target-fraction", 1, "--workers", 1]
    words += ["--max-steps", STEPS, "--seq-len", shape.seq_len, "--micro-batch", shape.windows, "--cache", folder / "c"]
    words += ["--batch-tokens", shape.windows * shape.micro_batches * shape.seq_len, "--out"]
    for out, stop_after in (("whole", None), ("resumed", STOPPED), ("resumed", None)):
        apart(run, [str(word) for word in [*words, folder / out]], stop_after)
    (losses, weights), (others, their_weights) = result(folder / "whole"), result(folder / "resumed")
    equal = len(losses) == STEPS and (losses, weights) == (others, their_weights)
    return {"equal_bits": equal, "losses": losses, "resumed_losses": others, "weights": [weights, their_weights]}


def run(words: list[str], stop_after: int | None) -> None:
    """train.py in this process, which gets SIGTERM when that step is in its metrics."""
    write = Metrics.write

    def write_and_stop(self: Metrics, line: dict[str, Any]) -> None:
        write(self, line)
        if line["step"] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    before, sys.argv, Metrics.write = sys.argv, ["train.py", *words], write_and_stop
    try:
        train.main()
    except EarlyExit:
        if stop_after is None:
            raise
    finally:
        sys.argv, Metrics.write = before, write


def result(out: Path) -> tuple[list[float], str]:
    """The losses, and the beginning of the weights' hash."""
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    digest = hashlib.sha256()
    for path in sorted(out.glob("model*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return losses, digest.hexdigest()[:16]
