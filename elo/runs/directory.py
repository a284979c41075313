"""A run's directory: run.json and metrics.jsonl from the start, states under checkpoints/, and at the end the model.

The same command begins a run, goes on with one that was interrupted, and refuses to touch one that is finished.
"""

import json
import os
import platform
import sys
import time
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from elo.common.errors import EarlyExit, UserError
from elo.common.fields import is_number
from elo.common.files import lock, read_file_lines
from elo.common.options import Parser
from elo.common.written import SAVING, Written
from elo.model.saving import ADAPTER_CONFIG
from elo.runs.devices import device_name
from elo.runs.event_files import EventFiles
from elo.runs.processes import World
from elo.runs.replacing import CHECKPOINTS, FINISHED, METRICS, check_inputs, in_the_way, is_finished, read_written
from elo.runs.signals import restarted
from elo.runs.states import remove_states

LARGEST_METRICS, LONGEST_METRIC = 2**30, 2**19  # bytes of the file and of a line, which has some hundred

# Options that a run may go on with other values of.
CALLS = {"resume", "restart", "overwrite", "out"}  # how the run is called
# Change nothing that is computed.
WATCHING = {"save_every", "keep_checkpoints", "stop_on_spike", "workers", "cache", "merge", "tensorboard"}
WATCHING |= {"validation", "validation_mb", "validation_field", "validate_every"}  # what it leaves out is data's
# How the work is laid out, as is the number of processes: changes sums in their rounding, and nothing else.
LAYOUT = {"micro_batch", "micro_batch_tokens", "activation_checkpointing", "cpu_offload", "gather_once", "shard"}
# May be other ones on each node; of how the run is called rank 0's count.
OF_A_NODE = {"cache", "workers"} | CALLS - {"out"}


def add_arguments(parser: Parser, out: str) -> None:
    """out: the default of --out."""
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help="the run's directory (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help=(
        "go on with the interrupted run in --out: so it is anyway; succeeds if it is finished"))  # fmt: skip
    group.add_argument("--restart", action="store_true", help="begin the interrupted run in --out anew")


def option_values(arguments: Namespace) -> dict[str, Any]:
    """The options of a run as JSON has them, without those that tell how it is called."""
    values = json.loads(json.dumps(vars(arguments), default=str))
    return {name: value for name, value in values.items() if name not in CALLS}


def check_out(arguments: Namespace, world: World) -> bool:
    """Before any work: whether the run in --out goes on (True) or one begins there. Collective.

    So does a finished one whose adapter is yet to be merged.

    Raises UserError if --out has what only --overwrite or --restart may replace, or a run with other options, and
    EarlyExit if it has a finished one and --resume is given.
    """
    check_same({_option(name): value for name, value in vars(arguments).items() if name not in OF_A_NODE}, world)
    return world.on_rank_0(_goes_on, arguments, world)


def _goes_on(arguments: Namespace, world: World) -> bool:
    out = arguments.out
    check_inputs(arguments)
    written = read_written(out)
    changed = _changed_options(written, arguments, world) if written.is_run else ""
    is_done = written.is_run and is_finished(written)
    is_unmerged = getattr(arguments, "merge", False) and (out / ADAPTER_CONFIG).exists()
    if is_done and is_unmerged and not changed and not (arguments.overwrite or arguments.restart):
        return True
    # torchrun restarts the whole command where a process failed after the work was done.
    if is_done and not changed and (arguments.resume or restarted()):
        raise EarlyExit(f"{out}: this run is finished")
    if is_done and not arguments.overwrite:
        what = f"a run with {changed}" if changed else "this run"
        raise UserError(f"--out {out}: {what} is finished there; use --overwrite or give another directory")
    in_the_way(arguments, written)
    if is_done or not written.is_run:
        return False
    if changed and (arguments.overwrite or arguments.restart):
        return False
    if changed:
        raise UserError(
            f"--out {out}: the run there is to be resumed, but it has {changed}; "
            "give the same options, or --restart to begin anew, or another directory"
        )
    return restarted() or not arguments.restart


def _changed_options(written: Written, arguments: Namespace, world: World) -> str:
    """The options that an earlier run in --out had and this one has not; empty if there are none."""
    before, now = written.run["options"], option_values(arguments)
    changed = [name for name in {**before, **now} if name not in CALLS and before.get(name) != now.get(name)]
    # One that did not exist then and is switched off now.
    changed = [name for name in changed if name in before or now[name]]
    for name in LAYOUT & set(changed):
        world.say(f"{_option(name)} was {before.get(name)}: from here on numbers are the same within rounding only")
    changed = [name for name in changed if name not in WATCHING | LAYOUT]
    return ", ".join(f"{_option(name)} {before.get(name)} instead of {now.get(name)}" for name in changed)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def open_run(arguments: Namespace, world: World, goes_on: bool, data: dict[str, Any]) -> None:
    """Make --out this run's directory and note in run.json the command, options, versions and machine. Collective.

    data: what the run's numbers follow from besides its options, from a name to something that tells whether it is
    still the same. Raises UserError if a run that goes on had other data, or another process has.
    """
    world.wait()  # until every process has seen what is there
    check_same(data, world)
    world.on_rank_0(_open, arguments, world, goes_on, data)


