"""The planner's bytes beside those that a step really takes, for the table in docs/planning.md.

    python -m benchmarks.planning_checks [--model models/SmolLM2-135M-Instruct]

Every case runs in a fresh process on the CPU. What is measured is the highest resident memory of a process while it
builds a model and takes two steps, above what it had after the same with a tiny model.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.training_step.machine import Memory
from elo.common.errors import exit_status
from elo.common.options import Parser
from elo.data.feed import in_order
from elo.methods import METHODS, make
from elo.model.config import ModelConfig
from elo.optimizer import Optimizer, TrainingOptions
from elo.planning.memory import Setup, planned_memory
from elo.runs.processes import World, process_group
from elo.runs.sharding import ParallelOptions, parallelize
from elo.training import accumulate

ROOT = Path(__file__).resolve().parents[1]
TINY = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 256}
SEQ_LEN = 512


class RandomBatches:
    """The same random tokens in every step; satisfies what is asked of `feed.Batches`."""

    def __init__(self, setup: Setup, vocabulary: int) -> None:
        tokens = torch.randint(vocabulary, (setup.tokens // SEQ_LEN, SEQ_LEN))
        self.pairs = [(tokens, tokens)] * setup.micro_batches

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.pairs)

    def label_count(self, step: int) -> int:
        return sum(labels.numel() for _, labels in self.pairs)


def train(config: ModelConfig, method: str, setup: Setup, world: World) -> None:
    """Two steps of a random model: the first makes the optimizer's state."""
    options = ParallelOptions(
        setup.dtype,
        compile=False,
        activation_checkpointing=setup.activation_checkpointing,
        cpu_offload=setup.cpu_offload,
        gather_once=setup.gather_once,
    )
    model = parallelize(make(config, method).model, world, options)
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).normal_(std=0.02)
    clip, in_backward = 0.0 if setup.optimizer_in_backward else 1.0, setup.optimizer_in_backward
    optimizer = Optimizer(model, TrainingOptions(lr=0.0, clip=clip, optimizer_in_backward=in_backward))
    batches = RandomBatches(setup, config.vocab_size)
    for step in range(2):
        accumulate(model, in_order(batches, [step], world.device), batches.label_count(step), optimizer, world)
        optimizer.gradient_norm(world)
        optimizer.step()


def measure_here(config: ModelConfig, method: str, setup: Setup, world: World) -> int:
    tiny = ModelConfig.from_json({**config.json, **TINY, "num_hidden_layers": 2})
    train(tiny, method, replace(setup, tokens=SEQ_LEN), world)
    memory = Memory(world.device)
    train(config, method, setup, world)
    return memory.peak()


def measure(fields: dict[str, Any], method: str, setup: Setup) -> int:
    """Bytes of one of `setup.shard` fresh processes. fields: config.json."""
    python = [sys.executable]
    if setup.shard > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={setup.shard}"]
    # What is freed goes back to the system at once, or it would be counted until something fills its place.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    case = json.dumps({"config": fields, "method": method, "setup": asdict(setup)})
    command = [*python, "-m", "benchmarks.planning_checks", "--case", case]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return int(re.search(rb"^(\d+)$", done.stdout, re.MULTILINE)[1])


def planned(fields: dict[str, Any], method: str, setup: Setup) -> Any:
    return planned_memory(make(ModelConfig.from_json(fields), method).model, setup)


def cases() -> Iterator[tuple[str, Setup]]:
    for dtype in ("fp32", "bf16"):
        for method in METHODS:
            setup = Setup(2 * SEQ_LEN, SEQ_LEN, dtype=dtype, device="cpu")
            yield method, setup
            yield method, replace(setup, activation_checkpointing=True)
            yield method, replace(setup, optimizer_in_backward=True)
            yield method, replace(setup, micro_batches=2)
            yield method, replace(setup, micro_batches=2, gather_once=True)
            yield method, replace(setup, tokens=4 * SEQ_LEN)
            yield method, replace(setup, shard=2)
            yield method, replace(setup, shard=2, micro_batches=2, gather_once=True)


def main() -> None:
    parser = Parser(prog="python -m benchmarks.planning_checks", description=__doc__)
    parser.add_argument(
        "--model", type=Path, metavar="DIR", default="models/SmolLM2-135M-Instruct", help="(%(default)s)"
    )
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        case = arguments.case
        with process_group() as world:
            taken = measure_here(ModelConfig.from_json(case["config"]), case["method"], Setup(**case["setup"]), world)
            world.say(str(max(world.gather(taken))))
        return
    fields = ModelConfig.load(arguments.model).json
    print(
        "| method | dtype | tokens | options | processes | planned MB | measured MB | planned / measured | highest at |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for method, setup in cases():
        plan, taken = planned(fields, method, setup), measure(fields, method, setup)
        options = [f"`--{name.replace('_', '-')}`" for name, value in asdict(setup).items() if value is True]
        if setup.micro_batches > 1:
            options.append(f"{setup.micro_batches} micro-batches a step")
        print(
            f"| {method} | {setup.dtype} | {setup.tokens} | {', '.join(options)} | {setup.shard} "
            f"| {plan.total / 1e6:.0f} | {taken / 1e6:.0f} | {plan.total / taken:.2f} | {plan.moment} |",
            flush=True,
        )


if __name__ == "__main__":
    exit_status(main)
