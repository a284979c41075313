"""The files of a state: each process's rows of all tensors, part-N.safetensors; state.json has their checksums."""

import os
import re
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from elo.common.errors import UserError
from elo.common.fields import read_json_object
from elo.model.checkpoint import dealt_rows, local_rows
from elo.model.saving import save_file

# The file of a state that comes last; before was that of torch.distributed.checkpoint.
LAST = STATE, BEFORE = "state.json", ".metadata"
FILE = re.compile(r"state\.json(\.new)?|part-[0-9]+\.safetensors|(\.metadata|__[0-9]+_[0-9]+\.distcp)(\.[a-z0-9]+)?")


def write_part(path: Path, rows: dict[str, Tensor]) -> int:
    """A file of tensors, which are let go one by one; its checksum. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of a state that was cut short
    save_file(path, {name: (tuple(value.shape), value.dtype) for name, value in rows.items()}, rows.pop)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return checksum(path)


def read_checksums(directory: Path) -> list[int]:
    """Of each part; none if state.json is damaged. Raises UserError for a state of another version."""
    if not (directory / STATE).exists():
        raise another_versions(directory, f"it has {BEFORE} in place of {STATE}")
    with suppress(UserError):
        sums = read_json_object(directory / STATE).get("checksums")
        if isinstance(sums, list):
            return sums
    return []


def another_versions(directory: Path, reason: str) -> UserError:
    return UserError(
        f"{directory}: this state is as it was written, but this version cannot read it ({reason}); go on with the "
        "version that wrote it, or move it away to go on from the state before it"
    )


def read_rows(files: list[Path], name: str, value: Tensor) -> None:
    """Fill a tensor, of a sharded one this process's rows. Raises SafetensorError or ValueError for another tensor."""
    local = value.to_local() if isinstance(value, DTensor) else value
    start, stop = local_rows(value)
    found = []
    for number, path in enumerate(files):
        first, last = dealt_rows(len(value), len(files), number)
        if max(start, first) < min(stop, last):
            with safe_open(path, "pt") as file:
                found.append(file.get_slice(name)[max(start, first) - first : min(stop, last) - first])
    if found:
        rows = torch.cat(found)
        if rows.shape != local.shape:
            raise ValueError(f"{name} has rows of shape {tuple(rows.shape)}, not {tuple(local.shape)}")
        local.detach().copy_(rows)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value


def damage_of(path: Path, expected: int) -> str | None:
    """What is wrong with a file that had this checksum when it was written, if anything is."""
    try:
        return None if checksum(path) == expected else f"{path.name} has another checksum than when it was written"
    except OSError as error:
        return f"{path.name}: {error.strerror}"


def remove_state(directory: Path) -> None:
    """`LAST` first, so that a part is never taken for the whole. What is no state's stays, and what a link is."""
    if directory.is_symlink():
        return
    for path in [*(directory / name for name in LAST), *directory.glob("*")]:
        if FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()