def check_same(named: dict[str, Any], world: World) -> None:
    """Raises UserError unless all processes have these values: each node has its own command and files. Collective."""
    first, *others = world.gather(named)
    for rank, other in enumerate(others, start=1):
        if different := [name for name, value in first.items() if other.get(name) != value]:
            raise UserError(
                f"process {rank} has another {' and '.join(different)} than process 0; "
                "give every node the same command, and the same files"
            )


def _open(arguments: Namespace, world: World, goes_on: bool, data: dict[str, Any]) -> None:
    out, data = arguments.out, json.loads(json.dumps(data))
    call = {
        "command": sys.argv,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": device_name(world.device),
        "processes": world.size,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        # The directory itself: there is no lock file that a kill could leave, and two runs would mix their states.
        world.locked.append(os.open(out, os.O_RDONLY))
        if not lock(world.locked[-1], out):
            raise UserError(f"--out {out}: a run is at work there; stop it, or give another directory")
        written = read_written(out)
        others = in_the_way(arguments, written)
        if goes_on:
            changed = [name for name, value in data.items() if written.run["data"].get(name) != value]
            if changed:
                raise UserError(
                    f"--out {out}: since the run there began, its {' and '.join(changed)} changed; "
                    "give it what it had, or --restart to begin anew"
                )
            run = {**written.run, "resumed": [*written.run["resumed"], call]}
            others += [name for name in written.names if name.startswith(SAVING)]  # left by a kill
        else:
            run = {**call, "options": option_values(arguments), "data": data, "resumed": []}
        written.names.update(others)
        if goes_on:
            written.remove(others)
        else:
            clear(written)
        written.run = run
        written.add([CHECKPOINTS])
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from None


def clear(written: Written) -> None:
    """Remove what a run has left in its directory, but for run.json, and nothing else that may be there."""
    if CHECKPOINTS in written.names:
        remove_states(written.out / CHECKPOINTS)
    written.remove(sorted(written.names, key=lambda name: (Path(name).name not in FINISHED, name)))


def close_run(arguments: Namespace, world: World) -> None:
    """After the model is written: the states go, unless --save-every asked for them."""
    states = arguments.out / CHECKPOINTS
    if world.rank == 0:
        if not arguments.save_every:
            remove_states(states)
        if not states.exists():
            Written(arguments.out).remove([CHECKPOINTS])


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without a last one that was cut short; empty if there is no such file."""
    path = out / METRICS
    if not path.exists():
        return []
    lines, before = [], 0
    for number, line in enumerate(read_file_lines(path, LARGEST_METRICS, LONGEST_METRIC), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            lines.append(json.loads(line))
            numbers = [lines[-1][name] for name in ("loss", "grad_norm", "seconds")]
            others = (lines[-1].get(name) for name in ("epoch", "validation_loss"))
            numbers += [value for value in others if value is not None]
            # Not all steps: after a power failure lines may be missing that a state on the disk knows of.
            are_numbers = all(is_number(value) and not abs(value) > 1e300 for value in numbers)
            is_right = isinstance(step := lines[-1]["step"], int) and step > before and are_numbers
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            is_right = False
        if not is_right:
            raise UserError(f"{path}:{number}: not a line of a run's metrics after step {before}; mend it")
        before = step
    return lines


class Metrics:
    """metrics.jsonl, a line a step, written by rank 0; on resuming, the lines after the resumed step go. Collective.

    `before` are the last lines that stay, on every process.
    """

    REMEMBERED = 100

    def __init__(self, out: Path, step: int, world: World, tensorboard: bool = False) -> None:
        self.path, self.file, self.events = out / METRICS, None, None
        self.before = world.on_rank_0(self._open, step)
        if tensorboard and world.rank == 0:
            self.events = EventFiles(out, step)

    def _open(self, step: int) -> list[dict[str, Any]]:
        lines = read_metrics(self.path.parent)
        kept = [line for line in lines if line["step"] <= step]
        written = Written(self.path.parent)
        written.check([METRICS])
        written.add([METRICS])
        self.file = open(self.path, "ab")  # noqa: SIM115  closed by __exit__
        # Cut, not written anew: a kill at this very moment loses nothing.
        raw = read_file_lines(self.path, LARGEST_METRICS, LONGEST_METRIC)
        self.file.truncate(sum(len(line) for line in islice(raw, len(kept))))
        return kept[-self.REMEMBERED :]

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.file is not None:
            self.file.close()
        if self.events is not None:
            self.events.close()

    def write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            try:
                # A held-out loss may be NaN, which JSON has not.
                finite = json.loads(json.dumps(line), parse_constant=lambda name: None)
                self.file.write(json.dumps(finite).encode() + b"\n")
                self.file.flush()
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        if self.events is not None:
            self.events.write(line)
