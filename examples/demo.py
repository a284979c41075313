"""ELO on a real model and real text, small enough for two CPU cores: SmolLM2-135M learns Korean.

    make demo

ELO pretraining detaches the first and the last decoder layer, puts them between the model's own embedding and
head, and trains this small model on Korean with 10% English. Text held out from training shows what was
learned: how many bits the model needs for a byte of it; fewer is better.

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from elo.errors import UserError, exit_status

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path("models/SmolLM2-135M-Instruct")
TEXTS = Path("data/demo")
RUNS = Path("runs/demo")
LANGUAGES = {"ko": "Korean", "en": "English"}
SEQ_LEN = 256


def main() -> None:
    if not (ROOT / MODEL / "config.json").exists():
        raise UserError(f"{MODEL} is absent: `make demo` makes it, or `python examples/smollm2.py {MODEL}`")
    begun = time.perf_counter()

    heading("Korean and English text, a part of it held out")
    run(f"python examples/texts.py {TEXTS}")

    heading("The model of layers 1 and 30 alone, before training")
    before = pretrain("slice", "--max-steps 0")
    rows = [("layers 1 and 30 as they were", bits_per_byte(before), "none")]

    heading("ELO pretraining: one epoch of Korean with 10% English")
    after = pretrain("elo")
    rows.append(("after ELO pretraining", bits_per_byte(after), cost(after)))

    heading("Bits per byte of held-out text")
    print(f"\n{'':28}" + "".join(f"{name:>9}" for name in LANGUAGES.values()) + "   training")
    for name, bits, training in rows:
        print(f"{name:28}" + "".join(f"{value:9.2f}" for value in bits) + f"   {training}")
    print(f"\nThe demo took {time.perf_counter() - begun:.0f} s. The model of the trained layers is {after}.")


def pretrain(name: str, more_options: str = "") -> Path:
    """Stage 1 into runs/demo/`name`: with two processes, but one where there is a single GPU."""
    out = RUNS / name
    processes = min(2, torch.cuda.device_count()) or 2
    threads = max(1, torch.get_num_threads() // processes)
    run(
        f"torchrun --standalone --nproc_per_node={processes} train.py --model {MODEL} --layers 1,-1"
        f" --target {TEXTS}/ko.train.jsonl --source {TEXTS}/en.train.jsonl --target-fraction 0.9"
        f" --seq-len {SEQ_LEN} --batch-tokens 512 --lr 2e-3 --dtype fp32"
        f" --out {out} --overwrite {more_options}",
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


def cost(model: Path) -> str:
    last_step = json.loads((ROOT / model / "metrics.jsonl").read_text().splitlines()[-1])
    seconds, tokens = last_step["seconds"], last_step["tokens"]
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
