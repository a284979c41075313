"""Does the runs of an experiment, each once, and goes on where it was interrupted by the runs' own resume."""

import ctypes
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from elo.common.errors import EarlyExit
from elo.common.fields import read_json_object
from elo.common.terminal import note, say
from elo.runs.directory import read_metrics
from experiments.chains import Best, EqualTime, Needs, Run, Word, choose_first, needed
from experiments.kit import PRETRAINING

ROOT = Path(__file__).resolve().parents[1]
TRAINING = (*PRETRAINING, "sft.py")
DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl


class FailedError(Exception):
    """A run failed; what needs it cannot be done."""


class Engine:
    """The commands of runs, and their results."""

    def __init__(self, options: Namespace) -> None:
        self.options, self.failed = options, dict[str, str]()
        self.choose = choose_first  # of the candidates of a choice; `Doing` looks at results

    def directory(self, run: Run) -> Path:
        return self.options.out / "runs" / run.name

    def text(self, word: Word, run: Run) -> str:
        if isinstance(word, EqualTime):
            gb = float(word.like.words[word.like.words.index("--gb") + 1])
            return f"{gb * self.seconds(word.chain) / self.seconds(word.like):.9g}"
        return word.replace("{here}", str(self.directory(run))) if isinstance(word, str) else str(self.directory(word))

    def command(self, run: Run) -> list[str]:
        words = [self.text(word, run) for word in run.words if not isinstance(word, Needs)]
        if run.script not in TRAINING:
            script = [str(ROOT / run.script)] if run.script.endswith(".py") else ["-m", *run.script.split()]
            return [sys.executable, *script, *words]
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.options.processes}"]
        return [sys.executable, *(several if self.options.processes > 1 else []), str(ROOT / run.script), *words]

    def training(self, word: Word) -> list[Run]:
        """The training runs that a model is made of, without those that chose."""
        return [run for run in needed(word, self.choose, judges=False) if run.script in TRAINING]

    def last_step(self, run: Run) -> dict[str, Any]:
        return (read_metrics(self.directory(run)) or [{}])[-1]

    def seconds(self, word: Word) -> float:
        return sum(self.last_step(run).get("seconds", 0.0) for run in self.training(word))

    def is_done(self, run: Run) -> bool:
        return (self.directory(run) / ("config.json" if run.script.endswith(".py") else "result.json")).exists()

    def result(self, run: Run) -> dict[str, Any]:
        return read_json_object(self.directory(run) / "result.json")


class Doing(Engine):
    """Does what is needed. flops: of a run, for the time that remains."""

    def __init__(self, options: Namespace, flops: dict[str, float]) -> None:
        super().__init__(options)
        self.flops, self.choose = flops, self.best
        self.child: subprocess.Popen | None = None
        self.stops = False
        self.spent = [0.0, 0.0]  # seconds, FLOPs
        options.out.mkdir(parents=True, exist_ok=True)
        # Held by the runs too: what a killed experiment leaves is waited for.
        self.lock = open(options.out / "lock", "w")  # noqa: SIM115  until the process ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"{options.out}: waiting for the experiment that is at work there")
            fcntl.flock(self.lock, fcntl.LOCK_EX)
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)

    def stop(self, *_: object) -> None:
        """The run saves its state and leaves, and then so does the experiment."""
        self.stops = True
        if self.child is not None:
            self.child.send_signal(signal.SIGTERM)

    def best(self, best: Best) -> int:
        bits = []
        for judge in best.judges:
            *_, run = needed(judge, self.choose, judges=False)
            by_file = self.last_step(run).get("validation", [])
            # By the target language's text; what is held out for the results has no say.
            found = [line["bits_per_byte"] for line in by_file if line["file"] == self.options.held_out[0]]
            bits.append(found[0] if found and found[0] == found[0] else float("inf"))
        return bits.index(min(bits))

    def do(self, word: Word) -> Run | None:
        """The last run of those that `word` needs. Raises FailedError if one of them fails, or has failed before."""
        run = None
        for run in needed(word, self.choose):
            if run.key in self.failed:
                raise FailedError(self.failed[run.key])
            if not self.is_done(run):
                self.run(run)
        return run

    def run(self, run: Run) -> None:
        directory, command = self.directory(run), self.command(run)
        directory.mkdir(parents=True, exist_ok=True)
        say(f"{self.remaining(run)}{shlex.join(command)}")
        log, begun = Path(f"{directory}.log"), time.monotonic()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with open(log, "ab") as output:
            self.child = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment,
                pass_fds=[self.lock.fileno()], start_new_session=True, preexec_fn=end_with_parent,  # noqa: PLW1509
            )  # fmt: skip
            status = self.child.wait()
            self.child = None
        if self.stops:
            raise EarlyExit("stopped; the same command goes on from there")
        if status or not self.is_done(run):
            said = log.read_text(errors="replace").strip().splitlines()
            self.failed[run.key] = f"{run.name} ended with status {status}: {said[-1] if said else 'nothing said'}"
            note(f"{self.failed[run.key]} (all of it: {log})")
            raise FailedError(self.failed[run.key])
        if run.key in self.flops:
            self.spent = [self.spent[0] + time.monotonic() - begun, self.spent[1] + self.flops.pop(run.key)]

    def remaining(self, run: Run) -> str:
        """By the FLOPs that are left, at the speed so far."""
        if not self.spent[1]:
            return f"[{len(self.flops)} training runs to do] "
        return f"[about {sum(self.flops.values()) * self.spent[0] / self.spent[1] / 60:.1f} min to go] "


def end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH, signal.SIGTERM)
