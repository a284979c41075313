"""The tables of docs/planning.md that set the planner beside the paper: FLOPs, the utilization that hours imply, and
the largest model that each way can train.

    python -m benchmarks.planning_paper [--seq-len 2048]

The hours and tokens are those of arXiv 2601.03648, Table 1 (8 H100) and Figure 3. The paper does not say how long its
windows were, nor whether blocks were recomputed; here they are not, but for the largest model.
"""

from typing import Any

from benchmarks.published import FIGURE_3, LLAMA, LLAMA_8B, LLAMA_70B, LLAMA_SIZES, TABLE_1
from elo.common.errors import exit_status
from elo.common.options import Parser, positive_int
from elo.methods import make
from elo.model.config import ModelConfig
from elo.planning.costs import count_flops
from elo.planning.memory import planned_memory
from elo.planning.plan import make_parser, planned
from elo.planning.run import GIB, GPUS

# What decides on the costs in the published config.json, and the published number of parameters.
PUBLIC: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3.1-8B": ({**LLAMA, **LLAMA_8B, "max_position_embeddings": 131072}, 8_030_261_248),
    "Mistral-7B-v0.3": (
        {**LLAMA_8B, "architectures": ["MistralForCausalLM"], "num_key_value_heads": 8, "vocab_size": 32768}
        | {"max_position_embeddings": 32768, "sliding_window": None},
        7_248_023_552,
    ),
    "Qwen2-7B": (
        {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064}
        | {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
        | {"max_position_embeddings": 131072},
        7_615_616_512,
    ),
    "Llama-3-70B": ({**LLAMA, **LLAMA_70B, "max_position_embeddings": 8192}, 70_553_706_496),
}


def config(model: str) -> ModelConfig:
    return ModelConfig.from_json(PUBLIC[model][0])


def flops_per_token(config: ModelConfig, method: str, seq_len: int) -> float:
    """Of a training step."""
    return count_flops(make(config, method).model, seq_len).total


def largest(gpu: str, gpus: int, method: str, seq_len: int) -> str:
    """Of Llama's sizes, with its memory: the settings with which most fits, and nothing in the host's memory."""
    found = "-"
    for name, sizes in LLAMA_SIZES.items():
        words = ["--model", name, "--method", method, "--gpu", gpu, "--gpus", str(gpus), "--seq-len", str(seq_len)]
        words += ["--micro-batch", "1", "--activation-checkpointing", "--optimizer-in-backward"]
        fields = {**LLAMA, **sizes, "max_position_embeddings": 131072}
        ((model, run),) = planned(make_parser().parse_args(words), ModelConfig.from_json(fields))
        if (needed := planned_memory(model, run.setup).total) > run.usable:
            break
        found = f"{name}, {needed / GIB:.1f} GiB"
    return found


def main() -> None:
    parser = Parser(prog="python -m benchmarks.planning_paper", description=__doc__)
    parser.add_argument("--seq-len", type=positive_int, default=2048, help="tokens in a window (%(default)s)")
    seq_len = parser.parse_args().seq_len
    peak = 8 * GPUS["H100"].tflops * 1e12 * 3600  # FLOPs an hour

    print("| model | run | 10^9 tokens | GFLOPs a token | hours | utilization |\n|---|---|---|---|---|---|")
    for model, rows in TABLE_1.items():
        for name, method, tokens, hours in rows:
            flops = flops_per_token(config(model), method, seq_len)
            share = tokens * 1e9 * flops / (hours * peak)
            print(f"| {model} | {name} | {tokens} | {flops / 1e9:.2f} | {hours} | {share:.1%} |")

    print("\n| GB | ELO is faster than | paper | by FLOPs | by Table 1's hours |\n|---|---|---|---|---|")
    llama = config("Llama-3.1-8B")
    costs = {method: flops_per_token(llama, method, seq_len) for method in ("elo", "full", "lora")}
    (_, _, _, full), (_, _, _, elo), (_, _, _, alignment) = TABLE_1["Llama-3.1-8B"]
    for gigabytes in (50, 200):
        for method, ratios in FIGURE_3.items():
            by_flops = gigabytes * costs[method] / ((gigabytes - 1) * costs["elo"] + costs["full"])
            by_hours = gigabytes * full / 10 / ((gigabytes - 1) * elo / 9 + alignment)
            shown = f"{by_hours:.2f}" if method == "full" else "-"
            print(f"| {gigabytes} | {method} | {ratios[gigabytes]} | {by_flops:.2f} | {shown} |")

    ways = ("elo", "lora", "selective", "full")
    print(f"\n| GPUs | {' | '.join(ways)} |\n{'|---' * (len(ways) + 1)}|")
    for gpu in ("RTX-4090", "A100-40GB", "H100"):
        for gpus in (1, 8):
            print(f"| {gpus} x {gpu} | {' | '.join(largest(gpu, gpus, way, seq_len) for way in ways)} |")


if __name__ == "__main__":
    exit_status(main)
