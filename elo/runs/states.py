"""Resumable states of a run: OUT/checkpoints/step-N, written by torch.distributed.checkpoint while training goes on.

A state has the trained parameters and the buffers, the optimizer, the number of steps done, which is also the position
in the data and in the schedule, and the random state of every process. Frozen parameters come from the base again.

One that is damaged is passed over for the one before it. One that is as it was written and still cannot be read is
another version's: it is worth keeping, and the run does not go on without it.
"""

import os
import platform
import re
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from elo.common.errors import EarlyExit, UserError
from elo.common.options import Interval
from elo.model.decoder import CausalLM
from elo.runs.devices import random_state, set_random_state
from elo.runs.processes import World, is_lost_connection
from elo.runs.state_files import METADATA, StatePlanner, StateReader, SummingWriter, check_files, remove_state

TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
DAMAGED = "damaged-"  # in front of it


def complete(directory: Path) -> list[Path]:
    """The complete states in a run's folder of them, oldest first."""
    return sorted((path for path in _all(directory) if (path / METADATA).exists()), key=_step_of)


def _all(directory: Path) -> list[Path]:
    """With those that were cut short; without what somebody put there under another name, such as a copy."""
    return [path for path in directory.glob("step-*") if NAME.fullmatch(path.name)]


@dataclass
class States:
    """Saves and loads the states of a run in `directory`. All methods but `complete` are collective.

    A state is copied to the host first and written by a thread then, at most one at a time. `every` says how often,
    `keep` how many complete ones stay.
    """

    directory: Path
    model: CausalLM
    optimizers: list[torch.optim.Optimizer]
    world: World
    every: Interval | None
    keep: int
    saving: tuple[Path, Future] | None = None
    saved_step: int = 0
    saved_at: float = field(default_factory=lambda: time.monotonic())

    def __enter__(self) -> "States":
        return self

    def __exit__(self, kind: type | None, exception: BaseException | None, trace: object) -> None:
        # Whatever ends the run, the state that is being written is worth the wait; but not for a process that is gone.
        if self.saving is not None and not (isinstance(exception, Exception) and is_lost_connection(exception)):
            self.saving[1].exception()
            self._remove_all_but_newest()

    def complete(self) -> list[Path]:
        return complete(self.directory)

    def between_steps(self, step: int, is_last: bool) -> None:
        """Save after `step` steps if that is due, or the run is asked to stop; then raise EarlyExit."""
        is_due = self.every is not None and self.every.is_due(step - self.saved_step, time.monotonic() - self.saved_at)
        # By one clock: that of rank 0. And every process has to see the end of a save at the same step.
        stops, is_due, written = self.world.sum(
            self.world.stop.requested,
            is_due and self.world.rank == 0,
            self.saving is not None and self.saving[1].done(),
        )
        if written == self.world.size:
            self.finish_saving()
        if (stops or is_due or is_last) and step != self.saved_step:
            try:
                self.save(step)
                if stops or is_last:
                    self.finish_saving()
            except UserError as error:
                if not is_last:
                    raise
                # The work is done: if there is room for the model, all is well.
                self.world.say(f"{error}; the model itself may fit")
        if stops:
            self.finish_saving()
            at = f"stopped after step {step}; the same command goes on from there"
            raise EarlyExit(at if step else "stopped before the first step")

    def save(self, step: int) -> None:
        """Begin to save: returns when training may go on."""
        self.finish_saving()
        directory = self.directory / f"step-{step}"
        state = self._state(step)
        future = dcp.async_save(state, storage_writer=SummingWriter(directory), process_group=self.world.saving_group)
        self.saving = directory, future
        self.saved_step, self.saved_at = step, time.monotonic()

    def finish_saving(self) -> None:
        """Wait for the state that is being written. Raises UserError if it could not be."""
        if self.saving is None:
            return
        (directory, future), self.saving = self.saving, None
        try:
            future.result()
        except CheckpointException as error:
            if self.world.rank == 0:
                remove_state(directory)
            _raise_lost_connection(error)
            before = self.complete()
            raise UserError(
                f"{directory}: the state cannot be saved: {_cause(error)}; "
                f"the last saved state is {before[-1].name if before else 'none'}"
            ) from None
        self._remove_all_but_newest()
        self.world.wait()  # no collective of the next step waits for the disk

    def _remove_all_but_newest(self) -> None:
        if self.world.rank == 0 and self.directory.is_dir():
            newest = self.complete()[-self.keep :]
            for path in _all(self.directory):
                if path not in newest:
                    remove_state(path)

    def load_newest(self) -> int:
        """Restore the newest state and return its step, or 0 where there is none.

        One that is damaged is renamed, and the one before it is taken. Raises UserError if none can be read, or one
        that is whole cannot be read by this version.
        """
        damaged: list[tuple[Path, str]] = []
        for directory in reversed(self.world.from_rank_0(self.complete())):
            damage = self._load(directory)
            if damage is None:
                break
            self.world.say(f"{directory}: this state is damaged ({damage})")
            damaged.append((directory, damage))
        else:
            if damaged:
                directory, damage = damaged[0]
                raise UserError(f"{directory}: the state is damaged ({damage}) and so are all; --restart begins anew")
            return 0
        if self.world.rank == 0:
            for path, _ in damaged:
                aside = path.with_name(DAMAGED + path.name)
                remove_state(aside)
                while os.path.lexists(aside):  # with what somebody put there
                    aside = aside.with_name(aside.name + "+")
                os.rename(path, aside)
        self._remove_all_but_newest()
        self.saved_step = _step_of(directory)
        self.world.say(f"going on from {directory}")
        return self.saved_step

    def _load(self, directory: Path) -> str | None:
        """Restore a state. Returns what is wrong with it, if anything is."""
        world = self.world
        reader = StateReader(directory)
        damaged, unknown = check_files(reader, world)
        if damaged:
            return damaged[0]
        if unknown:
            raise _another_versions(directory, unknown[0])
        state = self._state(_step_of(directory))
        known = reader.read_metadata().state_dict_metadata
        # Another number of processes has other random states, as it has other parts of a batch.
        mine = {name: value for name, value in state["random"].items() if f"random.{name}" in known}
        state["random"] = mine
        try:
            dcp.load(state, storage_reader=reader, planner=StatePlanner(), process_group=world.host_group)
        except CheckpointException as error:
            _raise_lost_connection(error)
            if any(isinstance(cause, OSError) for cause, _ in error.failures.values()):
                return _cause(error)
            raise _another_versions(directory, _cause(error)) from None
        set_state_dict(
            self.model,
            self.optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=TRAINED_ONLY,
        )
        if mine:
            set_random_state(world.device, {name.split("-")[1]: value for name, value in mine.items()})
        return None

    def _state(self, step: int) -> dict[str, Any]:
        """What there is now, as references: loading writes into them, and saving copies them first."""
        model, optimizer = get_state_dict(self.model, self.optimizers, options=TRAINED_ONLY)
        # Without the second name of a tied head: it is trained or frozen as the embedding.
        names = [name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())]
        model = {name: model[name] for name in names if name in model}
        random = {f"{self.world.rank}-{name}": value for name, value in random_state(self.world.device).items()}
        return {"model": model, "optimizer": optimizer, "random": random}


def _another_versions(directory: Path, reason: str) -> UserError:
    return UserError(
        f"{directory}: this state is as it was written, but Python {platform.python_version()} with torch "
        f"{torch.__version__} cannot read it ({reason}); go on with the versions that wrote it, which run.json names, "
        "or move it away to go on from the state before it"
    )


def remove_states(directory: Path) -> None:
    """All states in a directory, and it too unless there is more in it."""
    if directory.is_symlink():
        return
    for path in sorted(directory.glob("*step-*")):
        if NAME.fullmatch(path.name.removeprefix(DAMAGED)):
            remove_state(path)
    with suppress(OSError):
        directory.rmdir()


def _step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def _cause(error: CheckpointException) -> str:
    """One of the processes' reasons, in a line."""
    cause = next(iter(error.failures.values()))[0]
    return (isinstance(cause, OSError) and cause.strerror) or str(cause).splitlines()[0]


def _raise_lost_connection(error: CheckpointException) -> None:
    """A process that is gone is nothing that is wrong with a state."""
    for cause, _ in error.failures.values():
        if isinstance(cause, dist.DistError) or "gloo" in str(cause):
            raise RuntimeError(str(cause)) from error
