"""Small random checkpoints of every family and variant, written by transformers."""

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers import logging as transformers_logging

transformers_logging.set_verbosity_error()

SMALL = {
    "vocab_size": 307,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def llama(**fields):
    return LlamaForCausalLM, LlamaConfig(**{**SMALL, **fields})


def mistral(**fields):
    return MistralForCausalLM, MistralConfig(**{**SMALL, "sliding_window": None, **fields})


def qwen2(**fields):
    return Qwen2ForCausalLM, Qwen2Config(**{**SMALL, **fields})


def qwen3(**fields):
    return Qwen3ForCausalLM, Qwen3Config(**{**SMALL, "head_dim": 16, **fields})


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}

VARIANTS = {
    "llama2": lambda: llama(num_key_value_heads=6),
    "llama3": lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "llama3.1": lambda: llama(rope_parameters=LLAMA3_ROPE, head_dim=16),
    "smollm2": lambda: llama(tie_word_embeddings=True, rms_norm_eps=1e-5, num_attention_heads=3, num_key_value_heads=1),
    "llama-linear": lambda: llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama-yarn": lambda: llama(rope_parameters={**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False}),
    "llama-yarn-mscale": lambda: llama(rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}),
    "llama-bias": lambda: llama(attention_bias=True),
    "llama3.2-tied": lambda: llama(rope_parameters={**LLAMA3_ROPE, "factor": 32.0}, tie_word_embeddings=True),
    "mistral-v0.3": lambda: mistral(pad_token_id=-5, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "mistral-nemo": lambda: mistral(head_dim=16, num_attention_heads=4),
    "mistral-v0.1": lambda: mistral(sliding_window=7),
    "qwen2": lambda: qwen2(pad_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2-sliding": lambda: qwen2(use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen2-yarn": lambda: qwen2(rope_parameters=YARN),
    "qwen2.5-tied": lambda: qwen2(tie_word_embeddings=True, pad_token_id=2),
    "qwen3": lambda: qwen3(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3-tied": lambda: qwen3(tie_word_embeddings=True),
    "qwen3-bias-sliding": lambda: qwen3(
        attention_bias=True, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
}
# The last one of each architecture, for tests that take longer.
ONE_EACH = tuple({build()[0]: name for name, build in VARIANTS.items()}.values())


def write(variant: str, directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **saving) -> Path:
    """Save a random checkpoint with logits of order 1 and non-trivial norms and biases; returns its directory."""
    torch.manual_seed(seed)
    architecture, config = VARIANTS[variant]()
    model = architecture(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 0.15)
    model.to(dtype).save_pretrained(directory, **saving)
    return directory
