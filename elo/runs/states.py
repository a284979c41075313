"""Resumable states of a run: OUT/checkpoints/step-N, written by a thread while training goes on.

A state has the trained parameters, AdamW's averages of their gradients, and the buffers; the number of steps done is
also the position in the data and in the schedule, and what seeds a step's random numbers. Frozen parameters come from
the base again.

Of the processes that hold the model together each writes its rows of all tensors into a safetensors file. state.json,
which names these files with their checksums, comes last, by rename: a directory without it was cut short.

One that is damaged is passed over for the one before it. One that is as it was written and still cannot be read is
another version's: it is worth keeping, and the run does not go on without it.
"""

import os
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from elo.common.errors import EarlyExit, UserError
from elo.common.fields import replace_json
from elo.common.options import Interval
from elo.model.checkpoint import dealt_rows
from elo.model.decoder import CausalLM
from elo.runs.processes import World, is_lost_connection
from elo.runs.state_files import (
    LAST,
    STATE,
    another_versions,
    damage_of,
    read_checksums,
    read_rows,
    remove_state,
    write_part,
)

NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
DAMAGED = "damaged-"  # in front of it


def complete(directory: Path) -> list[Path]:
    """The complete states in a run's folder of them, oldest first."""
    return sorted((path for path in _all(directory) if any((path / name).exists() for name in LAST)), key=_step_of)


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
    thread: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1))

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
        mesh = next(parameter for parameter in self.model.parameters() if parameter.requires_grad).device_mesh
        number, count = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
        rows = {}
        if mesh.ndim == 1 or mesh.get_local_rank(0) == 0:  # with --shard all groups hold the same
            for name, value in self._state(step).items():
                is_sharded = isinstance(value, DTensor)
                mine = value.to_local() if is_sharded else value[slice(*dealt_rows(len(value), count, number))]
                rows[name] = mine.detach().to("cpu", copy=True)
        part = self.directory / f"step-{step}" / f"part-{number}.safetensors"
        self.saving = part.parent, self.thread.submit(self._write, part, rows)
        self.saved_step, self.saved_at = step, time.monotonic()

    def _write(self, part: Path, rows: dict[str, Tensor]) -> None:
        """In the thread. Raises OSError where this process's disk fails."""
        sums: list[list[int] | None] = [None] * self.world.size
        mine = None
        try:
            mine = [write_part(part, rows)] if rows else []
        finally:
            dist.all_gather_object(sums, mine, group=self.world.saving_group)
        if self.world.rank == 0 and None not in sums:
            replace_json(part.with_name(STATE), {"checksums": sum(sums, [])})

    def finish_saving(self) -> None:
        """Wait for the state that is being written. Raises UserError if it could not be."""
        if self.saving is None:
            return
        (directory, future), self.saving = self.saving, None
        error = future.exception()
        if error is not None and not isinstance(error, OSError):
            raise error
        if failed := [error for error in self.world.gather(error) if error]:
            if self.world.rank == 0:
                remove_state(directory)
            self.world.wait()
            before = self.complete()
            raise UserError(
                f"{directory}: the state cannot be saved: {failed[0].strerror or failed[0]}; "
                f"the last saved state is {before[-1].name if before else 'none'}"
            )
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
        """Restore a state. Returns what is damaged in it, if anything is. Each process checks its part of the files."""
        sums = self.world.on_rank_0(read_checksums, directory)
        if not sums:
            return f"{STATE} cannot be read"
        parts = [directory / f"part-{number}.safetensors" for number in range(len(sums))]
        mine = [*zip(parts, sums, strict=True)][self.world.rank :: self.world.size]
        damaged = [damage for path, expected in mine if (damage := damage_of(path, expected))]
        if damaged := sum(self.world.gather(damaged), []):
            return damaged[0]
        unknown = []
        try:
            for name, value in self._state(_step_of(directory)).items():
                read_rows(parts, name, value)
        except (SafetensorError, ValueError) as error:
            unknown = [str(error)]
        if unknown := sum(self.world.gather(unknown), []):
            raise another_versions(directory, unknown[0])
        return None

    def _state(self, step: int) -> dict[str, Tensor]:
        """What there is now, as references: loading writes into them. AdamW's averages are made if there are none."""
        state = dict(self.model.named_buffers())
        adamws = {parameter: a for a in self.optimizers for group in a.param_groups for parameter in group["params"]}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                own = adamws[parameter].state[parameter]
                own["step"] = torch.tensor(float(step), device=parameter.device)
                for average in ("exp_avg", "exp_avg_sq"):
                    if average not in own:
                        own[average] = torch.zeros_like(parameter)
                    state[f"{name}.{average}"] = own[average]
                state[name] = parameter
        return state


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
