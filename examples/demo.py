"""ELO on a real model and real text, small enough for two CPU cores: SmolLM2-135M learns Korean.

    make demo

Stage 1 detaches the first and the last decoder layer, puts them between the model's own embedding and head, and
trains this small model on Korean with 10% English. Stage 2 puts the layers back and trains the whole model on the
documents that follow. The control does only the latter: the same documents, without stage 1. Text held out from
training shows what was learned: how many bits a model needs for a byte of it; fewer is better.

Each command is printed as it is run, to be copied and changed. What it leaves is under runs/demo.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from elo.common.errors import UserError, exit_status

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path("models/SmolLM2-135M-Instruct")
TEXTS = Path("data/demo")
RUNS = Path("runs/demo")
LANGUAGES = {"ko": "Korean", "en": "English"}
SEQ_LEN = 256
ELO_GB, ALIGNMENT_GB = 0.000066, 0.00001  # of the 0.000078 that the Korean lasts for, at nine parts in ten


def main() -> None:
    if not (ROOT / MODEL / "config.json").exists():
        raise UserError(f"{MODEL} is absent: `make demo` makes it, or `python -m examples.smollm2 {MODEL}`")
    begun = time.perf_counter()

    heading("Korean and English text, a part of it held out")
    run(f"python -m examples.texts {TEXTS}")

    heading("The model of layers 1 and 30 alone, before training")
    plain_slice = train("train.py", "slice", "--layers 1,-1 --max-steps 0")

    heading("Stage 1, ELO pretraining: Korean with 10% English")
    elo = train("train.py", "elo", f"--layers 1,-1 --gb {ELO_GB} --lr 2e-3")

    heading("The trained layers back in the model, without alignment")
    replaced = train("align.py", "replaced", f"--elo {elo} --gb 0")

    heading("Stage 2, alignment: all parameters, on the documents that follow")
    aligned = train("align.py", "aligned", f"--elo {elo} --gb {ALIGNMENT_GB} --lr 1e-4")

    heading("The control: the same alignment of the unchanged model")
    control = train("align.py", "control", f"--after {elo} --gb {ALIGNMENT_GB} --lr 1e-4")

    rows = [
        ("layers 1 and 30 alone", plain_slice, []),
        ("layers 1 and 30 after ELO", elo, [elo]),
        ("base", MODEL, []),
        ("alignment only", control, [control]),
        ("ELO without alignment", replaced, [elo]),
        ("ELO + alignment", aligned, [elo, aligned]),
    ]
    heading("Bits per byte of held-out text")
    results = [(name, bits_per_byte(model), cost(runs)) for name, model, runs in rows]
    print(f"\n{'':28}" + "".join(f"{name:>9}" for name in LANGUAGES.values()) + "   training")
    for name, bits, training in results:
        print(f"{name:28}" + "".join(f"{value:9.2f}" for value in bits) + f"   {training}")
    print(f"\nThe demo took {time.perf_counter() - begun:.0f} s. The aligned model is {aligned}.")


def train(script: str, name: str, options: str) -> Path:
    """A stage into runs/demo/`name`: with two processes, but one where there is a single GPU."""
    out = RUNS / name
    processes = min(2, torch.cuda.device_count()) or 2
    threads = max(1, torch.get_num_threads() // processes)
    run(
        f"torchrun --standalone --nproc_per_node={processes} {script} --model {MODEL}"
        f" --target {TEXTS}/ko.train.jsonl --source {TEXTS}/en.train.jsonl --seq-len {SEQ_LEN} --batch-tokens 512"
        f" --dtype fp32 {options} --out {out} --overwrite",
        OMP_NUM_THREADS=threads,  # torchrun would give each process a single one
    )
    return out


def bits_per_byte(model: Path) -> list[float]:
    """Of the held-out text, by language."""
    held_out = [f"{TEXTS}/{language}.heldout.jsonl" for language in LANGUAGES]
    result = RUNS / f"{model.name}.perplexity.json"
    run(
        f"python -m eval perplexity --model {model} --data {' '.join(held_out)}"
        f" --seq-len {SEQ_LEN} --dtype fp32 --json {result}"
    )
    scores = {score["file"]: score for score in json.loads((ROOT / result).read_text())["files"]}
    return [scores[file]["bits_per_byte"] for file in held_out]


def cost(runs: list[Path]) -> str:
    last_steps = [json.loads((ROOT / out / "metrics.jsonl").read_text().splitlines()[-1]) for out in runs]
    if not last_steps:
        return "none"
    seconds, tokens = (sum(step[name] for step in last_steps) for name in ("seconds", "tokens"))
    return f"{tokens:,} tokens in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s"


def run(command: str, **environment: object) -> None:
    """Print a command and run it in the project's root, with the python or torchrun that runs this."""
    program, *arguments = shlex.split(command)
    program = os.path.relpath(Path(sys.executable).with_name(program), ROOT)
    settings = {name: str(value) for name, value in environment.items()}
    print("\n$", *(f"{name}={value}" for name, value in settings.items()), shlex.join([program, *arguments]))
    sys.stdout.flush()
    status = subprocess.run([program, *arguments], cwd=ROOT, env=os.environ | settings).returncode
    if status:
        raise UserError(f"the command above failed with exit status {status}, and the demo ends here")


def heading(text: str) -> None:
    print(f"\n== {text}")


if __name__ == "__main__":
    exit_status(main)
