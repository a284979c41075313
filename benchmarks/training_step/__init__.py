"""Training steps of ELO, full training and LoRA beside transformers and peft: tokens a second, memory, where time goes.

Each method is measured as this project trains it and as transformers (for LoRA peft) does, on the same slice or model
with the same parts frozen, batch, dtype, optimizer and clipping. Every measurement is a process of its own that warms
up and then takes steps; they come in turns, round after round, so that the machine's moods hit all alike.

With --data the batches come from those texts' tokens, otherwise from random ones. --tokenization measures also how
fast the text becomes tokens, beside tiktoken, and --figure3 how long each method takes for 10 to 200 GB of such text.
"""

import importlib.util
import os
import platform
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.sides import apart
from benchmarks.training_step import report, steps, tokenization
from benchmarks.training_step.steps import PARTS, Case
from elo.common.errors import UserError
from elo.common.fields import check_output, write_json
from elo.common.options import Parser, positive, positive_int
from elo.common.terminal import show
from elo.data.finding import find_files
from elo.data.shards import tokenize
from elo.methods import DEFAULT_LAYERS, make
from elo.model.checkpoint import Checkpoint
from elo.planning.costs import count_flops
from elo.runs.devices import DTYPES, device_name, inference_device
from elo.slicing import parse_layers
from elo.variants.lora import LoraOptions
from eval.figures import plot

OTHERS = {"elo": "transformers", "full": "transformers", "lora": "peft"}


def parse_arguments() -> Namespace:
    parser = Parser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, help="of computation (default: both)")
    parser.add_argument("--model", required=True, metavar="DIR", help="the base checkpoint")
    parser.add_argument("--methods", default="elo", help="elo,full,lora, or some of them (%(default)s)")
    parser.add_argument("--layers", default=DEFAULT_LAYERS, help="that method elo detaches and trains (%(default)s)")
    parser.add_argument("--batch", type=positive_int, default=4, help="sequences in a step (%(default)s)")
    parser.add_argument("--seq-len", type=positive_int, default=512, help="tokens in a sequence (%(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="processes of each kind (%(default)s)")
    parser.add_argument(
        "--seconds", type=positive, default=5.0, help="of steps in a process, at least one step (%(default)s)"
    )
    lora = LoraOptions()
    parser.add_argument("--lora-rank", type=positive_int, default=lora.lora_rank, help="of method lora (%(default)s)")
    parser.add_argument("--lora-alpha", type=positive, default=lora.lora_alpha, help="of method lora (%(default)s)")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="texts to train on, files, directories or globs")
    parser.add_argument("--text-field", default="text", help="of JSON lines and Parquet (%(default)s)")
    parser.add_argument("--tokenization", action="store_true", help="also of each file's text; needs --data")
    parser.add_argument("--figure3", action="store_true", help="hours for 10 to 200 GB; needs --data and all --methods")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it, as eval plot does")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    base, methods = check(arguments)
    dtypes = [arguments.dtype] if arguments.dtype else list(DTYPES)
    result: dict[str, Any] = {"machine": describe_machine(), "options": options_of(arguments)}
    with tempfile.TemporaryDirectory(prefix="training-step-") as cache:
        cases = make_cases(arguments, base, methods, dtypes, cache)
        files = find_files(arguments.data) if arguments.data else []
        if files:  # once, before the processes that only read them
            shard = tokenize(files, arguments.model, cache, text_field=arguments.text_field)
            result["bytes_per_token"] = shard.bytes / len(shard.tokens)
            if len(shard.tokens) <= arguments.batch * arguments.seq_len:
                raise UserError(f"--data: its {len(shard.tokens)} tokens are no batch of --batch x --seq-len")
        peaks, replies = run_rounds(cases, dtypes, arguments.rounds)
    result["matmul_peak"] = {
        dtype: {
            "flops_per_second": statistics.median(peak[dtype]["flops_per_second"] for peak in peaks),
            "products": sorted({peak[dtype]["product"] for peak in peaks}),
        }
        for dtype in dtypes
    }
    result["rows"] = rows = [
        make_row(case, measured, base, result["matmul_peak"][case.dtype]["flops_per_second"])
        for case, measured in zip(cases, replies, strict=True)
    ]
    show(report.rows_text(rows))
    for dtype, peak in result["matmul_peak"].items():
        show(f"{dtype} matrix products: {peak['flops_per_second'] / 1e9:,.1f} GFLOP/s ({', '.join(peak['products'])})")
    if arguments.tokenization:
        found = tokenization.measure(arguments.model, files, arguments.text_field, arguments.rounds)
        result["tokenization"] = found
        show("\n" + report.tokenization_text(found))
    result["ratios"] = report.ratios(rows)
    result["bars"] = report.bars(rows, result.get("tokenization", []))
    show("\n" + report.bars_text(result["bars"]))
    if arguments.figure3:
        result["figure3"] = report.figure3(rows, dtypes[0], result["bytes_per_token"])
        show("\n" + report.figure3_text(result["figure3"]))
    if arguments.json:
        write_json(arguments.json, result)
    if arguments.plot:
        # Only here is matplotlib needed.
        from eval.figures import charts

        charts.draw({"kind": "speed", **plot.speed({arguments.plot: result})}, arguments.plot, None)


