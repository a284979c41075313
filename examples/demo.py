"""ELO on a real model and real text, small enough for two CPU cores: SmolLM2-135M learns Korean.

    make demo

Stage 1 detaches the first and the last decoder layer, puts them between the model's own embedding and head, and
trains this small model on Korean with 10% English. Stage 2 puts back as much of what they learned as makes the whole
model best on a validation text, and trains all of it on the documents that follow. The control does only the latter:
the same documents, without stage 1. Text held out from training and from every choice shows what was learned: how many
bits a model needs for a byte of it; fewer is better.

Each command is printed as it is run, to be copied and changed. What it leaves is under runs/demo; what is there
already is not done again, and a demo that was stopped goes on where it was.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from elo.common.errors import EarlyExit, UserError, exit_status
from elo.runs.signals import end_with_parent
from eval.tables import table

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path("models/SmolLM2-135M-Instruct")
TEXTS = Path("data/demo")
RUNS = Path("runs/demo")
LANGUAGES = {"ko": "Korean", "en": "English"}
SEQ_LEN = 256
# Chosen on the validation text among the trials in docs/results.md, the control's rate by itself. Both stages together
# use up the Korean, nine parts in ten.
STAGE_1 = "--gb 0.00004 --batch-tokens 512 --lr 3e-4"
ALIGNMENT = "--gb 0.000028 --batch-tokens 256 --lr 2e-4"
CONTROL = "--gb 0.000028 --batch-tokens 256 --lr 2e-4"
LEVEL = 0.01  # bits a byte, below which two models are as good on so little text


class Row(NamedTuple):
    """A model's bits a byte of the held-out texts, and what was done to it."""

    name: str
    korean: float
    english: float
    training: str = ""


def main() -> None:
    from eval.figures import charts  # noqa: F401  before all work: whether there is a matplotlib

    if not (ROOT / MODEL / "config.json").exists():
        raise UserError(f"{MODEL} is absent: `make demo` makes it, or `python -m examples.smollm2 {MODEL}`")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    begun = time.perf_counter()

    heading("Korean and English text, parts of it for validation and held out")
    make(TEXTS / "en.train.jsonl", [Path("examples/texts.py")], f"-m examples.texts {TEXTS}")

    heading("Stage 1, ELO pretraining: layers 1 and 30 alone, on Korean with 10% English")
    elo = train("train.py", "elo", f"--layers 1,-1 {STAGE_1}")

    heading("The trained layers back in the model, without alignment: whole, and as much as suits the validation text")
    replaced = train("align.py", "replaced", f"--elo {elo} --gb 0", elo)
    validation = " ".join(f"{TEXTS}/{language}.validation.jsonl" for language in LANGUAGES)
    scaled = train("align.py", "scaled", f"--elo {elo} --gb 0 --scale auto --validation {validation}", elo)
    scale = ",".join(f"{scale:g}" for scale in json.loads((ROOT / scaled / "elo.json").read_text())["scale"])

    heading("Stage 2, alignment: all parameters, on the documents that follow")
    aligned = train("align.py", "aligned", f"--elo {elo} --scale {scale} {ALIGNMENT}", elo)

    heading("The control: the same alignment of the unchanged model")
    control = train("align.py", "control", f"--after {elo} {CONTROL}", elo)

    heading("Bits per byte of held-out text")
    rows = [
        Row("base", *bits_per_byte(MODEL)),
        Row("ELO without alignment", *bits_per_byte(replaced), cost(elo)),
        Row(f"ELO without alignment, --scale {scale}", *bits_per_byte(scaled), cost(elo)),
        Row("ELO + alignment", *bits_per_byte(aligned), cost(elo, aligned)),
        Row("alignment only", *bits_per_byte(control), cost(control)),
    ]
    cells = [(row.name, f"{row.korean:.3f}", f"{row.english:.3f}", row.training) for row in rows]
    cells = [("", *LANGUAGES.values(), "training"), *cells]
    figure = RUNS / "demo.png"
    draw(cells, [elo, aligned, control], figure)
    print(f"\n{table(cells)}\n\n{verdict(rows[0], *rows[3:])}\n")
    print(f"The demo took {time.perf_counter() - begun:.0f} s. Loss curves and this table: {figure}")
    python = os.path.relpath(sys.executable, ROOT)
    common = f"--model {MODEL} --seq-len {SEQ_LEN} --target data/target --source data/source"
    print(
        f"Talk to the model:\n    {python} -m elo.generation --model {aligned}\n"
        "Your own texts, 9 MB and then 1 MB, of a language in data/target and of English in data/source:\n"
        f"    {python} train.py {common} --gb 0.009 --lr 3e-4 --out runs/elo\n"
        f"    {python} align.py {common} --gb 0.001 --lr 1e-4 --elo runs/elo --out runs/aligned"
    )


def verdict(base: Row, aligned: Row, control: Row) -> str:
    """What the table says of ELO + alignment: beside the model it began with, and beside the control."""
    gained, spoiled = base.korean - aligned.korean, aligned.english / base.english - 1
    korean = f"{abs(gained):.2f} bits a byte {'less' if gained > 0 else 'MORE'} than the base in Korean"
    lines = [f"ELO + alignment needs {korean} and {abs(spoiled):.1%} {'MORE' if spoiled > 0 else 'less'} in English."]
    if gained <= 0 or spoiled > 0.03:
        lines.append("That is worse than the model it began with: other rates or a longer alignment are needed.")
    behind = aligned.korean - control.korean
    if behind > LEVEL:
        lines.append(
            f"The control is ahead by {behind:.3f} in Korean: on so little text the loss still falls steeply, and\n"
            "training all parameters makes more of each byte than two layers alone do. docs/results.md has the trials."
        )
    else:
        lines.append(f"In Korean it is {'level with' if behind > -LEVEL else f'{-behind:.3f} ahead of'} the control.")
    return "\n".join(lines)


