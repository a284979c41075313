"""What is in --out before anything is written there: which of it is a run's own, and what may be replaced.

One rule for all that write a model: see `elo.common.written`.
"""

import glob
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elo.common.errors import UserError
from elo.common.written import NEW, RUN, SAVING, Written, is_begun
from elo.model.checkpoint import CONFIG
from elo.model.saving import ADAPTER, ADAPTER_CONFIG, MODEL, SHARD, model_files

METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"
EPOCH = re.compile(r"epoch-[1-9][0-9]{0,17}")  # a folder with the model of one
FINISHED = (CONFIG, ADAPTER_CONFIG)  # written last: a model, or a LoRA adapter

# Options that name what a command reads, and those of them that name texts, in folders of any depth.
INPUTS = ("model", "elo", "after", "instruct", "base", "data", "target", "source", "validation", "cache")
TEXTS = ("data", "target", "source", "validation")


def check_inputs(arguments: Namespace) -> None:
    """Raises UserError if --out is a file, or something that is read would be replaced, whatever links lead there.

    And if texts are looked for where --out is: the run would find its own files.
    """
    if os.path.lexists(arguments.out) and not arguments.out.is_dir():
        raise UserError(f"--out {arguments.out}: this is a file; give a directory")
    out = os.path.realpath(arguments.out)
    for option in INPUTS:
        given = getattr(arguments, option, None) or []
        for value in given if isinstance(given, list) else [given]:
            for path in map(os.path.realpath, _paths(option, str(value))):
                if path == out:
                    raise UserError(f"--out {arguments.out}: this is --{option}; give another directory")
                if path.startswith(out + "/") and _is_own(path.removeprefix(out + "/").split("/")[0]):
                    raise UserError(
                        f"--out {arguments.out}: --{option} {value} is in its place; give another directory"
                    )
                if option in TEXTS and out.startswith(path.rstrip("/") + "/"):
                    raise UserError(f"--out {arguments.out}: it is in --{option} {value}; give a directory beside it")


def _paths(option: str, value: str) -> Iterator[str]:
    """What an option names, and the links in it, which may lead anywhere."""
    found = glob.glob(value, recursive=True) if option in TEXTS and not os.path.exists(value) else []
    for name in found or [value]:
        yield name
        for folder, folders, files in os.walk(name if option != "cache" else ""):
            paths = (os.path.join(folder, entry) for entry in folders + files)
            yield from filter(os.path.islink, paths)


def _is_own(name: str) -> bool:
    """Whether a run may write something of this name into --out, or into a folder of this name there."""
    own = {RUN, NEW, METRICS, CHECKPOINTS, *(path.split("/")[0] for path in MODEL)}
    return bool(name in own or name.startswith(SAVING) or SHARD.fullmatch(name) or EPOCH.fullmatch(name))


def read_written(out: Path) -> Written:
    """The list of files in --out, and in `run` what `open_run` wrote beside it, or nothing for a model made at once."""
    written = Written(out)
    run = written.run
    if run is None or (written.is_listed and not written.is_run):
        return written
    for name, kind in (("options", dict), ("data", dict), ("resumed", list)):
        if not isinstance(run.get(name), kind):
            raise UserError(f"{out / RUN}: no {name} of a run there; mend it or give another directory")
    if not written.is_listed:
        # Runs that kept no list made these, by exact names.
        names, options = [*model_files(out), METRICS, CHECKPOINTS], run["options"]
        epochs = options.get("epochs") if options.get("keep") in ("best", "every") else None
        for folder in filter(EPOCH.fullmatch, os.listdir(out)) if isinstance(epochs, int) else ():
            if int(folder.removeprefix("epoch-")) <= epochs:
                names += [f"{folder}/{name}" for name in model_files(out / folder)]
        of_adapter = options.get("method") == "lora"
        written.names = {name for name in names if of_adapter or ADAPTER not in name}
    return written


def in_the_way(arguments: Namespace, written: Written) -> list[str]:
    """The files in --out that are not the run's own, but would be replaced; there are none without --overwrite.

    Raises UserError for them then, and in any case for links, folders and states that no run has made.
    """
    out = arguments.out
    others = [name for name in (*model_files(out), METRICS) if written.obstacle(name) == name]
    if not written.is_run and is_finished(written):  # a model that was made at once
        others += [name for name in sorted(written.names) if os.path.lexists(out / name)]
    if os.path.lexists(out / NEW) and not is_begun(out / NEW):
        others.append(NEW)
    if others and not arguments.overwrite:
        raise UserError(f"--out {out}: {others[0]} is there already; use --overwrite or give another directory")
    obstacles = [written.obstacle(name, others) for name in (*MODEL, METRICS, *others, *_of_epochs(arguments))]
    states, metrics = out / CHECKPOINTS, out / METRICS
    if os.path.lexists(states) and (CHECKPOINTS not in written.names or states.is_symlink() or not states.is_dir()):
        obstacles.append(CHECKPOINTS)
    if METRICS in written.names and metrics.is_symlink():
        obstacles.append(METRICS)
    for obstacle in filter(None, obstacles):
        raise UserError(f"--out {out}: {obstacle} is there, and no run made it; move it or give another directory")
    return others


def _of_epochs(arguments: Namespace) -> Iterator[str]:
    """The files that are in folders for the models of epochs, if the run makes such folders."""
    if getattr(arguments, "keep", "last") != "last":
        for folder in filter(EPOCH.fullmatch, os.listdir(arguments.out) if arguments.out.is_dir() else ()):
            yield from (f"{folder}/{name}" for name in (*MODEL, *model_files(arguments.out / folder)))


def is_finished(written: Written) -> bool:
    return any(name in written.names and os.path.lexists(written.out / name) for name in FINISHED)


@contextmanager
def replacing(written: Written, others: list[str]) -> Iterator[None]:
    """While a model is made that is no run's: a list in --out, and all as it was if that fails."""
    out, before = written.out, set(written.names)
    try:
        out.mkdir(parents=True, exist_ok=True)
        written.run = written.run or {}
        written.remove([name for name in before if name.startswith(SAVING)])  # left by a kill
        written.add(others)
        yield
    except BaseException as error:
        with suppress(OSError):
            written = Written(out)
            written.names -= {*others} - before
            written.save()
            if not written.names:
                (out / RUN).unlink()
                out.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"--out {out}: {error.strerror or error}") from None
        raise
