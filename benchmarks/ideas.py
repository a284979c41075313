"""What each idea for a faster training step gains or loses: steps with and without it, in turns, in fresh processes.

    python benchmarks/ideas.py --model models/SmolLM2-135M-Instruct

Each is switched off here; the figure is tokens/s with the idea over those without it, of method elo unless the name
says otherwise. docs/performance.md has these, and what was tried beside them and is not kept.
"""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from benchmarks.training_step import steps  # noqa: E402
from benchmarks.training_step.steps import Case  # noqa: E402
from elo.common.errors import UserError, exit_status  # noqa: E402
from elo.common.options import Parser, positive, positive_int  # noqa: E402
from elo.cpu import attention, linear  # noqa: E402
from elo.model import decoder, loss  # noqa: E402
from elo.runs import devices, sharding  # noqa: E402

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
    loss._by_vocabulary = lambda *factors: loss._by_tokens(*factors, True, False)[:2]


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
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="ideas whose names hold one of these")
    parser.add_argument("--batch", type=positive_int, default=4, help="sequences in a step (%(default)s)")
    parser.add_argument("--seq-len", type=positive_int, default=512, help="tokens in a sequence (%(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="(%(default)s)")
    parser.add_argument("--seconds", type=positive, default=4.0, help="of steps in a process (%(default)s)")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:  # a process of its own, started below
        name, case = sys.argv[2:]
        next((idea.switch for idea in IDEAS if idea.name == name), lambda: None)()
        print(json.dumps(steps.measure(Case.from_json(case))))
        return
    options = arguments()
    plain = Case(
        model=options.model, method="elo", implementation="elo", dtype="fp32", layers=(), batch=options.batch,
        seq_len=options.seq_len, seconds=options.seconds, lora_rank=8, lora_alpha=16.0, data=(), text_field="text",
        cache="",
    )  # fmt: skip
    ideas = [idea for idea in IDEAS if not options.only or any(word in idea.name for word in options.only)]
    print("| idea | dtype | tokens/s, with over without | memory, with over without |\n|---|---|---|---|")
    for idea in ideas:
        for dtype in idea.dtypes:
            layers = (1, layer_count(options.model)) if idea.method == "elo" else ()
            case = replace(plain, method=idea.method, dtype=dtype, layers=layers)
            pairs = [(measure("", case), measure(idea.name, case)) for _ in range(options.rounds)]
            switched = {
                field: median(after[field] for _, after in pairs) / median(before[field] for before, _ in pairs)
                for field in ("seconds", "memory_bytes")
            }
            speed, memory = switched["seconds"], 1 / switched["memory_bytes"]
            print(f"| {idea.name} | {dtype} | {speed:.3f} | {memory:.3f} |", flush=True)


def layer_count(directory: str) -> int:
    return steps.Checkpoint(directory).config.num_hidden_layers


def measure(name: str, case: Case) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", name, case.json()]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{name}: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout)


if __name__ == "__main__":
    exit_status(main)
