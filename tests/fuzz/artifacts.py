"""Small valid files of every kind, from which the hostile ones are made."""

import gzip
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import sentencepiece
import torch
import zstandard
from safetensors.torch import save
from small_tokenizer import TEXT, add_chat_tokens, write_tokenizer

from elo.model.checkpoint import expected_shapes
from elo.model.config import ModelConfig
from elo.text.byte_level_bpe import BYTE_ALPHABET

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 420,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "bos_token_id": None,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}
MISTRAL = LLAMA | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 8,
    "head_dim": 8,
    "rope_scaling": None,
    "layer_types": ["sliding_attention"] * 3,
}
QWEN2 = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "tie_word_embeddings": True,
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 1,
    "rope_scaling": None,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
CONFIGS = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2}


@cache
def tensors(config: str = "llama", seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(ModelConfig.from_json(CONFIGS[config]))
    return {name: torch.randn(shape, generator=random) * 0.1 for name, shape in shapes.items()}


def write_checkpoint(directory: Path, config: str = "llama", seed: int = 0) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[config]))
    (directory / "model.safetensors").write_bytes(save(tensors(config, seed), {"format": "pt"}))
    return directory


def write_shards(directory: Path) -> dict[str, Any]:
    """Two shards and their index, which is returned."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(LLAMA))
    names = list(tensors())
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        (directory / file).write_bytes(save({name: tensors()[name] for name in part}))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


def write_chat_tokenizer(directory: Path) -> Path:
    """A byte-level tokenizer with ChatML."""
    write_tokenizer(directory)
    start, end = add_chat_tokens(directory)
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "eos_token": {"content": "<|im_end|>"},
        "bos_token": None,
        "add_bos_token": False,
        "added_tokens_decoder": {
            "0": {"content": "<|endoftext|>", "special": True},
            str(start): {"content": "<|im_start|>", "special": True},
            str(end): {"content": "<|im_end|>", "special": True},
        },
        "chat_template": [{"name": "default", "template": TEMPLATE}],
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, end], "pad_token_id": 0}))
    return directory


def vocab_and_merges(directory: Path) -> tuple[dict[str, int], list[str]]:
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    return model["vocab"], [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def tiktoken_file() -> bytes:
    """As Llama 3's tokenizer.model: the bytes, and a few pairs."""
    import base64

    tokens = [bytes([byte]) for byte in sorted(BYTE_ALPHABET.values())] + [b"th", b"the", b" the", "한".encode()]
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))


@cache
def sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 4),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]", "[/INST]"],
        user_defined_symbols=["[DOC]", "<|im_end|>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


TEXTS = ["First.\nSecond line.", "둘째 문서는 길다. " * 20, "naïve 😀\r\n", "\0 nul", "\ufeffmark"]
RECORDS = [{"text": text, "id": number, "meta": {"url": None}} for number, text in enumerate(TEXTS)]
CONVERSATIONS = [
    {
        "language": "ko",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "뭐?"},
            {"role": "assistant", "content": "이것."},
        ],
    },
    {"language": "English", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho. " * 9}]},
    {
        "id": 3,
        "conversations": [
            {"from": "human", "value": "1?"},
            {"from": "gpt", "value": "2"},
            {"from": "human", "value": "3?"},
        ],
    },
]


def json_lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, **options)
    return file.getvalue()


def packed(data: bytes, ending: str) -> bytes:
    if ending.endswith(".gz"):
        return gzip.compress(data, mtime=0)
    return zstandard.compress(data) if ending.endswith(".zst") else data
