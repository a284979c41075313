"""The texts that no run trains on: some for choosing rates, some for the results; the same for all rows and seeds."""

import json
import random
import subprocess
import sys
from argparse import Namespace
from itertools import islice
from pathlib import Path

from elo.common.errors import UserError
from elo.cpu import onednn
from elo.data.documents import read_documents
from elo.data.finding import find_files
from experiments.engine import ROOT

AMONG = 5000  # documents, from the beginning
SIZES = range(200, 20_001)  # bytes of one that is held out: all of a file are within what --validation-mb reads of it
PARTS = {"validation": 0.5, "heldout": 1.0}  # times --held-out


def hold_out(options: Namespace) -> None:
    """Sets `options.held_out` to files for --validation, the target's for choosing first; writes them."""
    folder, number = options.out / "texts", options.held_out
    languages = [name for name in ("target", "source") if getattr(options, name)]
    paths = {(name, part): folder / f"{name}.{part}.jsonl" for part in PARTS for name in languages}
    options.held_out = list(map(str, paths.values()))
    for name in languages if not options.dry_run else ():
        every = islice(read_documents(find_files(getattr(options, name))), AMONG)
        documents = list(dict.fromkeys(text.text for text in every if len(text.text.encode()) in SIZES))
        if len(documents) < 3 * number:
            raise UserError(f"--{name}: {len(documents)} documents of {SIZES[0]} to {SIZES[-1]} bytes; "
                            f"of {3 * number} and more --held-out {number} leaves enough")  # fmt: skip
        random.Random(0).shuffle(documents)
        for part, times in PARTS.items():
            chosen, path = [documents.pop() for _ in range(round(times * number) or 1)], paths[name, part]
            lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen)
            if path.exists() and path.read_text() != lines:
                raise UserError(f"--out {options.out}: an experiment on other texts is there; give another directory")
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(lines)


def make_small(options: Namespace) -> None:
    """--small: what `make demo` trains, in its sizes."""
    folder = Path("data/demo")
    if not (folder / "ko.train.jsonl").exists():
        made = subprocess.run([sys.executable, "-m", "examples.texts", folder.absolute()], cwd=ROOT)
        if made.returncode:
            raise UserError("--small: the demo's texts could not be made, see above")
    options.model, options.gb, options.held_out = "models/SmolLM2-135M-Instruct", 0.00004, 12
    options.target, options.source = [f"{folder}/ko.train.jsonl"], [f"{folder}/en.train.jsonl"]
    dtype = "bf16" if onednn.HAS_BF16 else "fp32"
    options.training = ["--seq-len", "256", "--batch-tokens", "512", "--dtype", dtype, *options.training]
    options.rates = options.rates or ["elo=1e-3", "align=1e-4", "full=1e-4", "lora=1e-3", "selective=3e-4"]
