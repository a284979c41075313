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
from typing import Any

from benchmarks.training_step.report import figure3_text
from elo.common.errors import UserError, exit_status
from elo.common.options import Parser, positive, positive_int, seed
from elo.common.terminal import say, show
from elo.planning.budget import GPUS
from elo.runs.devices import device_name, inference_device
from eval.figures import plot
from eval.jsonl import read_lines
from experiments import report, texts
from experiments.chains import Row
from experiments.costs import Planning
from experiments.engine import Doing, FailedError
from experiments.kit import JUDGED, LIKELIHOOD, Kit

NAMES = ("table1", "table2", "table3", "figure2", "figure3")
METHODS = ("elo", "align", "full", "lora", "selective")


def parse_arguments() -> Namespace:
    parser = Parser(prog="python -m experiments", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--model", default="models/Llama-3.1-8B", metavar="DIR", help="base checkpoint (%(default)s)")
    parser.add_argument("--instruct", metavar="DIR", help="its instruction-tuned sibling, for the chat vector")
    parser.add_argument("--target", nargs="+", default=["data/target"], metavar="PATH", help="as of train.py")
    parser.add_argument("--source", nargs="+", metavar="PATH", help="English; without it there is none")
    parser.add_argument("--conversations", nargs="+", metavar="FILE", help="for sft.py")
    parser.add_argument("--benchmarks", metavar="DIR", help=f"folders of {', '.join((*LIKELIHOOD, *JUDGED))}")
    parser.add_argument("--judge-model", metavar="NAME", help="for the generation benchmarks")
    parser.add_argument("--base-url", metavar="URL", help="of the judge's endpoint")
    parser.add_argument("--gb", type=positive, default=10.0, help="10 units of text: 9 of stage 1, 1 of alignment")
    parser.add_argument("--processes", type=positive_int, default=1, help="GPUs of this machine (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--rates", nargs="+", default=[], metavar="METHOD=LR,...", help=(
        f"of {', '.join(METHODS)}: the best on validation text is taken (default: the script's)"))  # fmt: skip
    parser.add_argument("--training", default=[], type=words, help="more options of train.py and align.py, in quotes")
    parser.add_argument("--sft", default=[], type=words, help="more options of sft.py, in quotes")
    parser.add_argument("--held-out", type=positive_int, default=40, metavar="N", help=(
        "documents of each language for the results, and half as many for choosing rates (%(default)s)"))  # fmt: skip
    parser.add_argument("--seeds", type=seeds, default=[0], help="such as 0,1,2: mean and spread (0)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows by name")
    parser.add_argument("--equal-time", action="store_true", help="beside each ELO row alignment only for as long")
    parser.add_argument("--small", action="store_true", help="SmolLM2 and the demo's texts, on a CPU")
    parser.add_argument("--dry-run", action="store_true", help="print commands, tokens, disk and GPU hours only")
    parser.add_argument("--bytes-per-token", type=positive, help="for --dry-run (default: of the texts)")
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="for --dry-run (%(default)s)")
    parser.add_argument("--report", action="store_true", help="only draw again from the records")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    experiment, file = import_module(f"experiments.{options.name}"), options.out / f"{options.name}.jsonl"
    title = experiment.__doc__.splitlines()[0]
    if options.report:
        records = [line.record for line in read_lines(file)]
        if not records or any("left_out" not in record for record in records):
            raise UserError(f"{file}: no records of an experiment; run it without --report")
        return write_report(options, title, records)
    if options.small:
        texts.make_small(options)
    options.rates = parse_rates(options.rates)
    left_out = choose_benchmarks(options)
    texts.hold_out(options)
    kits = [Kit(options, number) for number in options.seeds]
    rows = [(kit, row) for kit in kits for row in choose_rows(experiment.rows(kit), options, kit)]
    wanted = [word for kit, row in rows for word in (row.model, *kit.measures(row.model).values())]
    planning = Planning(options)
    if options.dry_run:
        return planning.show(wanted)
    doing, records = Doing(options, planning.flops(wanted)), []
    for kit, row in rows:
        records.append(do_row(doing, kit, row) | {"left_out": left_out})
        file.with_suffix(".new").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in records))
        file.with_suffix(".new").replace(file)
    write_report(options, title, records)
    if failed := [f"{record['row']}: {record['failed']}" for record in records if "failed" in record]:
        raise UserError(f"{len(failed)} rows failed, the others are done; the same command tries again: {failed[0]}")
    return None


