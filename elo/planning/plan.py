"""Parameters, FLOPs, memory and hours of a run, before its GPUs are rented. Needs a config.json and no weights.

    python -m elo.planning --model models/Llama-3.1-8B --gpu H100 --gpus 8 --gb 9 --bytes-per-token 3.6
    python -m elo.planning --model config.json --stage align --gpu A100-40GB --micro-batch 1 --activation-checkpointing

Without --stage and --method a table of all stages and methods. With one of them a plan, which is refused if it does not
fit, with the options that would make it fit.
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elo import methods
from elo.common.errors import UserError
from elo.common.fields import check_output, write_json
from elo.common.options import Parser, positive, positive_int, share
from elo.common.terminal import show
from elo.methods import DEFAULT_LAYERS, METHODS, OF_LAYERS
from elo.model.config import ModelConfig
from elo.planning.budget import GIB, GPUS, MOST_GPUS, Plan, Run, make_plan
from elo.pretraining import LARGEST_BATCH
from elo.runs.devices import DTYPES
from elo.slicing import parse_layers
from elo.variants.active_vocabulary import narrow
from elo.variants.lora import LoraOptions

STAGES = ("train", "align", "sft")  # the scripts


# ---- the command


def make_parser() -> Parser:
    parser = Parser(prog="python -m elo.planning", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint, or its config.json")
    parser.add_argument("--stage", choices=STAGES, help="script (default: all, or train with --method)")
    parser.add_argument("--method", choices=METHODS, help="of train.py (default: all, or elo with --stage train)")
    parser.add_argument(
        "--layers", help=f"of methods {' and '.join(OF_LAYERS)}, from 1; -1 is the last (default: {DEFAULT_LAYERS})"
    )
    parser.add_argument("--bridge", action="store_true", help="of method elo")
    parser.add_argument("--active-vocabulary", type=positive_int, metavar="TOKENS", help=(
        "of method elo, which says how many when it begins"))  # fmt: skip
    parser.add_argument("--validation", action="store_true", help="with that: the whole head is kept for held-out text")
    parser.add_argument("--lora-rank", type=positive_int, default=LoraOptions.lora_rank, help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")

    group = parser.add_argument_group("machine")
    group.add_argument("--gpu", choices=GPUS, help="kind (default: H100)")
    group.add_argument("--gpu-memory", type=positive, metavar="GIB", help="as torch finds it (default: the kind's)")
    group.add_argument(
        "--gpu-tflops", type=positive, metavar="TFLOPS", help="peak in --dtype, without sparsity (default: the kind's)"
    )
    group.add_argument("--gpus", type=positive_int, default=8, help="(%(default)s)")
    group.add_argument("--utilization", type=share, default=0.25, help=(
        "assumed share of the peak that is reached; about what the paper's hours imply (%(default)s)"))  # fmt: skip

    group = parser.add_argument_group("data, without which there are hours for 10^9 tokens")
    group.add_argument("--tokens", type=positive, help="of the run; of sft.py those of all epochs")
    group.add_argument("--gb", type=positive, help="10^9 bytes of text instead; needs --bytes-per-token")
    group.add_argument("--bytes-per-token", type=positive, help="of the tokenizer on this text")

    group = parser.add_argument_group("options of the scripts")
    group.add_argument("--seq-len", type=positive_int, default=2048, help="(%(default)s)")
    group.add_argument("--batch-tokens", type=positive_int, default=LARGEST_BATCH, help="(%(default)s)")
    group.add_argument("--micro-batch", type=positive_int, default=4, help="windows at a time in a GPU (%(default)s)")
    group.add_argument("--batch-conversations", type=positive_int, default=64, help="of sft.py (%(default)s)")
    group.add_argument("--micro-batch-tokens", type=positive_int, default=8192, help="of sft.py (%(default)s)")
    group.add_argument("--dtype", choices=DTYPES, default="bf16", help="(%(default)s)")
    group.add_argument("--shard", type=positive_int, metavar="N", help="(default: over all GPUs)")
    for name in ("activation-checkpointing", "cpu-offload", "optimizer-in-backward", "gather-once"):
        group.add_argument(f"--{name}", action="store_true")
    return parser


def planned_runs(arguments: Namespace) -> list[Run]:
    """Raises UserError for options that do not go together."""
    stage, method = arguments.stage, arguments.method
    if method and stage not in (None, "train"):
        raise UserError(f"--method {method} is an option of train.py; {stage}.py trains every parameter")
    if stage == "train" or method:
        chosen = [("train", method or "elo")]
    elif stage:
        chosen = [(stage, "full")]
    else:
        chosen = [*(("train", method) for method in METHODS), ("align", "full"), ("sft", "full")]
    if arguments.layers and not any(method in OF_LAYERS for _, method in chosen):
        raise UserError(f"--layers {arguments.layers}: only train.py --method elo or selective trains some of them")
    for option in ("bridge", "active_vocabulary"):
        if getattr(arguments, option) and not any(method == "elo" for _, method in chosen):
            raise UserError(f"--{option.replace('_', '-')} goes with train.py --method elo")
    if arguments.validation and not arguments.active_vocabulary:
        raise UserError("--validation changes a plan with --active-vocabulary only")
    if arguments.shard and arguments.gpus % arguments.shard:
        raise UserError(f"--shard {arguments.shard} does not divide the {arguments.gpus} GPUs")
    if not arguments.utilization:
        raise UserError("--utilization 0: such a run never ends; give a share above 0")
    if arguments.dtype == "fp32" and not arguments.gpu_tflops:
        raise UserError("--dtype fp32: the GPUs' peaks are known here for bf16; give that for fp32 with --gpu-tflops")
    if arguments.stage != "sft" and arguments.batch_tokens % arguments.seq_len:
        raise UserError(f"--batch-tokens {arguments.batch_tokens} is not a multiple of --seq-len {arguments.seq_len}")
    own = arguments.gpu_memory, arguments.gpu_tflops
    if not arguments.gpu and None in own and own != (None, None):
        raise UserError("--gpu-memory and --gpu-tflops: a kind that is not in the table needs both, one in it --gpu")
    memory, tflops = GPUS[arguments.gpu or "H100"]
    common = {name: getattr(arguments, name) for name in Run.__dataclass_fields__ if hasattr(arguments, name)}
    common |= {
        "gpu": arguments.gpu or ("H100" if own == (None, None) else "GPU"),
        "gpu_memory": arguments.gpu_memory or memory,
        "gpu_tflops": arguments.gpu_tflops or tflops,
        "tokens": token_count(arguments),
    }
    runs = []
    for stage, method in chosen:
        batch = arguments.batch_tokens // arguments.seq_len, arguments.micro_batch
        if stage == "sft":
            batch = arguments.batch_conversations, max(1, arguments.micro_batch_tokens // arguments.seq_len)
        options = {"stage": stage, "method": method, "batch_windows": batch[0], "micro_batch": batch[1]}
        runs.append(Run(**{**common, **options}))
    return runs


def make_plans(arguments: Namespace, config: ModelConfig) -> list[Plan]:
    """Raises UserError for options that do not go together, with each other or with the model."""
    layers = parse_layers(DEFAULT_LAYERS if arguments.layers is None else arguments.layers, config.num_hidden_layers)
    adapters, runs = LoraOptions(lora_rank=arguments.lora_rank), planned_runs(arguments)
    models = {run.method: methods.make(config, run.method, layers, adapters, arguments.bridge).model for run in runs}
    if (rows := arguments.active_vocabulary or 0) > config.vocab_size:
        raise UserError(f"--active-vocabulary {rows}: the model's vocabulary has {config.vocab_size}")
    if rows:
        narrow(models["elo"], rows, arguments.validation)
    return [make_plan(models[run.method], run) for run in runs]


def token_count(arguments: Namespace) -> float | None:
    if arguments.gb is None:
        if arguments.bytes_per_token:
            raise UserError("--bytes-per-token goes with --gb")
        return arguments.tokens
    if arguments.tokens:
        raise UserError("--tokens and --gb say the same; give one of them")
    if not arguments.bytes_per_token:
        raise UserError(
            "--gb needs --bytes-per-token, which depends on tokenizer and language, as 3.6 of Llama-3.1's on Korean"
        )
    return arguments.gb * 1e9 / arguments.bytes_per_token


# ---- what is told


def report(plan: Plan) -> Iterator[str]:
    run, flops, memory = plan.run, plan.flops, plan.memory
    setup, total = run.setup, flops.total
    yield f"{plan.name} on {run.gpus} x {run.gpu}"
    yield f"parameters  {plan.trained / 1e6:,.1f} M trained of {plan.computed / 1e6:,.1f} M computed"
    yield (
        f"FLOPs       {total / 1e9:,.2f} G a token: forward {flops.forward / 1e9:,.2f}, backward "
        f"{flops.backward / 1e9:,.2f}, recomputed {flops.recomputed / 1e9:,.2f}; "
        f"attention is {flops.attention / total:.0%}, the head {flops.head / total:.0%}"
    )
    parts = {name: value / GIB for name, value in asdict(memory).items() if isinstance(value, int)}
    host = parts.pop("host")
    listed = ", ".join(f"{name} {value:,.1f}" for name, value in parts.items())
    yield f"memory      {memory.total / GIB:,.1f} GiB of the {plan.run.usable / GIB:,.1f} usable in a GPU: {listed}"
    yield f"            highest at: {memory.moment}"
    if host:
        yield f"            and {host:,.1f} GiB of host memory for each GPU; AdamW's time there is not counted"
    rows = "conversations of at most" if run.stage == "sft" else "windows of"
    yield (
        f"a step      {run.batch_windows} {rows} {run.seq_len} tokens, in a GPU {setup.micro_batches} times "
        f"{setup.tokens // run.seq_len}"
    )
    hours = f"{plan.hours_per_billion:,.2f} for 10^9 tokens"
    if run.tokens:
        hours = f"{plan.hours:,.2f} for {run.tokens / 1e9:,.2f} * 10^9 tokens"
    yield f"hours       {hours}, at {run.utilization:.0%} of {run.gpu_tflops:g} TFLOP/s a GPU"


def table(plans: list[Plan]) -> Iterator[str]:
    run = plans[0].run
    yield (
        f"{run.gpus} x {run.gpu}, {run.usable / GIB:,.1f} GiB usable in each, "
        f"{run.utilization:.0%} of {run.gpu_tflops:g} TFLOP/s; windows of {run.seq_len} tokens"
    )
    hours = f"hours for {run.tokens / 1e9:,.2f} * 10^9 tokens" if run.tokens else "hours for 10^9 tokens"
    yield f"{'':<27}{'M trained':>10}{'M computed':>12}{'GFLOP/token':>13}{'GiB/GPU':>9}  {hours}"
    for plan in plans:
        line = f"{plan.name:<27}{plan.trained / 1e6:>10,.1f}{plan.computed / 1e6:>12,.1f}"
        line += f"{plan.flops.total / 1e9:>13,.2f}{plan.memory.total / GIB:>9,.1f}"
        if plan.fits:
            yield f"{line}  {plan.hours if run.tokens else plan.hours_per_billion:,.2f}"
        else:
            yield f"{line}  does not fit; would with: {would_fit(plan)}"


def would_fit(plan: Plan) -> str:
    return ", or ".join(plan.remedies) or f"no option, and not on {MOST_GPUS} GPUs"


def refusal(plan: Plan) -> str:
    needed, usable = (size / GIB for size in (plan.memory.total, plan.run.usable))
    return (
        f"{plan.name} needs {needed:,.1f} GiB in each GPU, and {usable:,.1f} are usable; it would fit with "
        f"{would_fit(plan)}"
    )


def as_json(plan: Plan) -> dict[str, Any]:
    return {
        **asdict(plan),
        "flops": {**asdict(plan.flops), "total": plan.flops.total},
        "memory": {**asdict(plan.memory), "total": plan.memory.total, "usable": plan.run.usable},
        "fits": plan.fits,
        "hours": plan.hours,
        "hours_per_billion_tokens": plan.hours_per_billion,
    }


def main() -> None:
    arguments = make_parser().parse_args()
    check_output("--json", arguments.json, [arguments.model])
    if not arguments.model.exists():
        raise UserError(f"--model {arguments.model}: not found; give a checkpoint's directory or its config.json")
    config = ModelConfig.load(arguments.model)
    config.check_seq_len(arguments.seq_len)
    plans = make_plans(arguments, config)
    if arguments.json:
        write_json(arguments.json, {"model": str(arguments.model), "plans": [as_json(plan) for plan in plans]})
    if arguments.stage or arguments.method:
        (plan,) = plans
        if not plan.fits:
            raise UserError(refusal(plan))
        show("\n".join(report(plan)))
    else:
        show("\n".join(table(plans)))
