"""Tokens a second and peak memory of an ELO training step, beside transformers doing the same.

Both train the same layers of the same checkpoint with everything else frozen, on the same batch, in the same dtype,
with the same optimizer and clipping, in one process and in turns, so that the machine's moods hit both alike.
"""

import ctypes
import gc
import re
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from elo.checkpoint import Checkpoint
from elo.distributed import DTYPES, ParallelOptions, World, parallelize, process_group
from elo.errors import UserError
from elo.fields import write_json
from elo.model import build
from elo.options import Parser, positive_int
from elo.slicing import base_name, detach, freeze_all_but_layers, parse_layers

CLEAR_REFS = Path("/proc/self/clear_refs")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="the base checkpoint")
    parser.add_argument("--layers", default="1,-1", help="to detach and train (%(default)s)")
    parser.add_argument("--batch", type=positive_int, default=4, help="sequences in a step (%(default)s)")
    parser.add_argument("--seq-len", type=positive_int, default=512, help="tokens in a sequence (%(default)s)")
    parser.set_defaults(dtype=None)  # both
    parser.add_argument("--rounds", type=positive_int, default=7, help="counted steps of each (%(default)s)")


def main(arguments: Namespace) -> None:
    base = Checkpoint(arguments.model)
    layers = parse_layers(arguments.layers, base.config.num_hidden_layers)
    shape = (arguments.batch, arguments.seq_len + 1)
    text = torch.randint(base.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    rows = []
    with process_group() as world:
        tokens, labels = text[:, :-1].contiguous().to(world.device), text[:, 1:].contiguous().to(world.device)
        print(f"{'dtype':<6} {'implementation':<14} {'tokens/s':>9} {'slowest':>9} {'fastest':>9} {'peak memory':>12}")
        for dtype in [arguments.dtype] if arguments.dtype else DTYPES:
            steps = {
                "elo": elo_step(base, layers, dtype, tokens, labels, world),
                "transformers": transformers_step(base, layers, DTYPES[dtype], tokens, labels, world),
            }
            for name, figures in compare(steps, tokens.numel(), arguments.rounds, world).items():
                rows.append({"method": "elo", "implementation": name, "dtype": dtype, **figures})
                line = "{dtype:<6} {implementation:<14} {tokens_per_second:9.1f} {slowest:9.1f} {fastest:9.1f} "
                print((line + "{memory_bytes:12,}").format(**rows[-1]), flush=True)
    ratios = {}
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        for figure in ("tokens_per_second", "memory_bytes"):
            ratios[f"{figure} {ours['dtype']} elo/transformers"] = ours[figure] / theirs[figure]
    for name, ratio in ratios.items():
        print(f"{ratio:6.2f}  {name}")
    if arguments.json:
        write_json(Path(arguments.json), {"rows": rows, "ratios": ratios})


class Step:
    """One optimizer step of one implementation, to be called again and again."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        self.model, self.loss = model, loss
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)

    def __call__(self) -> None:
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def held_bytes(self) -> int:
        """What stays between steps: parameters and optimizer state."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(t.numel() * t.element_size() for t in [*self.model.parameters(), *states])


def elo_step(
    base: Checkpoint, layers: tuple[int, ...], dtype: str, tokens: Tensor, labels: Tensor, world: World
) -> Step:
    model = build(detach(base.config, layers))
    freeze_all_but_layers(model)
    parallelize(model, world, ParallelOptions(dtype, compile=world.device.type == "cuda"))
    base.load_into(model, partial(base_name, layers=layers))
    return Step(model, lambda: model(tokens, labels) / labels.numel())


def transformers_step(
    base: Checkpoint, layers: tuple[int, ...], dtype: torch.dtype, tokens: Tensor, labels: Tensor, world: World
) -> Step:
    """The same slice of transformers' model, its loss over the same labels.

    In bf16 its parameters and their optimizer state are bf16 throughout, its fastest and leanest way, although that
    rounds away small updates; ours keep fp32 masters.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError("eval speed compares with transformers: pip install transformers") from None
    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=dtype)
    model.model.layers = nn.ModuleList(model.model.layers[number - 1] for number in layers)
    model.config.use_cache = False
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    model.to(world.device)
    return Step(model, lambda: model(input_ids=tokens, shift_labels=labels, labels=labels).loss)


def compare(steps: dict[str, Step], tokens: int, rounds: int, world: World) -> dict[str, dict[str, float]]:
    """Median, slowest and fastest tokens/s over interleaved rounds, and the bytes that a step needs at its peak."""
    memory = {name: peak_bytes(step, world) for name, step in steps.items()}  # also the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize(world)
            started = time.perf_counter()
            step()
            synchronize(world)
            seconds[name].append(time.perf_counter() - started)
    return {
        name: {
            "tokens_per_second": tokens / statistics.median(taken),
            "slowest": tokens / max(taken),
            "fastest": tokens / min(taken),
            "memory_bytes": memory[name],
        }
        for name, taken in seconds.items()
    }


def synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def peak_bytes(step: Step, world: World) -> int:
    """Parameters and optimizer state, plus what a step takes on top of them at its highest point."""
    step()  # the first step makes the optimizer's state and the libraries' buffers
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
        before = torch.cuda.memory_allocated(world.device)
        step()
        return step.held_bytes() + torch.cuda.max_memory_allocated(world.device) - before
    if not CLEAR_REFS.exists():
        raise UserError("peak memory on a CPU is read from Linux's /proc, which is not here")
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # hand freed memory back, so that it is not taken for memory in use
    CLEAR_REFS.write_text("5")  # sets the high-water mark to the present use (man 5 proc)
    before = resident_bytes("VmRSS")
    step()
    return step.held_bytes() + resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024
