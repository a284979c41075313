"""The commands of an experiment: planned first, and then each done once, as long as its directory has no result.

A command's directory is named by its words: the same one, whichever row or experiment it belongs to. One that was
interrupted goes on by its own resume.
"""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from elo.common.errors import EarlyExit
from elo.common.files import lock
from elo.common.options import Parser
from elo.common.terminal import note, say
from elo.model.config import ModelConfig
from elo.planning.budget import Plan
from elo.planning.plan import make_parser, make_plans, would_fit
from elo.runs.directory import read_metrics
from elo.runs.replacing import CHECKPOINTS
from elo.runs.states import remove_states
from eval.jsonl import digest

ROOT = Path(__file__).resolve().parents[1]
PRETRAINING = ("train.py", "align.py")
AMOUNTS = "{:,.0f} tokens, {:,.4g} GPU hours, {:,.2f} GB on disk"


class FailedError(Exception):
    """A command failed; what needs it cannot be done."""


def option(words: Sequence[str], name: str) -> str | None:
    """Its value; of one that is given twice the last, which counts."""
    parser = Parser(add_help=False)
    parser.add_argument(name, dest="value", type=str)
    return parser.parse_known_args(words)[0].value


class Run(NamedTuple):
    script: str
    words: tuple[str, ...]
    directory: Path

    def option(self, name: str) -> str | None:
        return option(self.words, name)

    @property
    def method(self) -> str:
        """As --rates names it."""
        return "align" if self.script == "align.py" else self.option("--method") or "elo"

    @property
    def is_done(self) -> bool:
        return (self.directory / ("config.json" if self.script.endswith(".py") else "result.json")).exists()

    @property
    def last_step(self) -> dict[str, Any]:
        return (read_metrics(self.directory) or [{}])[-1]


