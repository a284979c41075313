"""Peak memory of training a whole model, for the options that trade time for memory.

    python -m benchmarks.training_memory --model models/SmolLM2-135M-Instruct

Each is `train.py --method full` in a process of its own, on the same text with the same batches; the peak is the
largest `memory_bytes` of its metrics.jsonl: on a CPU of the whole process, Python and torch included.
"""

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from benchmarks.sides import compared_options
from elo.common.errors import UserError, exit_status
from elo.common.fields import write_json
from elo.common.options import Parser, positive_int
from elo.runs.devices import DTYPES
from examples import texts

ROOT = Path(__file__).resolve().parents[1]

VARIANTS = {
    "plain": [],
    "--activation-checkpointing": ["--activation-checkpointing"],
    "--optimizer-in-backward": ["--optimizer-in-backward"],
    "both": ["--activation-checkpointing", "--optimizer-in-backward"],
}


def arguments() -> Namespace:
    parser = Parser(prog="python -m benchmarks.training_memory", description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="(%(default)s)")
    parser.add_argument("--batch", type=positive_int, default=4, help="sequences in a step (%(default)s)")
    parser.add_argument("--seq-len", type=positive_int, default=512, help="tokens in a sequence (%(default)s)")
    parser.add_argument("--steps", type=positive_int, default=3, help="(%(default)s)")
    return compared_options(parser)


def main() -> None:
    options = arguments()
    rows = []
    print(f"{'':30} {'peak memory':>15} {'of plain':>9} {'tokens/s':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for language, documents in (("ko", texts.korean()), ("en", texts.english())):
            lines = [json.dumps({"text": text}) + "\n" for text in documents]
            Path(folder, f"{language}.jsonl").write_text("".join(lines))
        for name, switches in VARIANTS.items():
            steps = run(options, Path(folder), name, switches)
            peak = max(step["memory_bytes"] for step in steps)
            rows.append({"options": name, "memory_bytes": peak, "tokens_per_second": steps[-1]["tokens_per_second"]})
            share = peak / rows[0]["memory_bytes"]
            print(f"{name:30} {peak:15,} {share:9.2f} {steps[-1]['tokens_per_second']:9.1f}", flush=True)
    if options.json:
        write_json(options.json, {"dtype": options.dtype, "rows": rows})


def run(options: Namespace, folder: Path, name: str, switches: list[str]) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    out = folder / name
    command = [sys.executable, ROOT / "train.py", "--method", "full", "--model", options.model, "--clip", "0"]
    command += ["--target", folder / "ko.jsonl", "--source", folder / "en.jsonl", "--dtype", options.dtype]
    command += ["--seq-len", options.seq_len, "--micro-batch", options.batch, "--max-steps", options.steps, *switches]
    command += ["--batch-tokens", options.batch * options.seq_len, "--out", out]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{name}: {result.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    exit_status(main)
