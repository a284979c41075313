"""Parameters, FLOPs, memory and hours of a run, before its GPUs are rented. Needs a config.json and no weights.

    python -m elo.planning --model models/Llama-3.1-8B --gpu H100 --gpus 8 --gb 9 --bytes-per-token 3.6
    python -m elo.planning --model config.json --stage align --gpu A100-40GB --micro-batch 1 --activation-checkpointing
    python -m elo.planning --model config.json --stage align --seq-len 4096 --best -- --elo runs/elo --gb 1

Without --stage and --method a table of all stages and methods. With one of them a plan, which is refused if it does not
fit, with the options that would make it fit; with --best the fastest settings that fit, and the command that has them.
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from math import inf
from pathlib import Path
from typing import Any

from elo import methods
from elo.common.errors import UserError
from elo.common.fields import check_output, write_json
from elo.common.options import Parser, positive, positive_int, positive_share
from elo.common.terminal import show
from elo.methods import DEFAULT_LAYERS, METHODS, OF_LAYERS
from elo.model.config import ModelConfig
from elo.model.decoder import CausalLM
from elo.planning import best
from elo.planning.budget import MOST_GPUS, Plan, make_plan
from elo.planning.run import GIB, GPUS, Gpu, Run
from elo.pretraining import LARGEST_BATCH, default_batch_tokens
from elo.runs.devices import DTYPES
from elo.slicing import parse_layers
from elo.variants.active_vocabulary import narrow
from elo.variants.lora import LoraOptions


def make_parser() -> Parser:
    parser = Parser(prog="python -m elo.planning", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint, or its config.json")
    parser.add_argument("--stage", choices=best.OF_STAGES, help="script (default: all, or train with --method)")
    parser.add_argument("--method", choices=METHODS, help="of train.py (default: all, or elo with --stage train)")
    parser.add_argument("--layers", help=f"of {' and '.join(OF_LAYERS)}, -1 is the last (default: {DEFAULT_LAYERS})")
    parser.add_argument("--bridge", action="store_true", help="of method elo")
    parser.add_argument("--active-vocabulary", type=positive_int, metavar="TOKENS", help=(
        "of method elo, which says how many when it begins"))  # fmt: skip
    parser.add_argument("--validation", action="store_true", help="with that: the whole head is kept for held-out text")
    parser.add_argument("--lora-rank", type=positive_int, help=f"(default: {LoraOptions.lora_rank})")
    parser.add_argument("--best", action="store_true", help="try all settings of speed and memory that are not given")
    parser.add_argument("words", nargs="*", metavar="-- OPTION", help="more for the command that --best prints")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")

    group = parser.add_argument_group("machine")
    group.add_argument("--gpu", choices=GPUS, help="kind, or the nearest one (default: H100)")
    for field in fields(Gpu):
        unit, what = field.metadata.values()
        group.add_argument(f"--gpu-{field.name}", type=positive, metavar=unit, help=f"{what} (default: the kind's)")
    group.add_argument("--gpus", type=positive_int, default=8, help="(%(default)s)")
    group.add_argument("--gpus-per-node", type=positive_int, default=8, help="(%(default)s)")
    group.add_argument("--utilization", type=positive_share, default=0.25, help=(
        "assumed share of the peak that products reach; about what the paper's hours imply (%(default)s)"))  # fmt: skip

    group = parser.add_argument_group("data, without which there are hours for 10^9 tokens")
    group.add_argument("--tokens", type=positive, help="of the run; of sft.py those of all epochs")
    group.add_argument("--gb", type=positive, help="10^9 bytes of text instead; needs --bytes-per-token")
    group.add_argument("--bytes-per-token", type=positive, help="of the tokenizer on this text")

    group = parser.add_argument_group("options of the scripts")
    group.add_argument("--seq-len", type=positive_int, default=2048, help="(%(default)s)")
    group.add_argument("--batch-tokens", type=positive_int, help=f"(default: {LARGEST_BATCH}, or fewer as of train.py)")
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
    for option, of in (("bridge", "elo"), ("active_vocabulary", "elo"), ("lora_rank", "lora")):
        if getattr(arguments, option) and not any(method == of for _, method in chosen):
            raise UserError(f"--{option.replace('_', '-')} goes with train.py --method {of}")
    if arguments.validation and not arguments.active_vocabulary:
        raise UserError("--validation changes a plan with --active-vocabulary only")
    if arguments.shard and arguments.gpus % arguments.shard:
        raise UserError(f"--shard {arguments.shard} does not divide the {arguments.gpus} GPUs")
    if arguments.best and not (stage or method):
        raise UserError("--best: of which stage? say --stage or --method")
    if arguments.dtype == "fp32" and not arguments.gpu_tflops:
        raise UserError("--dtype fp32: the GPUs' peaks are known here for bf16; give that for fp32 with --gpu-tflops")
    if arguments.stage != "sft" and (arguments.batch_tokens or 0) % arguments.seq_len:
        raise UserError(f"--batch-tokens {arguments.batch_tokens} is not a multiple of --seq-len {arguments.seq_len}")
    own = {field.name: value for field in fields(Gpu) if (value := getattr(arguments, f"gpu_{field.name}"))}
    if own and not arguments.gpu:
        raise UserError(f"--gpu-{next(iter(own))}: with --gpu KIND, or the nearest to a kind that is not in its list")
    common = {name: getattr(arguments, name) for name in Run.__dataclass_fields__ if hasattr(arguments, name)}
    common |= {"gpu": arguments.gpu or "H100", "tokens": token_count(arguments)}
    common["kind"] = replace(GPUS[common["gpu"]], **own)
    batch_tokens = arguments.batch_tokens or default_batch_tokens(common["tokens"] or inf, arguments.seq_len)
    runs = []
    for stage, method in chosen:
        batch = max(1, batch_tokens // arguments.seq_len), arguments.micro_batch
        if stage == "sft":
            batch = arguments.batch_conversations, max(1, arguments.micro_batch_tokens // arguments.seq_len)
        common |= {"stage": stage, "method": method, "batch_windows": batch[0], "micro_batch": batch[1]}
        runs.append(Run(**common))
    return runs


def planned(arguments: Namespace, config: ModelConfig) -> list[tuple[CausalLM, Run]]:
    """Raises UserError for options that do not go together, with each other or with the model."""
    runs = planned_runs(arguments)
    layers = arguments.layers and parse_layers(arguments.layers, config.num_hidden_layers)
    adapters = LoraOptions(lora_rank=arguments.lora_rank or LoraOptions.lora_rank)
    models = {run.method: methods.make(config, run.method, layers, adapters, arguments.bridge).model for run in runs}
    if (rows := arguments.active_vocabulary or 0) > config.vocab_size:
        raise UserError(f"--active-vocabulary {rows}: the model's vocabulary has {config.vocab_size}")
    if rows:
        narrow(models["elo"], rows, arguments.validation)
    return [(models[run.method], run) for run in runs]


def make_plans(arguments: Namespace, config: ModelConfig) -> list[Plan]:
    return [make_plan(model, run) for model, run in planned(arguments, config)]


def token_count(arguments: Namespace) -> float | None:
    if arguments.bytes_per_token and not arguments.gb:
        raise UserError("--bytes-per-token goes with --gb")
    if arguments.gb and arguments.tokens:
        raise UserError("--tokens and --gb say the same; give one of them")
    if arguments.gb and not arguments.bytes_per_token:
        what = "which depends on tokenizer and language, as 3.6 of Llama-3.1's on Korean"
        raise UserError(f"--gb needs --bytes-per-token, {what}")
    return arguments.gb * 1e9 / arguments.bytes_per_token if arguments.gb else arguments.tokens


def report(plan: Plan) -> Iterator[str]:
    run, flops, memory = plan.run, plan.flops, plan.memory
    setup, total = run.setup, flops.total
    yield f"{run.name} on {run.gpus} x {run.gpu}"
    yield f"parameters  {plan.trained / 1e6:,.1f} M trained of {plan.computed / 1e6:,.1f} M computed"
    yield (
        f"FLOPs       {total / 1e9:,.2f} G a token: forward {flops.forward / 1e9:,.2f}, backward "
        f"{flops.backward / 1e9:,.2f}, recomputed {flops.recomputed / 1e9:,.2f}; "
        f"attention is {flops.attention / total:.0%}, the head {flops.head / total:.0%}"
    )
    parts = {name: value / GIB for name, value in asdict(memory).items() if isinstance(value, int)}
    host = parts.pop("host")
    listed = ", ".join(f"{name} {value:,.1f}" for name, value in parts.items())
    yield f"memory      {memory.total / GIB:,.1f} GiB of the {run.usable / GIB:,.1f} usable in a GPU: {listed}"
    yield f"            highest at: {memory.moment}"
    if host:
        yield f"            and {host:,.1f} GiB of host memory for each GPU"
    rows = "conversations of at most" if run.stage == "sft" else "windows of"
    share = f"{setup.micro_batches} times {setup.tokens // run.seq_len}"
    yield f"a step      {run.batch_windows} {rows} {run.seq_len} tokens, in a GPU {share}"
    listed = ", ".join(f"{name} {value:,.2f}" for name, value in asdict(plan.step).items())
    yield f"            {plan.step.seconds:,.2f} s: {listed}"
    yield f"hours       {plan.hours:,.2f} for {run.amount}, predicted with products at {run.peak}"


def table(plans: list[Plan]) -> Iterator[str]:
    run = plans[0].run
    usable = f"{run.usable / GIB:,.1f} GiB usable in each"
    yield f"{run.gpus} x {run.gpu}, {usable}, products at {run.peak}; windows of {run.seq_len} tokens"
    title = f"{'':<27}{'M trained':>10}{'M computed':>12}{'GFLOP/token':>13}{'GiB/GPU':>9}"
    yield f"{title}  predicted hours for {run.amount}"
    for plan in plans:
        line = f"{plan.run.name:<27}{plan.trained / 1e6:>10,.1f}{plan.computed / 1e6:>12,.1f}"
        line += f"{plan.flops.total / 1e9:>13,.2f}{plan.memory.total / GIB:>9,.1f}"
        yield line + (f"  {plan.hours:,.2f}" if plan.fits else f"  does not fit; would with: {would_fit(plan)}")


def would_fit(plan: Plan) -> str:
    return ", or ".join(plan.remedies) or f"no option, and not on {MOST_GPUS} GPUs"


def refusal(plan: Plan) -> str:
    needed, usable = (f"{size / GIB:,.1f}" for size in (plan.memory.total, plan.run.usable))
    told = f"needs {needed} GiB in each GPU, and {usable} are usable"
    return f"{plan.run.name} {told}; it would fit with {would_fit(plan)}"


def as_json(plan: Plan) -> dict[str, Any]:
    """`hours` are those of run's `tokens`, or of 10^9."""
    flops = asdict(plan.flops) | {"total": plan.flops.total}
    memory = asdict(plan.memory) | {"total": plan.memory.total, "usable": plan.run.usable}
    return asdict(plan) | {"flops": flops, "memory": memory, "fits": plan.fits, "hours": plan.hours}


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    given = parser.parse_args(namespace=Namespace(**dict.fromkeys(vars(arguments))))  # None: left to its default
    if arguments.words and not arguments.best:
        raise UserError(f"{arguments.words[0]}: what stands after -- is for the command that --best prints")
    of_sft = ("batch_conversations", "micro_batch_tokens")
    for name in ("batch_tokens", "micro_batch", *of_sft) if arguments.stage or arguments.method else ():
        if getattr(given, name) and (name in of_sft) != (arguments.stage == "sft"):
            raise UserError(f"--{name.replace('_', '-')} is no option of {arguments.stage or 'train'}.py")
    check_output("--json", arguments.json, [arguments.model])
    if not arguments.model.exists():
        raise UserError(f"--model {arguments.model}: not found; give a checkpoint's directory or its config.json")
    config = ModelConfig.load(arguments.model)
    config.check_seq_len(arguments.seq_len)
    result: dict[str, Any] = {"model": str(arguments.model)}
    if arguments.best:
        ((model, run),) = planned(arguments, config)
        plans = best.considered(model, run, given)
        fitting = [plan for plan in plans if plan.fits]
        if not fitting:
            least = min(plans, key=lambda plan: plan.memory.total)
            raise UserError(refusal(make_plan(model, least.run)))
        result["command"] = best.command(fitting[0].run, given)
        told = [*best.table(plans), "", result["command"]]
    else:
        plans = make_plans(arguments, config)
        told = report(plans[0]) if arguments.stage or arguments.method else table(plans)
    if arguments.json:
        write_json(arguments.json, result | {"plans": [as_json(plan) for plan in plans]})
    if len(plans) == 1 and not plans[0].fits:
        raise UserError(refusal(plans[0]))
    show("\n".join(told))
