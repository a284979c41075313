"""The paper's tables and figures, and the controls that it lacks: rows of the stages' own commands.

    python -m experiments table1 --dry-run --model models/Llama-3.1-8B --target data/ko --source data/en --gb 10 \\
        --processes 8 --bytes-per-token 3.6
    python -m experiments table3 --small

Runs are in OUT/runs, each under a name that follows from its command: what rows or experiments share is done once, and
the same command goes on where it was interrupted. Records go to OUT/NAME.jsonl, the table to NAME.md and NAME.png.
"""

import json
import shlex
import time
from argparse import ArgumentTypeError, Namespace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from elo import methods
from elo.common.errors import UserError, exit_status
from elo.common.fields import is_number, read_json_object
from elo.common.options import Parser, positive, positive_int, seed
from elo.common.terminal import say, show
from elo.cpu import onednn
from elo.planning.run import GPUS
from elo.runs.devices import device_name, inference_device
from eval.jsonl import read_lines
from examples import texts
from experiments import inputs, report
from experiments.rows import BENCHMARKS, LIKELIHOOD, Kit, Row, in_time_of
from experiments.runs import FailedError, Run, Runs

NAMES = ("table1", "table2", "table3", "figure2", "figure3")
RECORD = dict.fromkeys(("row", "rates", "model", "device", "date"), str) | {
    "seed": int,
    "figures": dict,
    "settings": dict,
}
METHODS = (*methods.METHODS, "align")
OWN = {"--model", "--target", "--source", "--data", "--gb", "--seed", "--out", "--elo", "--after", "--validation"}
OWN |= {"--method", "--layers", "--scale", "--bridge", "--merge", "--validation-field", "--validation-mb"}
DEMO = Path("data/demo")
# What `make demo` trains, in its sizes, as defaults; the rates were not searched for.
SMALL = f"""--model models/SmolLM2-135M-Instruct --target {DEMO}/ko.train.jsonl --source {DEMO}/en.train.jsonl
    --training "--seq-len 256 --batch-tokens 512 --dtype {"bf16" if onednn.HAS_BF16 else "fp32"}" --held-out 12
    --rates elo=1e-3 align=1e-4 full=1e-4 lora=1e-3 selective=3e-4 --bytes-per-token 1.25 --gb 0.00004"""


def parse_arguments() -> Namespace:
    parser = Parser(prog="python -m experiments", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--model", default="models/Llama-3.1-8B", metavar="DIR", help="base checkpoint (%(default)s)")
    parser.add_argument("--instruct", metavar="DIR", help="its instruction-tuned sibling, for the chat vector")
    parser.add_argument("--target", nargs="+", default=["data/target"], metavar="PATH", help="as of train.py")
    parser.add_argument("--source", nargs="+", metavar="PATH", help="English; without it there is none")
    parser.add_argument("--conversations", nargs="+", metavar="FILE", help="for sft.py")
    parser.add_argument("--benchmarks", metavar="DIR", help=f"folders of {', '.join(BENCHMARKS)}")
    parser.add_argument("--judge-model", metavar="NAME", help="for the generation benchmarks")
    parser.add_argument("--base-url", metavar="URL", help="of the judge's endpoint")
    parser.add_argument("--gb", type=positive, default=10.0, help="10 units of text: 9 of stage 1, 1 of alignment")
    parser.add_argument("--processes", type=positive_int, default=1, help="GPUs of this machine (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--rates", nargs="+", default=[], type=rates, metavar="METHOD=LR,...", help="the best is taken")
    parser.add_argument(
        "--training", default=[], type=shlex.split, action="extend", help='for train.py and align.py: "--dtype fp32"'
    )
    parser.add_argument("--sft", default=[], type=shlex.split, action="extend", help="for sft.py, likewise")
    parser.add_argument("--held-out", type=positive_int, default=40, metavar="N", help="documents (%(default)s)")
    parser.add_argument("--seeds", type=seeds, default=[0], help="such as 0,1,2: mean and spread (0)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows by name; the others' records stay")
    parser.add_argument("--equal-time", action="store_true", help="beside each ELO row alignment only for as long")
    parser.add_argument("--small", action="store_true", help="SmolLM2 and the demo's texts, on a CPU")
    parser.add_argument("--dry-run", action="store_true", help="print commands, tokens, disk and GPU hours only")
    parser.add_argument("--bytes-per-token", type=positive, help="of the tokenizer on this text, for --dry-run")
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="for --dry-run (%(default)s)")
    parser.add_argument("--report", action="store_true", help="only make table and picture again")
    options = parser.parse_args()
    if options.small:
        parser.set_defaults(**vars(parser.parse_args([options.name, *shlex.split(SMALL)])))
        options = parser.parse_args()
    benchmarks = BENCHMARKS if options.judge_model else LIKELIHOOD
    options.benches = [name for name in benchmarks if Path(options.benchmarks or "/dev/null", name).is_dir()]
    given, options.rates = options.rates, {}
    for method, listed in given:  # of a method named twice all
        options.rates[method] = [*options.rates.get(method, []), *listed]
    for name, needed in (("sft", "conversations"), ("judge_model", "benchmarks"), ("base_url", "judge_model")):
        if getattr(options, name) and not getattr(options, needed):
            raise UserError(f"--{name.replace('_', '-')} does nothing without --{needed.replace('_', '-')}")
    for name in sorted(OWN & {word.partition("=")[0] for word in (*options.training, *options.sft)}):
        raise UserError(f"{name} in --training or --sft: the experiment sets it itself, by its rows and own options")
    if options.dry_run and not options.bytes_per_token:
        raise UserError("--dry-run needs --bytes-per-token, such as 3.6 for Llama-3.1's tokenizer and Korean")
    options.bytes_per_token = options.bytes_per_token or 4.0  # only the runs' proportions count then
    names = [name for name in inputs.LANGUAGES if getattr(options, name)]
    options.held_out_files = [f"{options.out}/texts/{name}.{part}.jsonl" for part in inputs.PARTS for name in names]
    # Equal parts of --validation-mb, each a whole file.
    options.validation_mb = max(4.0, len(options.held_out_files) * options.held_out * inputs.SIZES[-1] / 1e6)
    return options


