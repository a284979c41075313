"""What each idea for a faster training step gains or loses: steps with and without it, in turns, in fresh processes.

    python benchmarks/ideas.py --model models/SmolLM2-135M-Instruct

The table is that of docs/performance.md. An idea that the project follows is switched off here, one that it does not is
switched on; the figure is tokens/s with the idea over those without it, of method elo unless the name says otherwise.
"""

import json
import os
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
from torch import Tensor, nn  # noqa: E402

from benchmarks.training_step import steps  # noqa: E402
from benchmarks.training_step.steps import Case  # noqa: E402
from elo.common.errors import UserError, exit_status  # noqa: E402
from elo.common.options import Parser, positive, positive_int  # noqa: E402
from elo.cpu import attention, linear  # noqa: E402
from elo.model import decoder as model  # noqa: E402
from elo.model import loss  # noqa: E402
from elo.runs import processes as distributed  # noqa: E402

BOTH = ("fp32", "bf16")


@dataclass(frozen=True)
class Idea:
    name: str
    switch: Callable[[], None]  # turns a kept idea off, another one on
    kept: bool
    dtypes: tuple[str, ...] = BOTH
    method: str = "elo"


# ---- kept: here switched off


def torch_products() -> None:
    linear.ONEDNN = False


def rows_of_logits() -> None:
    loss._by_vocabulary = lambda *factors: loss._by_tokens(*factors, True, False)[:2]


def batched_attention() -> None:
    attention.prefers_onednn = lambda q: False


def freed_memory_given_back() -> None:
    distributed.keep_freed_memory = lambda: None


def torch_attention() -> None:
    attention._CausalAttention.apply = lambda *qkv: F.scaled_dot_product_attention(
        *qkv, is_causal=True, enable_gqa=True
    )


def copied_frozen_weights() -> None:
    fully_shard = distributed.fully_shard
    distributed.fully_shard = lambda module, ignored_params, **settings: fully_shard(module, **settings)


def new_rotary_tables() -> None:
    model.rotary_table = model.rotary_table.__wrapped__


def foreach_adamw() -> None:
    adamw = torch.optim.AdamW
    torch.optim.AdamW = lambda *args, fused, **settings: adamw(*args, foreach=True, **settings)


# ---- not kept: here switched on


def one_product_for_qkv() -> None:
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, extend: None = None) -> Tensor:  # noqa: ANN001
        layers = (self.q_proj, self.k_proj, self.v_proj)
        sizes = [layer.out_features for layer in layers]
        qkv = linear._Linear.apply(x, torch.cat([layer.weight for layer in layers]), None).split(sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in qkv)
        q, k = (model.rotate(part, cos, sin) for part in (q, k))
        return self.o_proj(attention.attention(q, k, v, mask, True).transpose(1, 2).flatten(2))

    model.Attention.forward = forward


def one_product_for_gate_and_up() -> None:
    def forward(self, x: Tensor) -> Tensor:  # noqa: ANN001
        weight = torch.cat([self.gate_proj.weight, self.up_proj.weight])
        gate, up = linear._Linear.apply(x, weight, None).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)

    model.MLP.forward = forward


def huge_pages() -> None:
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # torch reads it at the first allocation


def compiled_blocks() -> None:
    options = steps.ParallelOptions
    steps.ParallelOptions = lambda dtype, compile: options(dtype, compile=True)


def compiled_model() -> None:
    parallelize = steps.parallelize

    def compiled(*args: Any) -> nn.Module:
        made = parallelize(*args)
        made.model.compile()
        return made

    steps.parallelize = compiled


def tiles_of(factor: float) -> Callable[[], None]:
    def switch() -> None:
        loss.TILE_BYTES = {device: int(size * factor) for device, size in loss.TILE_BYTES.items()}

    return switch


def bf16_head() -> None:
    optimizer, by_vocabulary = steps.Optimizer, loss._by_vocabulary

    def with_own_head(made: nn.Module, options: Any) -> Any:  # once the weights are there
        made.lm_head.weight = nn.Parameter(made.lm_head.weight.data.bfloat16(), requires_grad=False)
        return optimizer(made, options)

    def rounded(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        summed, gradient = by_vocabulary(hidden.bfloat16(), *others)
        return summed, gradient.to(hidden.dtype)

    steps.Optimizer, loss._by_vocabulary = with_own_head, rounded


def torch_loss() -> None:
    model.linear_cross_entropy = lambda hidden, weight, labels, softmax: F.linear_cross_entropy(
        hidden, weight, labels, reduction="sum", ignore_index=loss.IGNORE
    )


IDEAS = [
    Idea("fp32 products of oneDNN", torch_products, kept=True, dtypes=("fp32",)),
    Idea("fp32 products of oneDNN, full", torch_products, kept=True, dtypes=("fp32",), method="full"),
    Idea("loss by tiles of the vocabulary", rows_of_logits, kept=True),
    Idea("own causal attention", torch_attention, kept=True),
    Idea("own causal attention, full", torch_attention, kept=True, method="full"),
    Idea("attention by oneDNN's products", batched_attention, kept=True, dtypes=("fp32",)),
    Idea("freed memory kept", freed_memory_given_back, kept=True),
    Idea("freed memory kept, full", freed_memory_given_back, kept=True, method="full"),
    Idea("no copy of frozen weights", copied_frozen_weights, kept=True),
    Idea("rotary tables kept", new_rotary_tables, kept=True),
    Idea("fused AdamW", foreach_adamw, kept=True),
    Idea("fused AdamW, full", foreach_adamw, kept=True, method="full"),
    Idea("huge pages by torch", huge_pages, kept=False),
    Idea("huge pages by torch, full", huge_pages, kept=False, method="full"),
    Idea("q, k, v as one product", one_product_for_qkv, kept=False),
    Idea("gate, up as one product", one_product_for_gate_and_up, kept=False),
    Idea("torch.compile of each block", compiled_blocks, kept=False),
    Idea("torch.compile of the whole model", compiled_model, kept=False),
    Idea("loss tiles of 3 MB", tiles_of(1 / 4), kept=False),
    Idea("loss tiles of 48 MB", tiles_of(4), kept=False),
    Idea("bf16 head in an fp32 model", bf16_head, kept=False, dtypes=("fp32",)),
    Idea("F.linear_cross_entropy of torch", torch_loss, kept=False),
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
    print("| idea | kept | dtype | tokens/s, with over without | memory, with over without |\n|---|---|---|---|---|")
    for idea in ideas:
        for dtype in idea.dtypes:
            layers = (1, layer_count(options.model)) if idea.method == "elo" else ()
            case = replace(plain, method=idea.method, dtype=dtype, layers=layers)
            pairs = [(measure("", case), measure(idea.name, case)) for _ in range(options.rounds)]
            switched = {
                field: median(after[field] for _, after in pairs) / median(before[field] for before, _ in pairs)
                for field in ("seconds", "memory_bytes")
            }
            speed, memory = 1 / switched["seconds"], switched["memory_bytes"]
            if idea.kept:
                speed, memory = 1 / speed, 1 / memory
            print(
                f"| {idea.name} | {'yes' if idea.kept else 'no'} | {dtype} | {speed:.3f} | {memory:.3f} |", flush=True
            )


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
