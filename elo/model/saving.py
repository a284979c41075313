"""Write a Hugging Face checkpoint directory, one tensor in memory at a time."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from elo.common.errors import UserError
from elo.common.fields import write_json
from elo.common.files import is_file
from elo.common.written import Written, staging
from elo.model.checkpoint import CONFIG, INDEX, SINGLE, STORED_DTYPES, Checkpoint, expected_shapes
from elo.model.config import ModelConfig
from elo.model.decoder import CausalLM
from elo.model.not_a_model import ADAPTER_CONFIG

SHARD_BYTES = 5 * 10**9
# The weights of a LoRA adapter as peft calls them, and the adapter's folder inside of a merged checkpoint.
ADAPTER_WEIGHTS, ADAPTER = "adapter_model.safetensors", "adapter"

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
# Every file of a model or an adapter but for shards, the configurations first: without them no reader takes the rest
# for a model.
MODEL = (
    *(CONFIG, ADAPTER_CONFIG, INDEX, SINGLE, ADAPTER_WEIGHTS),
    *(f"{ADAPTER}/{name}" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)),
    *COMPANIONS,
    *NOTES,
)
SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")


def nobody() -> None:
    """Waits for nobody: for one process."""


def whole(name: str, trained: Tensor, dtype: torch.dtype, wait: Callable[[], None]) -> Tensor | None:
    """A whole parameter on the host, as `dtype`, for the process that writes.

    Collective: all must call it in the same order.

    wait: returns when every process has called it, however long that takes. The writer may still be busy with the
    parameter before, and the time-out of the collective itself is meant for lost processes, not for slow disks.
    Raises UserError for values that are not finite: the loss tells of each step's but the last one's.
    """
    wait()
    trained = trained.detach()
    trained = trained.full_tensor() if isinstance(trained, DTensor) else trained
    if not writes():
        return None
    trained = trained.cpu().to(dtype)
    if not all(map(math.isfinite, trained.aminmax())):  # NaN if there is one
        raise UserError(f"{name} has values that are not finite in {dtype}; --restart with a smaller --lr trains anew")
    return trained


def export(
    directory: Path,
    model: CausalLM,
    base: Checkpoint,
    source: Callable[[str], str] = lambda name: name,
    notes: dict[str, dict[str, Any]] | None = None,
    beside: Callable[[Path], None] = lambda aside: None,
    wait: Callable[[], None] = nobody,
    out: Path | None = None,
) -> None:
    """Save a trained model as a checkpoint. Collective; `wait` as in `whole`.

    Trained parameters come from `model`, converted to the dtype in which the base stores them; frozen ones are copied
    bit for bit from the base's files, and so are the tokenizer's files. `source` is that of `Checkpoint.load_into`;
    `beside` and `out` are those of `save`.
    """
    parameters = dict(model.named_parameters())

    def tensor(name: str) -> Tensor | None:
        if parameters[name].requires_grad:
            return whole(name, parameters[name], dtype(name), wait)
        return base.tensor(source(name)) if writes() else None

    def dtype(name: str) -> torch.dtype:
        return base.dtype(source(name))

    save(directory, model.config, tensor, dtype, base.directory, notes or {}, beside, out)
    wait()  # until the last file is on the disk


def save(
    directory: Path,
    config: ModelConfig,
    tensor: Callable[[str], Tensor | None],
    dtype: Callable[[str], torch.dtype],
    companions: Path,
    notes: dict[str, dict[str, Any]],
    beside: Callable[[Path], None] = lambda aside: None,
    out: Path | None = None,
    until_then: Collection[str] = (),
) -> None:
    """Write a checkpoint into `directory` so that a reader finds either all of it or no config.json.

    tensor: a name's whole tensor; asked for in the same order on every process, so that it may gather, but only what
    rank 0 gets is written, and let go before the next is asked for. dtype: the one to store a tensor in. companions:
    the directory whose tokenizer and generation files are copied. notes: further JSON files, from name to content.
    beside: writes or changes files in the folder it is given, from where all are moved into place. out: the run's
    directory, whose list names all files, if `directory` is a folder in it. until_then: as in `adopt`. Raises UserError
    if a file is in the way that is not on that list.
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

    with new_files(directory, out, CONFIG, until_then) if writes() else nullcontext() as aside:
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


def save_file(
    path: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], tensor: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file of these shapes and dtypes, asking for one tensor at a time, in the given order.

    The safetensors library writes only tensors that are all in memory. The format (https://github.com/huggingface/
    safetensors#format): the header's length in 8 bytes, a JSON header, and then the data of all tensors, little-endian.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        stored_as = next(key for key, value in STORED_DTYPES.items() if value == dtype)
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


def model_files(directory: Path) -> list[str]:
    """The files of a model or an adapter that are in a directory, by their exact names, the configurations first."""
    shards = (path.name for path in directory.glob("model-*.safetensors") if SHARD.fullmatch(path.name))
    return [*(name for name in MODEL if os.path.lexists(directory / name)), *sorted(shards)]


@contextmanager
def new_files(
    directory: Path, out: Path | None = None, last: str = CONFIG, until_then: Collection[str] = ()
) -> Iterator[Path]:
    """A folder to write a model's files in, which then take their place in `directory`; gone afterwards.

    out: as of `save`. last: the configuration. A full disk, or one that may not be written, is a UserError.
    """
    out = out or directory
    try:
        with staging(out) as aside:
            yield aside
            adopt(aside, directory, out, last, until_then)
    except OSError as error:
        raise UserError(f"{out}: the model cannot be written: {error.strerror or error}") from None


def adopt(aside: Path, directory: Path, out: Path, last: str, until_then: Collection[str]) -> None:
    """Move a model's files to their place, over one that is there; the configuration first gone and last there.

    until_then: names of files that stay until all the new ones are there.
    """
    written = Written(out)

    def listed(names: list[str]) -> list[str]:
        return [(directory.relative_to(written.out) / name).as_posix() for name in names]

    files = [path.relative_to(aside).as_posix() for path in sorted(aside.rglob("*")) if path.is_file()]
    files = [*(name for name in files if name != last), last]
    before = model_files(directory)
    written.check(listed(files))
    written.remove(listed([name for name in before if name not in until_then]))
    written.add(listed(files))
    for name in files:
        with open(aside / name, "rb") as file:
            os.fsync(file.fileno())
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside / name, directory / name)
    written.remove(listed([name for name in before if name in until_then and name not in files]))


def copy(source: Path, directory: Path) -> None:
    """A model into another directory, over one that is there; without more disk where files can be linked."""
    with new_files(directory) as aside:
        for name in model_files(source):
            (aside / name).parent.mkdir(exist_ok=True)
            try:
                os.link(source / name, aside / name)
            except OSError:
                shutil.copyfile(source / name, aside / name)
