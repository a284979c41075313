"""A run's directory: run.json, metrics.jsonl, resumable states under checkpoints/, and at the end the model."""

import json
import platform
import re
import shutil
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from elo.checkpoint import ADAPTER_CONFIG, CONFIG, remove_model
from elo.distributed import World
from elo.errors import UserError
from elo.fields import read_json_object, write_json
from elo.model import CausalLM

# Frozen parameters come from the base checkpoint again.
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
KEPT = 2
# Options that change nothing in what is computed.
FREE = {"resume", "overwrite", "save_every", "out", "workers", "merge"}


def option_values(arguments: Namespace) -> dict[str, Any]:
    """The options of a run as JSON has them."""
    return json.loads(json.dumps(vars(arguments), default=str))


def check_out(arguments: Namespace) -> None:
    """Before any work: raise UserError if --out has another run, and neither --resume nor --overwrite is given.

    Also if --resume comes with other options than the run had.
    """
    out, options = arguments.out, option_values(arguments)
    for name in ("model", "elo", "after"):
        if options.get(name) and Path(options[name]).resolve() == out.resolve():
            raise UserError(f"--out {out}: this is --{name}; give another directory")
    leaves = (CONFIG, ADAPTER_CONFIG, "run.json", "metrics.jsonl", "checkpoints")
    used = [path for name in leaves if (path := out / name).exists()]
    if arguments.resume and (out / "run.json").exists():
        before = read_json_object(out / "run.json").get("options", {})
        changed = [name for name in options if name not in FREE and options[name] != before.get(name)]
        if changed:
            was = ", ".join(f"--{name.replace('_', '-')} was {before.get(name)}" for name in changed)
            raise UserError(f"--resume: the run in {out} had other options: {was}")
    elif used and not arguments.overwrite:
        raise UserError(f"--out {out}: {used[0].name} of an earlier run is there; use --resume, --overwrite or another")


def open_run(arguments: Namespace, world: World) -> None:
    """Make --out this run's directory and write run.json: the command, the options, versions and machine."""
    out = arguments.out
    world.wait()
    if world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not arguments.resume:
            remove_model(out)
            (out / "metrics.jsonl").unlink(missing_ok=True)
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
        device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine()
        run = {
            "command": sys.argv,
            "options": option_values(arguments),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": device,
            "processes": world.size,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(out / "run.json", run)
    world.wait()


class States:
    """`directory`/step-N, each written by torch.distributed.checkpoint; one without `.metadata` was cut short.

    DCP unpickles: this directory is the run's own, and a model directory is never read this way.
    """

    def __init__(self, directory: Path, model: CausalLM, optimizers: list[torch.optim.Optimizer], world: World) -> None:
        self.directory, self.model, self.optimizers, self.world = directory, model, optimizers, world

    def save(self, step: int) -> None:
        """Collective. The states before the last two are removed once this one is complete."""
        dcp.save(
            self._state(step),
            checkpoint_id=self.directory / f"step-{step}",
            process_group=self.world.host_group,
        )
        if self.world.rank == 0:
            complete = self.complete()
            for directory in self.directory.iterdir():
                if directory not in complete[-KEPT:]:
                    shutil.rmtree(directory)

    def load_newest(self) -> int:
        """Collective. Restores the newest complete state and returns its step, or 0 where there is none."""
        complete = self.complete()
        if not complete:
            return 0
        state = self._state(0)
        dcp.load(state, checkpoint_id=complete[-1], process_group=self.world.host_group)
        set_state_dict(
            self.model,
            self.optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=TRAINED_ONLY,
        )
        return int(state["step"])

    def complete(self) -> list[Path]:
        """The complete states, oldest first."""
        states = [path.parent for path in self.directory.glob("step-*/.metadata")]
        return sorted(states, key=lambda path: int(re.sub(r"\D", "", path.name)))

    def _state(self, step: int) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizers, options=TRAINED_ONLY)
        return {"model": model, "optimizer": optimizer, "step": torch.tensor(step)}


class Metrics:
    """metrics.jsonl, a line a step, written by rank 0; on resuming, the lines after the resumed step go."""

    def __init__(self, out: Path, step: int, world: World) -> None:
        self.file = None
        if world.rank == 0:
            self.file = open(out / "metrics.jsonl", "a+", encoding="utf-8")  # noqa: SIM115  closed by __exit__
            self.file.seek(0)
            kept = [line for line in self.file if line.endswith("\n") and json.loads(line)["step"] <= step]
            self.file.truncate(0)
            self.file.writelines(kept)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
