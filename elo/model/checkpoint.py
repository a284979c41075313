"""Reading a Hugging Face checkpoint directory, lazily: headers first, then only the bytes that a process will hold.

A directory may come from anywhere. Nothing in it is unpickled or run. The files in it may be links, as they are in
Hugging Face's cache (model.safetensors -> ../../blobs/0a1b...): whoever made the directory chose where they lead. The
names in an index are only data, and have to be names of files in the directory, without any path.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from elo.common.errors import UserError
from elo.common.fields import read_json_object
from elo.common.files import is_file, samples
from elo.model.config import ModelConfig, tell_once
from elo.model.decoder import CausalLM, build
from elo.model.not_a_model import ADAPTER_CONFIG, instead_of_a_model, names_instead

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

OF_CHECKPOINTS = (".json", ".safetensors", ".model", ".txt", ".jinja")  # ends of names
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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
        for path in self.directory.iterdir():
            if path.suffix in OF_CHECKPOINTS and not path.exists():  # a file that was meant to be there
                raise UserError(f"{path}: a link that leads nowhere; copy what links lead to, as by cp -rL")
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
        return STORED_DTYPES[self._stored[name].dtype]

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
        """A hash that differs after any training of the weights, and is the same for a copy.

        It covers each file's size and samples of it, so large files are not read in full.
        """
        digest = hashlib.sha256(json.dumps(self.config.json, sort_keys=True).encode())
        for path in sorted({stored.file for stored in self._stored.values()}):
            for part in samples(path):
                digest.update(part)
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
        index_path, single = self.directory / INDEX, self.directory / SINGLE
        if is_file(self.directory / ADAPTER_CONFIG) and (is_file(single) or is_file(index_path)):
            tell_once(f"{self.directory}: the LoRA adapter beside the model is not read; transformers would add it")
        if is_file(single):
            if is_file(index_path):
                tell_once(f"{index_path}: neither this nor its shards are read, but {SINGLE}, as by transformers")
            return _headers(single)
        if not is_file(index_path):
            hint = instead_of_a_model(self.directory)
            raise UserError(f"{self.directory}: neither {SINGLE} nor {INDEX} is here{hint}")
        weight_map = read_json_object(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise UserError(f"{index_path}: weight_map must be an object from tensor names to file names")
        stored: dict[str, Stored] = {}
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise UserError(f"{index_path}: shard name {file!r} points outside of the directory")
            if not is_file(self.directory / file):
                raise UserError(f"{index_path}: shard {file} is not in the directory")
            for name, found in _headers(self.directory / file).items():
                # Readers would disagree on which one counts.
                if name in stored:
                    raise UserError(f"{found.file}: tensor {name} is in {stored[name].file.name} as well")
                stored[name] = found
        for name, file in weight_map.items():
            path = self.directory / file
            if name not in stored or stored[name].file != path:
                raise UserError(f"{path}: tensor {name}, which {INDEX} promises, is not in this file")
        return stored

    def _check_headers(self) -> None:
        expected = expected_shapes(self.config)
        tied = self.config.tie_word_embeddings
        stored_twice = {HEAD: expected[EMBEDDING]} if tied and HEAD in self._stored else {}
        for name, shape in {**expected, **stored_twice}.items():
            if name not in self._stored:
                instead = names_instead({stored: found.file for stored, found in self._stored.items()}, expected)
                raise UserError(f"{self.directory}: tensor {name} of shape {shape} is missing{instead}")
            found = self._stored[name]
            if found.shape != shape:
                raise UserError(f"{found.file}: tensor {name} has shape {found.shape}, config.json says {shape}")
            if found.dtype not in STORED_DTYPES:
                raise UserError(f"{found.file}: tensor {name} is {found.dtype}, not {', '.join(STORED_DTYPES)}")
        for name, found in self._stored.items():
            # Old Llama files carry the rotary frequencies, which follow from config.json.
            if name not in (*expected, *stored_twice) and not name.endswith("rotary_emb.inv_freq"):
                raise UserError(f"{found.file}: tensor {name} is unexpected for {self.config.architecture}")
        is_apart = stored_twice and self._stored[EMBEDDING] != self._stored[HEAD]
        if is_apart and not are_equal(self, EMBEDDING, self, HEAD):
            raise UserError(
                f"{self._stored[HEAD].file}: {HEAD} differs from {EMBEDDING}, but config.json ties them; "
                "set tie_word_embeddings to false"
            )


def are_equal(a: Checkpoint, name: str, b: Checkpoint, other: str) -> bool:
    """Whether two tensors of one shape have the same values; some rows of them are in memory at a time."""
    parts = [(start, start + 16384) for start in range(0, a.shape(name)[0], 16384)]
    return all(torch.equal(a.rows(name, *part), b.rows(other, *part)) for part in parts)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file: {error}") from None


def _headers(path: Path) -> dict[str, Stored]:
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  a safe_open is no dict
        return {name: Stored(path, name, tuple(found.get_shape()), found.get_dtype()) for name, found in slices.items()}


def load_model(source: Checkpoint | str | Path, device: str | torch.device, dtype: torch.dtype) -> CausalLM:
    """A whole model on one device, for inference."""
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
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
    mesh, axis = parameter.device_mesh, parameter.placements.index(Shard(0))
    return dealt_rows(parameter.shape[0], mesh.size(axis), mesh.get_local_rank(axis))


def dealt_rows(rows: int, parts: int, number: int) -> tuple[int, int]:
    """One of equal parts of rows, as (start, stop): fully_shard splits as `torch.chunk` does."""
    chunk = -(-rows // parts)
    start = min(chunk * number, rows)
    return start, min(start + chunk, rows)
