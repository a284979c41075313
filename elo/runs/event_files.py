"""--tensorboard: what metrics.jsonl has, as event files in OUT/tensorboard."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from elo.common.errors import UserError
from elo.common.written import Written

FOLDER = "tensorboard"


def check_package() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard writes with the package tensorboard: pip install tensorboard")


class EventFiles:
    """One file for each start of a run; what an interrupted one wrote after `step` is not shown any more."""

    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        written = Written(out)
        written.check([f"{FOLDER}/events"])  # no link, which would lead elsewhere
        self.directory = out / FOLDER
        before = set(os.listdir(self.directory)) if self.directory.is_dir() else set()
        self.writer = SummaryWriter(self.directory, purge_step=step + 1 if step else None)
        written.add(f"{FOLDER}/{name}" for name in set(os.listdir(self.directory)) - before)

    def write(self, line: dict[str, Any]) -> None:
        """Every number of a line of metrics.jsonl, in the groups train and validation, and each validation file's."""
        for name, value in line.items():
            if isinstance(value, int | float):
                group, _, rest = name.partition("_") if name.startswith("validation_") else ("train", "", name)
                self.writer.add_scalar(f"{group}/{rest}", value, line["step"])
        for held_out in line.get("validation", ()):
            for name in held_out.keys() - {"file"}:
                self.writer.add_scalar(f"validation/{name}/{held_out['file']}", held_out[name], line["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
