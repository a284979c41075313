"""What each idea for a faster training step gains or loses: steps with and without it, in turns, in fresh processes.

    python -m benchmarks.ideas --model models/SmolLM2-135M-Instruct

Each is switched off here; the figure is tokens/s with the idea over those without it, of method elo unless the name
says otherwise. docs/performance.md has these, and what was tried beside them and is not kept.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.sides import apart
from benchmarks.training_step import steps
from benchmarks.training_step.steps import Case
from elo.common.errors import exit_status
from elo.common.options import Parser, positive, positive_int
from elo.cpu import attention, linear, loss
from elo.methods import DEFAULT_LAYERS
from elo.model import decoder
from elo.model.checkpoint import Checkpoint
from elo.model.loss import LinearCrossEntropy
from elo.runs import devices, sharding
from elo.slicing import parse_layers

BOTH = ("fp32", "bf16")


@dataclass(frozen=True)
class Idea:
    name: str
    switch: Callable[[], None]  # turns it off
    dtypes: tuple[str, ...] = BOTH
    method: str = "elo"


def torch_products() -> None:
    linear.ONEDNN = False


def rows_of_logits() -> None:
    rows = LinearCrossEntropy().loss_and_gradients
    loss.by_vocabulary = lambda *factors: rows(*factors, True, False)[:2]


def batched_attention() -> None:
    attention.prefers_onednn = lambda q: False


def freed_memory_given_back() -> None:
    devices.keep_freed_memory = lambda: None


def torch_attention() -> None:
    attention._CausalAttention.apply = lambda *qkv: F.scaled_dot_product_attention(
        *qkv, is_causal=True, enable_gqa=True
    )


def copied_frozen_weights() -> None:
    fully_shard = sharding.fully_shard
    sharding.fully_shard = lambda module, ignored_params, **settings: fully_shard(module, **settings)


def new_rotary_tables() -> None:
    decoder.rotary_table = decoder.rotary_table.__wrapped__


def foreach_adamw() -> None:
    adamw = torch.optim.AdamW
    torch.optim.AdamW = lambda *args, fused, **settings: adamw(*args, foreach=True, **settings)


IDEAS = [
    Idea("fp32 products of oneDNN", torch_products, dtypes=("fp32",)),
    Idea("fp32 products of oneDNN, full", torch_products, dtypes=("fp32",), method="full"),
    Idea("loss by tiles of the vocabulary", rows_of_logits),
    Idea("own causal attention", torch_attention),
    Idea("own causal attention, full", torch_attention, method="full"),
    Idea("attention by oneDNN's products", batched_attention, dtypes=("fp32",)),
    Idea("freed memory kept", freed_memory_given_back),
    Idea("freed memory kept, full", freed_memory_given_back, method="full"),
    Idea("no copy of frozen weights", copied_frozen_weights),
    Idea("rotary tables kept", new_rotary_tables),
    Idea("fused AdamW", foreach_adamw),
    Idea("fused AdamW, full", foreach_adamw, method="full"),
]


def arguments() -> Namespace:
    parser = Parser(prog="python -m benchmarks.ideas", description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="ideas whose names hold one of these")
    parser.add_argument("--batch", type=positive_int, default=4, help="sequences in a step (%(default)s)")
    parser.add_argument("--seq-len", type=positive_int, default=512, help="tokens in a sequence (%(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="(%(default)s)")
    parser.add_argument("--seconds", type=positive, default=4.0, help="of steps in a process (%(default)s)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    layers = parse_layers(DEFAULT_LAYERS, Checkpoint(options.model).config.num_hidden_layers)
    steps_of = {"batch": options.batch, "seq_len": options.seq_len, "seconds": options.seconds}
    ideas = [idea for idea in IDEAS if not options.only or any(word in idea.name for word in options.only)]
    print("| idea | dtype | tokens/s, with over without | memory, with over without |\n|---|---|---|---|")
    for idea in ideas:
        for dtype in idea.dtypes:
            trained = layers if idea.method == "elo" else ()
            case = Case(options.model, idea.method, "elo", dtype, trained, **steps_of)
            pairs = [(apart(measure, case), apart(measure, case, idea.switch)) for _ in range(options.rounds)]
            switched = {
                field: median(after[field] for _, after in pairs) / median(before[field] for before, _ in pairs)
                for field in ("seconds", "memory_bytes")
            }
            speed, memory = switched["seconds"], 1 / switched["memory_bytes"]
            print(f"| {idea.name} | {dtype} | {speed:.3f} | {memory:.3f} |", flush=True)


def measure(case: Case, switch: Callable[[], None] = lambda: None) -> dict[str, Any]:
    switch()
    return steps.measure(case)


if __name__ == "__main__":
    exit_status(main)
