"""What is measured: the shape of Llama-3.1-8B with few layers on a GPU, and one that a CPU computes in a moment."""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measuring import Row, attempt, call_seconds
from benchmarks.published import LLAMA, LLAMA_8B
from elo.model.config import ModelConfig
from elo.runs.devices import inference_device


@dataclass(frozen=True)
class Shape:
    """`fields` are those of config.json; lengths are in tokens."""

    name: str
    fields: dict[str, Any]
    square: int  # of a matrix product
    loss_tokens: tuple[int, int]
    rows: int  # tokens whose whole logits are there at once
    columns: int  # of a tile of the vocabulary, which they divide
    seq_len: int
    seconds: float  # of steps
    windows: int = 4  # of a micro-batch
    micro_batches: int = 4  # of a step

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_json(self.fields)


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE["original_max_position_embeddings"] = 8192
FIELDS = {**LLAMA, **LLAMA_8B, "model_type": "llama", "num_hidden_layers": 4, "max_position_embeddings": 131072}
FIELDS |= {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": ROPE, "tie_word_embeddings": False}
SMALL = {"vocab_size": 768, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
SMALL["num_key_value_heads"] = 2
EIGHT_B = Shape("Llama-3.1-8B with 4 layers", FIELDS, 8192, (8192, 16384), 2048, 16032, seq_len=4096, seconds=4.0)
TINY = Shape("tiny", FIELDS | SMALL, 128, (64, 128), 32, 256, seq_len=64, seconds=0.05)


def checkpoint(shape: Shape, folder: Path) -> Iterator[Row]:
    """A random one in folder/base, for questions about whole steps."""
    device = inference_device()
    write = lambda: write_checkpoint(shape, folder / "base", device)  # noqa: E731
    yield attempt("a random checkpoint is written", lambda: {"ms": 1e3 * call_seconds(write, device)})


def write_checkpoint(shape: Shape, directory: Path, device: torch.device) -> None:
    """In bf16, with a tokenizer of bytes and a text."""
    # What reads and writes checkpoints needs packages that questions without one do not.
    from elo.model.checkpoint import expected_shapes
    from elo.model.saving import save

    shapes = expected_shapes(shape.config)
    torch.manual_seed(0)

    def tensor(name: str) -> Tensor:
        value = torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
        return (value if "norm" in name else value.normal_(0, 0.02)).cpu()

    directory.mkdir()
    save(directory, shape.config, tensor, lambda name: torch.bfloat16, directory, {})
    # As Llama 3 has it, of 256 bytes only; the ids after them are its special tokens.
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (directory / "tokenizer.model").write_text("".join(lines))
    count = 7 * shape.windows * shape.micro_batches * shape.seq_len // 1000 + 1
    records = (json.dumps({"text": f"{number} " + chr(97 + number % 26) * 1000}) + "\n" for number in range(count))
    (directory / "text.jsonl").write_text("".join(records))
