"""A Hugging Face checkpoint directory in, a Hugging Face checkpoint directory out.

Reading is lazy: headers first, then only the bytes that a process will hold. Writing holds one tensor at a time.

A directory may come from anywhere. Nothing in it is unpickled or run. The files in it may be links, as they are in
Hugging Face's cache (model.safetensors -> ../../blobs/0a1b...): whoever made the directory chose where they lead. The
names in an index are only data, and have to be names of files in the directory, without any path.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from elo.config import ModelConfig
from elo.errors import UserError
from elo.fields import read_json_object, write_json
from elo.files import is_file
from elo.model import CausalLM, build

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
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

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Stored(NamedTuple):
    """Where and how a tensor is stored."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


class Checkpoint:
    """A checkpoint directory opened for reading: its configuration and the headers of its safetensors files.

    Raises UserError naming file and tensor for everything that can be known from the headers: a missing config.json,
    a truncated file, an index that points outside of the directory, a missing or unexpected tensor, a wrong shape.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise UserError(f"{self.directory}: no such directory; a checkpoint is a Hugging Face directory")
        self.config = ModelConfig.load(self.directory)
        self._stored = self._locate()
        if self.config.tie_word_embeddings and EMBEDDING not in self._stored and HEAD in self._stored:
            self._stored[EMBEDDING] = self._stored[HEAD]  # the shared matrix may be stored under either name
        self._check_headers()

    def names(self) -> list[str]:
        """The tensors, in the model's order; a tied head is not one of its own."""
        return list(expected_shapes(self.config))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored."""
        return DTYPES[self._stored[name].dtype]

    def tensor(self, name: str) -> Tensor:
        """One whole tensor."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """tensor(name)[start:stop], reading only those bytes."""
        stored = self._stored[name]
        # The file is mapped anew each time, since what was read of a mapping counts as this process's memory until
        # the mapping goes. It goes with the tensor; opening takes a millisecond.
        with _open(stored.file) as file:
            return file.get_slice(stored.name)[start:stop]

    def fingerprint(self) -> str:
        """Another one after any training of the weights, and the same for a copy.

        Of each file its size, its beginning and 256 samples: what is beyond a megabyte is not read as a whole.
        """
        digest = hashlib.sha256(json.dumps(self.config.json, sort_keys=True).encode())
        for path in sorted({stored.file for stored in self._stored.values()}):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with open(path, "rb") as file:
                for start in sorted({size * sample // 256 // 4096 * 4096 for sample in range(256)}):
                    file.seek(start)
                    digest.update(file.read(4096))
        return digest.hexdigest()[:32]

    def load_into(self, model: CausalLM, source: Callable[[str], str | None] = lambda name: name) -> None:
        """Fill parameters of `model`; of one sharded by `fully_shard`, each process reads only its own rows.

        `source` gives the checkpoint's name for a parameter's name (a slice renumbers layers), None for one to leave
        as it is. The values are converted to the dtype that the parameter has.
        """
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                start, stop = local_rows(parameter)
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                if stop > start and (stored := source(name)) is not None:
                    local.copy_(self.rows(stored, start, stop))

    def _locate(self) -> dict[str, Stored]:
        index_path = self.directory / INDEX
        if is_file(self.directory / SINGLE):
            return _headers(self.directory / SINGLE)
        if not is_file(index_path):
            raise UserError(f"{self.directory}: neither {SINGLE} nor {INDEX} is here")
        weight_map = read_json_object(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise UserError(f"{index_path}: weight_map must be an object from tensor names to file names")
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise UserError(f"{index_path}: shard name {file!r} points outside of the directory")
            if not is_file(self.directory / file):
                raise UserError(f"{index_path}: shard {file} is not in the directory")
        shards = {file: _headers(self.directory / file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in shards[file]:
                path = self.directory / file
                raise UserError(f"{path}: tensor {name}, which {INDEX} promises, is not in this file")
        stored: dict[str, Stored] = {}
        for tensors in shards.values():
            for name, found in tensors.items():
                # Readers would disagree on which one counts.
                if name in stored:
                    raise UserError(f"{found.file}: tensor {name} is in {stored[name].file.name} as well")
                stored[name] = found
        return stored

    def _check_headers(self) -> None:
        expected = expected_shapes(self.config)
        tied = self.config.tie_word_embeddings
        for name, shape in expected.items():
            if name not in self._stored:
                raise UserError(f"{self.directory}: tensor {name} of shape {shape} is missing")
            found = self._stored[name]
            if found.shape != shape:
                raise UserError(f"{found.file}: tensor {name} has shape {found.shape}, config.json says {shape}")
            if found.dtype not in DTYPES:
                raise UserError(f"{found.file}: tensor {name} is {found.dtype}, not {', '.join(DTYPES)}")
        for name, found in self._stored.items():
            # Old Llama files carry the rotary frequencies, which follow from config.json.
            if name not in expected and not name.endswith("rotary_emb.inv_freq") and not (tied and name == HEAD):
                raise UserError(f"{found.file}: tensor {name} is unexpected for {self.config.architecture}")
        if tied and HEAD in self._stored and self._stored[EMBEDDING] != self._stored[HEAD]:
            self._check_tie()

    def _check_tie(self) -> None:
        """A head that is stored beside the embedding it is tied to must be the same."""
        for start in range(0, self.config.vocab_size, 8192):
            stop = min(start + 8192, self.config.vocab_size)
            if not torch.equal(self.rows(EMBEDDING, start, stop), self.rows(HEAD, start, stop)):
                raise UserError(
                    f"{self._stored[HEAD].file}: {HEAD} differs from {EMBEDDING}, but config.json ties them; "
                    "set tie_word_embeddings to false"
                )


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file: {error}") from None


def _headers(path: Path) -> dict[str, Stored]:
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  a safe_open is no dict
        return {name: Stored(path, name, tuple(found.get_shape()), found.get_dtype()) for name, found in slices.items()}


def load_model(directory: str | Path, device: str | torch.device, dtype: torch.dtype) -> CausalLM:
    """A whole model on one device, for inference."""
    checkpoint = Checkpoint(directory)
    model = build(checkpoint.config).to(dtype).to_empty(device=device)
    model.tie_weights()
    checkpoint.load_into(model)
    return model.requires_grad_(False).eval()


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint, in the model's order; a tied head is not stored."""
    return {name: tuple(parameter.shape) for name, parameter in build(config).named_parameters()}