class Runs:
    """Commands are only planned until `begin`."""

    def __init__(self, options: Namespace) -> None:
        self.options, self.config, self.lock = options, ModelConfig.load(Path(options.model)), None
        self.plans: dict[Run, Plan | None] = {}  # None: nothing is trained there
        self.made_of: dict[str, list[Run]] = {}  # of a model: the training that led to it, without what only chose
        self.failed: dict[Run, str] = {}
        self.left, self.spent = list[float](), [0.0, 0.0]  # FLOPs of each run to do; seconds and FLOPs
        self.child: subprocess.Popen | None = None
        self.stops = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)

    def stop(self, *_: object) -> None:
        """The run at work saves its state and leaves, and then so does the experiment."""
        self.stops = True
        if self.child is None:
            raise EarlyExit("stopped; the same command goes on from there")
        self.child.send_signal(signal.SIGTERM)

    def begin(self) -> None:
        """The lock is held by the commands too: what a killed experiment leaves is waited for."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.options.out / "lock", "w")  # noqa: SIM115  until the process ends
        if not lock(self.lock.fileno(), self.options.out):
            note(f"{self.options.out}: waiting for the experiment that is at work there")
            fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.left = [plan.run.tokens * plan.flops.total for run, plan in self.plans.items() if plan and not run.is_done]

    def do(self, script: str, *words: str) -> str:
        """The command's directory, for which `{here}` stands; other directories among its words are what it needs.

        Raises FailedError if it fails, or has failed before.
        """
        known = [self.options.contents.get(word, word).removeprefix(f"{self.options.out}/") for word in words]
        name = f"{script.removesuffix('.py').replace(' ', '-')}-{digest(script, *known)}"
        here = self.options.out / "runs" / name
        run = Run(script, tuple(word.replace("{here}", str(here)) for word in words), here)
        needed = [word for option, word in zip(("", *words), words, strict=False) if option != "--after"]
        inputs = [made for word in needed for made in self.made_of.get(word, ())]
        self.made_of[str(here)] = [*dict.fromkeys(inputs), *[run] * (script in (*PRETRAINING, "sft.py"))]
        if run not in self.plans:
            self.plans[run] = self.plan(run) if script in PRETRAINING else None
        if self.lock and not run.is_done:
            if run not in self.failed:
                self.start(run)
            if run in self.failed:
                raise FailedError(self.failed[run])
        if self.lock:
            remove_states(here / CHECKPOINTS)  # of all parameters: those of a whole table would fill the disk
        return str(here)

    def command(self, run: Run) -> list[str]:
        if not run.script.endswith(".py"):
            return [sys.executable, "-m", *run.script.split(), *run.words]
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.options.processes}"]
        is_alone = self.options.processes == 1 or run.script == "merge_chat_vector.py"
        return [sys.executable, *([] if is_alone else several), str(ROOT / run.script), *run.words]

    def start(self, run: Run) -> None:
        log, begun, plan = Path(f"{run.directory}.log"), time.monotonic(), self.plans[run]
        run.directory.mkdir(parents=True, exist_ok=True)
        say(f"{self.remaining()}{shlex.join(self.command(run))}")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with open(log, "ab") as output:
            self.child = subprocess.Popen(
                self.command(run), stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment,
                pass_fds=[self.lock.fileno()], start_new_session=True,
            )  # fmt: skip
            status, self.child = self.child.wait(), None
        if self.stops:
            self.stop()
        if status or not run.is_done:
            said = log.read_text(errors="replace").strip().splitlines() or ["nothing said"]
            self.failed[run] = f"{run.directory.name} ended with status {status}: {said[-1]}"
            note(f"{self.failed[run]} (all of it: {log})")
        elif plan:
            self.spent = [self.spent[0] + time.monotonic() - begun, self.spent[1] + plan.run.tokens * plan.flops.total]

    def remaining(self) -> str:
        """By the FLOPs that are left, at the speed so far."""
        if not self.spent[1]:
            return f"[{len(self.left)} training runs to do] "
        return f"[about {max(0.0, sum(self.left) - self.spent[1]) * self.spent[0] / self.spent[1] / 60:.1f} min to go] "

    # ---- what came out

    def seconds(self, *models: str) -> list[float]:
        """Of each one's training; all by the planner, whose GPU is not this machine, as long as some is not done."""
        chains = [self.made_of.get(model, ()) for model in models]
        if all(run.is_done for chain in chains for run in chain):
            return [sum(run.last_step.get("seconds", 0.0) for run in chain) for chain in chains]
        return [sum(3600 * plan.hours for run in chain if (plan := self.plans[run])) for chain in chains]

    # ---- what it would take

    def plan(self, run: Run) -> Plan | None:
        """The options of the scripts are the planner's too."""
        if not float(run.option("--gb")):
            return None
        words = [word for word in run.words if word != "--validation"]  # which is of a narrowed head's plan only
        words += ["--stage", run.script.removesuffix(".py"), "--dtype", "bf16", "--gpu", self.options.gpu]
        words += ["--gpus", str(self.options.processes), "--bytes-per-token", str(self.options.bytes_per_token)]
        asked, _ = make_parser().parse_known_args(words)
        return make_plans(asked, self.config)[0]

    def show(self) -> None:
        """--dry-run."""
        gpus, left = f"{self.options.processes} x {self.options.gpu}", [run for run in self.plans if not run.is_done]
        whole = max((plan.computed for plan in self.plans.values() if plan), default=0)
        sums = [0.0, 0.0, 0.0]
        for run, plan in ((run, self.plans[run]) for run in left):
            size = (plan.computed if plan else whole) if run.script.endswith(".py") else 0
            spent = [*([plan.run.tokens, plan.hours * self.options.processes] if plan else [0.0, 0.0]), 2 * size / 1e9]
            sums = list(map(sum, zip(sums, spent, strict=True)))
            say(shlex.join(self.command(run)))
            say(f"    {AMOUNTS.format(*spent)}")
            if plan and not plan.fits:
                say(f"    does not fit on {gpus}; it would with: {would_fit(plan)}")
        # Weight and both moments in fp32; two states are kept while the next one is written.
        states = 3 * 12 * max((self.plans[run].trained for run in left if self.plans[run]), default=0) / 1e9
        done = f"; {ended} more are done" if (ended := len(self.plans) - len(left)) else ""
        say(f"together {AMOUNTS.format(*sums)}, and up to {states:,.1f} GB for the states of the run at work{done}")
        say(f"on {gpus} at the planner's utilization and {self.options.bytes_per_token} bytes a token; tuning on "
            "conversations and evaluation are not counted")  # fmt: skip