def check(arguments: Namespace) -> tuple[Checkpoint, list[str]]:
    """Before minutes of work: the base and the methods. Raises UserError for what cannot end well."""
    methods = list(dict.fromkeys(arguments.methods.split(",")))
    for method in methods:
        if method not in OTHERS:
            raise UserError(f"--methods {arguments.methods}: {method!r} is none of {', '.join(OTHERS)}")
        if importlib.util.find_spec(OTHERS[method]) is None:
            raise UserError(f"method {method} is compared with {OTHERS[method]}: pip install {OTHERS[method]}")
    for option in ("tokenization", "figure3"):
        if getattr(arguments, option) and not arguments.data:
            raise UserError(f"--{option} needs texts: give --data")
    if arguments.figure3 and len(methods) < len(OTHERS):
        raise UserError(f"--figure3 needs every method: give --methods {','.join(OTHERS)}")
    inputs = [arguments.model, *(arguments.data or [])]
    check_output("--json", arguments.json, inputs)
    if arguments.plot:
        plot.check_figure("--plot", arguments.plot, [*inputs, *([arguments.json] if arguments.json else [])])
    base = Checkpoint(arguments.model)
    base.config.check_seq_len(arguments.seq_len)
    return base, methods


def describe_machine() -> dict[str, Any]:
    return {
        "device": device_name(inference_device()),
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def options_of(arguments: Namespace) -> dict[str, Any]:
    names = ("model", "methods", "layers", "batch", "seq_len", "rounds", "seconds", "lora_rank", "lora_alpha", "data")
    return {name: getattr(arguments, name) for name in names}


def make_cases(
    arguments: Namespace, base: Checkpoint, methods: Iterable[str], dtypes: Iterable[str], cache: str
) -> list[Case]:
    return [
        Case(
            model=arguments.model,
            method=method,
            implementation=implementation,
            dtype=dtype,
            layers=parse_layers(arguments.layers, base.config.num_hidden_layers) if method == "elo" else (),
            batch=arguments.batch,
            seq_len=arguments.seq_len,
            seconds=arguments.seconds,
            adapters=LoraOptions(arguments.lora_rank, arguments.lora_alpha),
            data=tuple(arguments.data or ()),
            text_field=arguments.text_field,
            cache=cache,
        )
        for dtype in dtypes
        for method in methods
        for implementation in ("elo", OTHERS[method])
    ]


def run_rounds(
    cases: list[Case], dtypes: list[str], rounds: int
) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """The matrix products of each round, and of each case what its processes measured."""
    peaks: list[dict[str, Any]] = []
    replies: list[list[dict[str, Any]]] = [[] for _ in cases]
    with tqdm(total=rounds * (1 + len(cases)), unit="process", disable=None) as bar:
        for _ in range(rounds):
            bar.set_description("matrix products")
            peaks.append(apart(steps.matmul_peaks, dtypes))
            bar.update()
            for case, measured in zip(cases, replies, strict=True):
                bar.set_description(f"{case.method} {case.implementation} {case.dtype}")
                measured.append(apart(steps.measure, case))
                bar.update()
    return peaks, replies


def make_row(case: Case, measured: list[dict[str, Any]], base: Checkpoint, peak: float) -> dict[str, Any]:
    """Median, slowest and fastest of the processes; memory and shares of the time are medians too."""
    tokens = case.batch * case.seq_len
    rates = [tokens / reply["seconds"] for reply in measured]
    model = make(base.config, case.method, case.layers or None, case.adapters).model
    flops = count_flops(model, case.seq_len).total
    return {
        "method": case.method,
        "implementation": case.implementation,
        "dtype": case.dtype,
        "tokens_per_second": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "memory_bytes": round(statistics.median(reply["memory_bytes"] for reply in measured)),
        "flops_per_token": flops,
        "peak_share": statistics.median(rates) * flops / peak,
        "parts": {name: statistics.median(reply["parts"][name] for reply in measured) for name in PARTS},
        "loss": measured[0]["loss"],
        "rounds": measured,
    }