def main() -> None:
    options = parse_arguments()
    experiment, file = import_module(f"experiments.{options.name}"), options.out / f"{options.name}.jsonl"
    if options.report:
        return tell(experiment, read_records(file, {}), file)
    if options.small and not options.dry_run and not (DEMO / "ko.train.jsonl").exists():
        texts.write_all(DEMO)
    options.contents = inputs.contents(options)
    if not options.dry_run:
        inputs.check(options)
    runs, chosen = Runs(options), choose_rows(experiment.rows(options), options)
    rows = [(Kit(runs, number), row) for number in options.seeds for row in chosen]
    for kit, row in rows:
        row.measure(kit, row.model(kit), {})
    if options.dry_run:
        return runs.show()
    runs.begin()
    settings = inputs.settings(options)
    records = {(r["row"], r["seed"]): r for r in read_records(file, settings)}
    inputs.hold_out(options)
    for kit, row in rows:
        records[row.name, kit.seed] = do_row(kit, row) | {"settings": settings}
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records.values()]
        file.with_suffix(".new").write_text("".join(lines))
        file.with_suffix(".new").replace(file)
    tell(experiment, list(records.values()), file)
    done = [records[row.name, kit.seed] for kit, row in rows]
    if failed := [record["failed"] for record in done if "failed" in record]:
        raise UserError(f"{len(failed)} rows failed, the rest is done; the same command tries again: {failed[0]}")
    return None


def tell(experiment: ModuleType, records: list[dict[str, Any]], file: Path) -> None:
    """Table and picture."""
    if not records:
        raise UserError(f"{file}: no records of an experiment; run it without --report")
    show(report.write(experiment, records, file))
    say(f"written to {file.with_suffix('.md')} and {file.with_suffix('.png')}")


def read_records(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Raises UserError for what is no record, and for those of an experiment with other settings."""
    records = [line.record for line in read_lines(file)] if file.exists() else []
    for number, record in enumerate(records, start=1):
        is_whole = all(isinstance(record.get(name), kind) for name, kind in RECORD.items())
        if not (is_whole and all(is_number(record["figures"].get(name, 0)) for name in report.COLUMNS)):
            raise UserError(f"{file}: record {number} is none of an experiment, or of an older one; move it away")
        for name, value in settings.items():
            if record["settings"].get(name, value) != value:
                option = "--benchmarks" if name in BENCHMARKS else f"--{name.replace('_', '-')}"
                raise UserError(f"{file}: its rows have another {option}; move it away or give another --out")
    return records


def seeds(text: str) -> list[int]:
    return list(dict.fromkeys(seed(part) for part in text.split(",")))


def rates(text: str) -> tuple[str, list[str]]:
    method, _, listed = text.partition("=")
    if method not in METHODS:
        raise ArgumentTypeError(f"{text!r} is not METHOD=LR,... with a method of {', '.join(METHODS)}")
    return method, [part for part in listed.split(",") if positive(part)]


def choose_rows(rows: list[Row], options: Namespace) -> list[Row]:
    if options.equal_time:
        rows = list({row.name: row for row in [*rows, *(in_time_of(row) for row in rows if row.control)]}.values())
    rows = [row for row in rows if row.name != "instruct" or options.instruct]
    for name in options.only or ():
        if name not in (names := [row.name for row in rows]):
            raise UserError(f"--only {name}: the rows are {'; '.join(names)}")
    return [row for row in rows if not options.only or row.name in options.only]


def do_row(kit: Kit, row: Row) -> dict[str, Any]:
    """The record of a row for one seed: its figures, or why some are missing."""
    figures, runs, options = dict[str, Any](), kit.runs, kit.runs.options
    record = {"row": row.name, "seed": kit.seed, "rates": "", "figures": figures, "model": Path(options.model).name}
    record["device"] = machine(options.processes, device_name(inference_device()))
    record["date"] = time.strftime("%Y-%m-%d")
    try:
        model = row.model(kit)
        training = runs.made_of.get(model, [])
        record["rates"] = ", ".join(rate_of(run, options.rates) for run in training if run.option("--lr"))
        figures["hours"] = runs.seconds(model)[0] / 3600
        figures["tokens"] = sum(run.last_step.get("tokens", 0) for run in training)
        if made := [read_json_object(run.directory / "run.json") for run in training]:  # some perhaps long before
            machines = dict.fromkeys(machine(run["processes"], run["device"]) for run in made)
            record |= {"device": " and ".join(machines), "date": made[-1]["started"][:10]}
        row.measure(kit, model, figures)
    except FailedError as error:
        record["failed"] = str(error)
    return record


def machine(processes: int, device: str) -> str:
    return f"{processes} x {device}" if processes > 1 else device


def rate_of(run: Run, rates: dict[str, list[str]]) -> str:
    """With a star if it is the lowest or highest of those that were tried, beyond which there may be a better one."""
    rate, tried = run.option("--lr"), sorted(map(float, rates.get(run.method, [])))
    return f"{rate}*" if len(tried) > 1 and float(rate) in (tried[0], tried[-1]) else rate


if __name__ == "__main__":
    exit_status(main)
