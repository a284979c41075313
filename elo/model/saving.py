"""Write a Hugging Face checkpoint directory, one tensor in memory at a time."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from elo.common.errors import UserError
from elo.common.fields import write_json
from elo.common.files import is_file
from elo.model.checkpoint import CONFIG, DTYPES, INDEX, SINGLE, Checkpoint, expected_shapes
from elo.model.config import ModelConfig
from elo.model.decoder import CausalLM

SHARD_BYTES = 5 * 10**9
SAVING = ".saving-"  # starts the name of a directory in which a checkpoint is written before it is moved to its place
# peft's files of a LoRA adapter, and the folder for them inside of a merged checkpoint.
ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER = "adapter_config.json", "adapter_model.safetensors", "adapter"

# Copied byte for byte from a checkpoint to what is made of it; tokenizers of all the families.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "original/tokenizer.model",
)
# What our stages tell of how they made a model.
NOTES = ("elo.json", "chat_vector.json", "sft.json")


def nobody() -> None:
    """Waits for nobody: for one process."""


def whole(parameter: Tensor, wait: Callable[[], None]) -> Tensor | None:
    """A parameter in one piece on the host, for the process that writes. Collective: all must call it in one order.

    wait: returns when every process has called it, however long that takes: one still writes what it got before, and
    the time-out of the collective itself is for a process that is gone, not for a slow disk.
    """
    wait()
    parameter = parameter.detach()
    parameter = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return parameter.cpu() if writes() else None


def export(
    directory: Path,
    model: CausalLM,
    base: Checkpoint,
    source: Callable[[str], str] = lambda name: name,
    notes: dict[str, dict[str, Any]] | None = None,
    beside: Callable[[Path], None] = lambda aside: None,
    wait: Callable[[], None] = nobody,
) -> None:
    """Save a trained model as a checkpoint. Collective: of several processes each `wait`s for all, as in `whole`.

    What was trained comes from `model`, in the dtype that the base stores it in; what was frozen comes bit for bit
    from the base's files, as do the tokenizer's. `source` is that of `Checkpoint.load_into`, `beside` that of `save`.
    """
    parameters = dict(model.named_parameters())

    def tensor(name: str) -> Tensor | None:
        if parameters[name].requires_grad:
            return whole(parameters[name], wait)
        return base.tensor(source(name)) if writes() else None

    def dtype(name: str) -> torch.dtype:
        return base.dtype(source(name))

    save(directory, model.config, tensor, dtype, base.directory, notes or {}, beside, wait)


def save(
    directory: Path,
    config: ModelConfig,
    tensor: Callable[[str], Tensor | None],
    dtype: Callable[[str], torch.dtype],
    companions: Path,
    notes: dict[str, dict[str, Any]],
    beside: Callable[[Path], None] = lambda aside: None,
    wait: Callable[[], None] = nobody,
) -> None:
    """Write a checkpoint into `directory` so that a reader finds either all of it or no config.json.

    tensor: a name's whole tensor; asked for in the same order on every process, so that it may gather, but only what
    rank 0 gets is written, and let go before the next is asked for. dtype: the one to store a tensor in. companions:
    the directory whose tokenizer and generation files are copied. notes: further JSON files, from name to content.
    beside: writes or changes files in the folder it is given, from where all are moved into place. wait: as in
    `whole`; in the end all wait until the last file is on the disk.
    """
    shapes = expected_shapes(config)
    shards: list[list[str]] = [[]]
    total = filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype(name).itemsize
        if filled and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size

    with staging(directory) if writes() else nullcontext() as aside:
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(names, file)
            names.sort(key=lambda name: -dtype(name).itemsize)  # aligns every tensor for readers that map files
            if aside is not None:
                save_file(aside / file, {name: (shapes[name], dtype(name)) for name in names}, tensor)
            else:
                for name in names:
                    tensor(name)
        if aside is not None:
            if len(shards) > 1:
                write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            for name in COMPANIONS:
                if is_file(companions / name):
                    (aside / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(companions / name, aside / name)
            for name, content in notes.items():
                write_json(aside / name, content)
            beside(aside)
            write_json(aside / CONFIG, config.json)
            adopt(aside, directory)
    wait()


def save_file(
    path: Path,
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    tensor: Callable[[str], Tensor],
) -> None:
    """Write a safetensors file of these shapes and dtypes, asking for one tensor at a time, in the given order.

    The safetensors library writes only tensors that are all in memory. The format (https://github.com/huggingface/
    safetensors#format): the header's length in 8 bytes, a JSON header, and then the data of all tensors, little-endian.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        stored_as = next(key for key, value in DTYPES.items() if value == dtype)
        header[name] = {"dtype": stored_as, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, (shape, dtype) in tensors.items():
            value = tensor(name)
            if value.shape != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, not {shape}")
            file.write(value.to(dtype).contiguous().view(-1).view(torch.uint8).numpy())
            del value  # before the next is made


def writes() -> bool:
    """Whether this process is the one that writes checkpoints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def remove_model(directory: Path) -> None:
    """Remove a checkpoint or an adapter, its configuration first, so that no reader takes a part for the whole."""
    configs = [directory / name for name in (CONFIG, ADAPTER_CONFIG)]
    with_it = (*COMPANIONS, *NOTES) if any(path.exists() for path in configs) else ()
    inside = directory / ADAPTER
    weights = [directory / INDEX, *directory.glob("model*.safetensors"), directory / ADAPTER_WEIGHTS]
    adapter = [inside / ADAPTER_CONFIG, inside / ADAPTER_WEIGHTS]
    for path in [*configs, *weights, *adapter, *(directory / name for name in with_it)]:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # not there, or there is more in it
        inside.rmdir()


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """A folder inside of `directory` to write files in that `adopt` then moves; gone afterwards.

    A full disk, or one that may not be written, is a UserError that names the directory.
    """
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=SAVING) as folder:
            yield Path(folder)
    except OSError as error:
        raise UserError(f"{directory}: the model cannot be written: {error.strerror or error}") from None


def adopt(aside: Path, directory: Path, last: str = CONFIG) -> None:
    """Move a model's files to their place, over one that is there; the configuration first gone and last there."""
    remove_model(directory)
    files = [path for path in sorted(aside.rglob("*")) if path.is_file() and path != aside / last]
    for path in [*files, aside / last]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        destination = directory / path.relative_to(aside)
        destination.parent.mkdir(exist_ok=True)
        os.replace(path, destination)


def copy(source: Path, directory: Path) -> None:
    """A checkpoint into another directory, over one that is there; without more disk where files can be linked."""
    with staging(directory) as aside:
        for path in source.rglob("*"):
            if path.is_file():
                copied = aside / path.relative_to(source)
                copied.parent.mkdir(exist_ok=True)
                try:
                    os.link(path, copied)
                except OSError:
                    shutil.copyfile(path, copied)
        adopt(aside, directory)
