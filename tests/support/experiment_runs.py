"""Experiments on a tiny model, and with commands that only write what a run would."""

import gc
import json
import math
import shlex
import sys
from argparse import Namespace

import families
from commands import status_of

from experiments import __main__ as command
from experiments.runs import Runs

TRAINING = "--seq-len 32 --batch-tokens 64 --dtype fp32"
TINY = "table3 --model base --target ko.jsonl --source en.jsonl --held-out 4 --gb 0.00004 --rates elo=1e-2 align=1e-3"


def words(more, out="out"):
    return [*TINY.split(), "--training", TRAINING, "--out", out, *shlex.split(more)]


def run_here(monkeypatch, capsys, *arguments):
    """(status, stdout, stderr)"""
    gc.collect()  # a lock lasts as long as its process
    return status_of(monkeypatch, command.main, "experiments", *arguments), *capsys.readouterr()


def options(tmp_path, **changes):
    architecture, config = families.VARIANTS["llama3"]()
    (tmp_path / "base").mkdir(exist_ok=True)
    fields = {**config.to_dict(), "architectures": [architecture.__name__]}
    (tmp_path / "base/config.json").write_text(json.dumps(fields))
    given = {"model": f"{tmp_path}/base", "instruct": None, "target": ["ko"], "source": ["en"], "conversations": None}
    given |= {"benchmarks": None, "judge_model": None, "base_url": None, "gb": 10.0, "processes": 1, "out": tmp_path}
    given |= {"rates": {}, "training": [], "sft": [], "seeds": [0], "benches": [], "equal_time": False, "only": None}
    given |= {"held_out_files": [f"{tmp_path}/{language}.{part}.jsonl" for part, language in HELD_OUT], "held_out": 4}
    given |= {"bytes_per_token": 4.0, "gpu": "H100", "validation_mb": 4.0, "contents": {}}
    return Namespace(**(given | changes))


HELD_OUT = [(part, language) for part in ("validation", "heldout") for language in ("target", "source")]


def begun(given):
    runs = Runs(given)
    runs.begin()
    return runs


def pretending(monkeypatch, bits, seconds=2.0):
    """Every command writes a model and its last step; bits: of the validation text, by learning rate."""
    done = []

    def make(self, run):
        lr = run.option("--lr") or ""
        done.append((run.script, lr, run.words))
        value = bits.get(lr, 1.0)
        if value is None:
            return [sys.executable, "-c", "raise SystemExit('no such thing')"]
        # What is held out for the results is best where the validation text is worst.
        numbers = [None if math.isnan(number) else number for number in (value, 1.0, 10 - value, 5.0)]  # as runs do
        files = zip(self.options.held_out_files, numbers, strict=True)
        validation = [{"file": file, "bits_per_byte": number} for file, number in files]
        line = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "seconds": seconds, "tokens": 7, "validation": validation}
        result = {"files": validation, "file": f"there/{run.option('--judge-model')}_single.jsonl"}
        texts = {"metrics.jsonl": json.dumps(line) + "\n", "config.json": "{}", "result.json": json.dumps(result)}
        texts["elo.json"] = json.dumps({"scale": [0.1, 1.0]})
        texts["run.json"] = json.dumps({"device": "here", "processes": 1, "started": "2026-01-02T03:04:05+0000"})
        run.directory.mkdir(parents=True, exist_ok=True)
        (run.directory / "aside.json").write_text(json.dumps(texts))
        code = "import json, os; [open(n, 'w').write(t) for n, t in json.load(open('aside.json')).items()]"
        return [sys.executable, "-S", "-c", f"import os; os.chdir({str(run.directory)!r}); {code}"]

    monkeypatch.setattr(Runs, "start", starting(make))
    return done


def starting(make, start=Runs.start):
    """The command is asked for once a run, where it is started."""

    def start_once(self, run):
        made = make(self, run)
        self.command = lambda run: made
        start(self, run)
        del self.command

    return start_once