def local_rows(parameter: Tensor) -> tuple[int, int]:
    """The rows of a parameter that this process holds, as (start, stop); all of them unless it is sharded."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    # fully_shard splits the first dimension; DCP asks a DTensor for its part by this protocol.
    (part,) = parameter.__create_chunk_list__()
    return part.offsets[0], part.offsets[0] + part.sizes[0]


def whole(parameter: Tensor) -> Tensor | None:
    """A parameter in one piece on the host, for the process that writes. Collective: all must call it in one order."""
    parameter = parameter.detach()
    parameter = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return parameter.cpu() if writes() else None


def export(
    directory: Path,
    model: CausalLM,
    base: Checkpoint,
    source: Callable[[str], str] = lambda name: name,
    notes: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Save a trained model as a checkpoint. Collective.

    What was trained comes from `model`, in the dtype that the base stores it in; what was frozen comes bit for bit
    from the base's files, as do the tokenizer's. `source` is that of `Checkpoint.load_into`.
    """
    parameters = dict(model.named_parameters())

    def tensor(name: str) -> Tensor | None:
        if parameters[name].requires_grad:
            return whole(parameters[name])
        return base.tensor(source(name)) if writes() else None

    save(directory, model.config, tensor, lambda name: base.dtype(source(name)), base.directory, notes or {})


def save(
    directory: Path,
    config: ModelConfig,
    tensor: Callable[[str], Tensor | None],
    dtype: Callable[[str], torch.dtype],
    companions: Path,
    notes: dict[str, dict[str, Any]],
    beside: Callable[[Path], None] = lambda aside: None,
) -> None:
    """Write a checkpoint into `directory` so that a reader finds either all of it or no config.json.

    tensor: a name's whole tensor; asked for in the same order on every process, so that it may gather, but only what
    rank 0 gets is written, and let go before the next is asked for. dtype: the one to store a tensor in. companions:
    the directory whose tokenizer and generation files are copied. notes: further JSON files, from name to content.
    beside: writes further files into the folder it is given, from where all are moved into place.
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