def train(script: str, name: str, options: str, *after: Path) -> Path:
    """A stage into runs/demo/`name`, `after` what it is made from."""
    out = RUNS / name
    make(
        out / "config.json",
        [MODEL / "config.json", TEXTS / "en.train.jsonl", *(run / "config.json" for run in after)],
        f"{script} --model {MODEL} --target {TEXTS}/ko.train.jsonl --source {TEXTS}/en.train.jsonl --seq-len {SEQ_LEN}"
        f" --dtype {fast_dtype()} --save-every 30s {options} --out {out} --overwrite",
    )
    # A state of all parameters has 1.6 GB, and the run is finished.
    shutil.rmtree(ROOT / out / "checkpoints", ignore_errors=True)
    return out


def fast_dtype() -> str:
    """bf16 where the machine computes in it."""
    cpu = torch.cpu.get_capabilities()
    return "bf16" if torch.cuda.is_available() or cpu.get("amx_bf16") or cpu.get("avx512_bf16") else "fp32"


def bits_per_byte(model: Path) -> list[float]:
    """Of the held-out text, by language."""
    held_out = [f"{TEXTS}/{language}.heldout.jsonl" for language in LANGUAGES]
    result = RUNS / f"{model.name}.perplexity.json"
    make(
        result,
        [model / "config.json", TEXTS / "en.train.jsonl"],
        f"-m eval perplexity --model {model} --data {' '.join(held_out)}"
        f" --seq-len {SEQ_LEN} --dtype fp32 --json {result}",
    )
    scores = {score["file"]: score for score in json.loads((ROOT / result).read_text())["files"]}
    return [scores[file]["bits_per_byte"] for file in held_out]


def cost(*runs: Path) -> str:
    last_steps = [json.loads((ROOT / out / "metrics.jsonl").read_text().splitlines()[-1]) for out in runs]
    seconds, tokens = (sum(step[name] for step in last_steps) for name in ("seconds", "tokens"))
    return f"{tokens:,} tokens in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s"


def draw(cells: list[tuple[str, ...]], runs: list[Path], out: Path) -> None:
    """The runs' losses, and the table below them."""
    from eval.figures import charts, plot

    with charts.matplotlib.rc_context(charts.STYLE):
        figure = charts.Figure(figsize=(10, 6.5), layout="constrained")
        parts = figure.subplot_mosaic([["stage 1", "alignment"], ["table", "table"]], height_ratios=(3, 1))
        below = parts.pop("table")
        losses = plot.collect([ROOT / run for run in runs])["runs"]
        for name, style in charts.styles(losses).items():
            # Of a model of two layers, and of whole ones: another scale.
            curves = parts["stage 1" if name == "elo" else "alignment"]
            tokens, loss = (losses[name][field] for field in ("tokens", "loss"))
            curves.plot(tokens, loss, **style, alpha=0.3)
            smooth = charts.running_mean(charts.missing_as_nan(loss), 4)
            curves.plot(tokens, smooth, **style, linewidth=2, label=name)
        for title, curves in parts.items():
            curves.set(xlabel="tokens of the run", ylabel="training loss (nats a token)", title=title)
            curves.xaxis.set_major_formatter(charts.EngFormatter(sep=""))
            curves.legend()
        below.axis("off")
        below.set_title("bits a byte of held-out text")
        below.table(
            [cell[1:] for cell in cells[1:]], colLabels=cells[0][1:], rowLabels=[c[0] for c in cells[1:]], loc="center"
        )
        charts.FigureCanvasAgg(figure)
        figure.savefig(ROOT / out)


def make(result: Path, sources: list[Path], command: str) -> None:
    """Run python with these words, in the project's root, unless the result is there and newer than what it is made of.

    A change of this file makes everything anew, but for a run that was stopped and has the same options.
    """
    program = os.path.relpath(sys.executable, ROOT)
    print(f"\n$ {program} {command}", flush=True)
    times = [path.stat().st_mtime for path in (Path(__file__), *(ROOT / source for source in sources))]
    if (ROOT / result).exists() and (ROOT / result).stat().st_mtime >= max(times):
        print("(it is done)")
        return
    # A killed demo leaves nothing behind that another one would meet at its work.
    with_this = partial(end_with_parent, os.getpid())
    process = subprocess.Popen([program, *shlex.split(command)], cwd=ROOT, preexec_fn=with_this)
    try:
        status = process.wait()
    finally:
        process.terminate()  # if it is still there: it saves a state
        process.wait()
    if status:
        raise UserError(f"the command above failed with exit status {status}, and the demo ends here")
    if not (ROOT / result).exists():
        stop()


def stop(*_: object) -> NoReturn:
    raise EarlyExit("the demo was stopped; the same command goes on from there")


def heading(text: str) -> None:
    print(f"\n== {text}")


if __name__ == "__main__":
    exit_status(main)
