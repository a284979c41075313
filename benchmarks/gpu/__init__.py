"""What a GPU makes of ELO's step, and what would make it faster: questions, a table, and what the answers decide.

    python -m benchmarks.gpu

Random weights of Llama-3.1-8B's shape with a few layers; nothing is downloaded. A  the best matrix product; B  the
loss and its candidates; C  attention; D  products in fp8; E  ELO's step beside that of transformers, and where its time
goes; F  full training; G  whether a stopped and resumed `train.py` gives equal bits. Each question is a process of its
own with a share of --minutes: what fails or is cut is named, and the others go on. Without a GPU a tiny shape is taken,
which rehearses everything that a CPU has and decides nothing.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.measuring import Row, attempt
from benchmarks.gpu.rules import decide
from benchmarks.gpu.shapes import EIGHT_B, TINY, Shape
from elo.common.errors import UserError
from elo.common.fields import check_output, write_json
from elo.common.options import Parser, positive
from elo.common.terminal import show
from elo.runs.devices import device_name, inference_device
from elo.runs.signals import end_with_parent


class Question(NamedTuple):
    answers: str  # module and function, imported in the question's own process
    seconds: float  # its part of the time, of ten minutes


QUESTIONS = {
    "A": Question("kernels.in_bf16", 20),
    "B": Question("kernels.losses", 75),
    "C": Question("kernels.attention", 60),
    "D": Question("kernels.in_fp8", 20),
    "E": Question("steps.elo", 210),
    "F": Question("steps.full", 110),
    "G": Question("steps.resume", 110),
}
CHECKPOINT, OF_A_CHECKPOINT = Question("shapes.checkpoint", 25), "EFG"
NAMES = ("case", "product", "form", "tokens")  # what a row is of


def questions(text: str) -> str:
    chosen = text.upper().replace(",", "")
    if not chosen or set(chosen) - QUESTIONS.keys():
        raise ArgumentTypeError(f"{text!r} is not some of {', '.join(QUESTIONS)}")
    return "".join(sorted(set(chosen)))


def parse_arguments() -> Namespace:
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", type=questions, default="".join(QUESTIONS), metavar="A,B", help="these questions")
    parser.add_argument("--minutes", type=positive, default=9.5, help="for all of them (%(default)g)")
    parser.add_argument("--tiny", action="store_true", help="the tiny shape, on a GPU too")
    result = "the result, written after each answer (%(default)s)"
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE", help=result)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    check_output("--json", options.json)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # with gigabytes removed
    device = inference_device()
    shape = TINY if options.tiny or device.type == "cpu" else EIGHT_B
    end = time.monotonic() + 60 * options.minutes
    rows: list[Row] = []
    result = {"device": device_name(device), "torch": torch.__version__, "shape": shape.name, "rows": rows}
    show(f"{result['device']}, torch {result['torch']}, {shape.name}\n\n| | case | measured |\n|---|---|---|")
    left = [(letter, QUESTIONS[letter]) for letter in options.only]
    if of_a_checkpoint := [place for place, (letter, _) in enumerate(left) if letter in OF_A_CHECKPOINT]:
        left.insert(of_a_checkpoint[0], ("", CHECKPOINT))
    with TemporaryDirectory(prefix="benchmarks-gpu-") as folder:
        while left:
            share = left[0][1].seconds / sum(question.seconds for _, question in left)
            letter, question = left.pop(0)
            for row in ask(question.answers, shape, Path(folder), share * (end - time.monotonic())):
                rows.append({"question": letter, **row})
                shown = {name: value for name, value in row.items() if name not in NAMES}
                show(f"| {letter} | {row['case']} | {words(shown)} |")
                result["decisions"] = decide(rows)
                write_json(options.json, result)
    title = "decision" if shape is EIGHT_B else "decision, if this were not the tiny shape"
    show(f"\n| rule | found | {title} |\n|---|---|---|")
    for decision in decide(rows):
        show(f"| {' | '.join(decision.values())} |")
    if failed := [row["case"] for row in rows if "error" in row]:
        raise UserError(f"{len(failed)} of {len(rows)} cases failed, the others are answered: {'; '.join(failed)}")


def ask(answers: str, shape: Shape, folder: Path, limit: float) -> Iterator[Row]:
    """The rows that a function gives in a process of its own, until it ends or `limit` seconds are over."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(there, answers, shape, folder, os.getpid()))
    process.start()
    there.close()
    end = time.monotonic() + limit
    try:
        while here.poll(max(0.0, end - time.monotonic())):
            yield here.recv()
        yield {"case": "the rest", "error": f"cut after {limit:.0f} s; --minutes gives more"}
    except EOFError:
        process.join()
        if process.exitcode:
            yield {"case": "the rest", "error": f"its process ended with status {process.exitcode}"}
    finally:
        process.kill()
        with suppress(ProcessLookupError):  # and those that it started
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def answer(pipe: Connection, answers: str, shape: Shape, folder: Path, parent: int) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, lambda number, frame: os.killpg(0, signal.SIGKILL))  # and those that it started
    end_with_parent(parent)
    os.dup2(2, 1)  # stdout is the table's
    name, function = answers.split(".")

    def send() -> Row:
        for row in getattr(importlib.import_module(f"benchmarks.gpu.{name}"), function)(shape, folder):
            pipe.send(row)
        return {}

    if (failed := attempt("the rest", send)).keys() > {"case"}:
        pipe.send(failed)


def words(value: Any) -> str:
    """A row's values as the table shows them."""
    if isinstance(value, dict):
        return "; ".join(f"{name.replace('_', ' ')} {words(held)}" for name, held in value.items())
    if isinstance(value, list):
        return ", ".join(map(words, value))
    return f"{value:,.{4 if abs(value) < 10 else 1}f}" if isinstance(value, float) else str(value)
