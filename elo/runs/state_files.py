"""The files of a state, as torch.distributed.checkpoint (DCP) writes them, and what is looked at before they are read.

Every process writes its shards into a file, with a checksum beside it. `.metadata` comes last, by rename, and then its
checksum: a directory without `.metadata` was cut short. DCP unpickles without asking what; here nothing is but numbers
and descriptions of tensors.
"""

import os
import pickle
import re
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import Metadata, ReadItem

from elo.runs.processes import World

METADATA = ".metadata"  # as DCP names it
FILE = re.compile(r"(\.metadata|__[0-9]+_[0-9]+\.distcp)(\.tmp|\.new|\.crc32)?")  # all that a state consists of
# What `.metadata` consists of, by module, beside dtypes and paths.
DESCRIPTIONS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip


class SummingWriter(dcp.FileSystemWriter):
    """Leaves a checksum beside every file: DCP finds a file that was cut short, but not one that has changed."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        try:
            future = super().write_data(plan, planner)
        except RuntimeError as error:
            # torch.save tells of a full disk only as "unexpected pos", raised while it handles the OSError.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        for name in sorted({result.storage_data.relative_path for result in future.wait()}):
            write_checksum(Path(self.path) / name)
        return future

    def finish(self, *args: Any, **kwargs: Any) -> None:
        _sum_file(Path(self.path) / METADATA).unlink(missing_ok=True)  # of a state that was removed in part
        super().finish(*args, **kwargs)
        write_checksum(Path(self.path) / METADATA)

    def storage_meta(self) -> None:
        """Nothing: where a state lay when it was written says nothing, and every Python names paths in its own way."""


class StateReader(dcp.FileSystemReader):
    """Looks at each name in `.metadata`, a pickle, before it is taken: it may name nothing that could do harm."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / METADATA, "rb") as file:
            return _Descriptions(file).load()


class UnknownNameError(pickle.UnpicklingError):
    """A name that this version does not know, or should not."""


class _Descriptions(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # pathlib.PosixPath, pathlib._local.PosixPath since Python 3.13, ...WindowsPath
        if module.split(".")[0] == "pathlib" and name.endswith("Path") and name.isidentifier():
            return PurePath
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        try:
            if name in DESCRIPTIONS.get(module, ()):
                return super().find_class(module, name)
        except (ImportError, AttributeError):
            pass
        raise UnknownNameError(f"it names {module}.{name}, which describes no state here")


class StatePlanner(dcp.DefaultLoadPlanner):
    """Looks through what is no tensor, such as the learning rate, in the same way."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise UnknownNameError(f"{read_item.storage_index.fqn} is more than numbers and text") from None
        value.seek(0)
        super().load_bytes(read_item, value)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value


def write_checksum(path: Path) -> None:
    aside = path.with_name(path.name + ".new")
    with open(aside, "w") as file:
        file.write(f"{checksum(path)}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, _sum_file(path))


def _sum_file(path: Path) -> Path:
    return path.with_name(path.name + ".crc32")


def check_files(reader: StateReader, world: World) -> tuple[list[str], list[str]]:
    """What is damaged in a state, and what in it is not known here, over all processes. Collective.

    Each of them checks its part of the files. A `.metadata` of before it had a checksum is damaged if it is no pickle.
    """
    directory, files = Path(reader.path), []
    damaged, unknown = [], []
    try:
        found = reader.read_metadata().storage_data
        files = sorted({entry.relative_path for entry in found.values()})
    except UnknownNameError as error:
        unknown.append(str(error))
    except Exception as error:  # broken pickles raise whatever they like
        (unknown if _sum_file(directory / METADATA).exists() else damaged).append(f"{METADATA} cannot be read: {error}")
    if _sum_file(directory / METADATA).exists():
        files.insert(0, METADATA)
    for name in files[world.rank :: world.size]:
        try:
            if checksum(directory / name) != int(_sum_file(directory / name).read_text()):
                damaged.append(f"{name} has another checksum than when it was written")
        except (OSError, ValueError) as error:
            damaged.append(f"{name}: {error}")
    return tuple([reason for part in world.gather(mine) for reason in part] for mine in (damaged, unknown))


def remove_state(directory: Path) -> None:
    """`.metadata` first, so that a part is never taken for the whole. What is no state's stays, and what a link is."""
    if directory.is_symlink():
        return
    for path in sorted(directory.glob("*")):
        if FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()