def seeds(text: str) -> list[int]:
    return list(dict.fromkeys(seed(part) for part in text.split(",")))


def words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r}: {error}") from None


def parse_rates(words: list[str]) -> dict[str, list[str]]:
    rates = {method: listed.split(",") for method, _, listed in (word.partition("=") for word in words)}
    try:
        valid = rates.keys() <= set(METHODS) and all(positive(rate) for listed in rates.values() for rate in listed)
    except ArgumentTypeError:
        valid = False
    if not valid:
        raise UserError(f"--rates {' '.join(words)}: give METHOD=LR,... with methods of {', '.join(METHODS)}")
    return rates


def choose_benchmarks(options: Namespace) -> list[str]:
    """Sets `options.benches`; returns what is left out and why."""
    left_out = {f"--{name}": [] for name in ("instruct", "conversations", "source") if not getattr(options, name)}
    why = {}
    for name in (*LIKELIHOOD, *JUDGED):
        if not options.benchmarks or not (Path(options.benchmarks) / name).is_dir():
            why[name] = "not in --benchmarks"
        elif name in JUDGED and not options.judge_model:
            why[name] = "no --judge-model"
    options.benches = [name for name in (*LIKELIHOOD, *JUDGED) if name not in why]
    return [*(f"{report.COLUMNS[name]} ({reason})" for name, reason in why.items()), *left_out]


def choose_rows(rows: list[Row], options: Namespace, kit: Kit) -> list[Row]:
    if options.equal_time:
        rows = list({row.name: row for row in [*rows, *(kit.in_time_of(row) for row in rows if row.control)]}.values())
    names = [row.name for row in rows]
    for name in options.only or ():
        if name not in names:
            raise UserError(f"--only {name}: the rows are {', '.join(names)}")
    return [row for row in rows if not options.only or row.name in options.only]


def do_row(doing: Doing, kit: Kit, row: Row) -> dict[str, Any]:
    """The record of a row for one seed: its figures, or why there are none."""
    record = {
        "row": row.name, "seed": kit.seed, "series": row.series, "at": row.at, "paper": row.paper, "figures": {},
        "rates": "", "device": device_name(inference_device()), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    try:
        last = doing.do(row.model)
        if kit.options.name == "figure3":
            return record | {"figures": doing.result(last)}
        training = doing.training(row.model)
        rates = [run.words[run.words.index("--lr") + 1] for run in training if "--lr" in run.words]
        record |= {"rates": ", ".join(rates), "commands": [doing.command(run) for run in training]}
        figures: dict[str, float] = record["figures"]
        figures["hours"] = doing.seconds(row.model) / 3600
        figures["tokens"] = sum(doing.last_step(run).get("tokens", 0) for run in training)
        results = {name: doing.do(run) for name, run in kit.measures(row.model).items()}
        measured = results.pop("perplexity", None)
        files = doing.result(measured)["files"] if measured else doing.last_step(training[-1])["validation"]
        for line in files:
            language, part, _ = Path(line["file"]).name.split(".")
            figures |= {language: line["bits_per_byte"]} if part == "heldout" else {}
        for name in kit.options.benches:
            found = doing.result(results[name])
            figures[name] = found["results"][name]["acc"] if name in LIKELIHOOD else found["models"]["row"]["average"]
    except FailedError as error:
        record["failed"] = str(error)
    return record


def write_report(options: Namespace, title: str, records: list[dict[str, Any]]) -> None:
    files = [options.out / f"{options.name}.{kind}" for kind in ("md", "png")]
    figures = records[0]["figures"]
    if "figure3" in figures:
        text = f"{title}\n\n" + "".join(f"    {line}\n" for line in figure3_text(figures["figure3"]).splitlines())
        from eval.figures import charts

        charts.draw({"kind": "speed", **plot.speed(files[1:], [figures])}, files[1], title)
    else:
        text = report.markdown(title, records)
        report.draw(title, records, files[1])
    files[0].write_text(text)
    show(text)
    say(f"written to {' and '.join(map(str, files))}")


if __name__ == "__main__":
    exit_status(main)
