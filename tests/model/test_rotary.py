"""Rotary frequencies against transformers, for the settings of published models and some that nobody has."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from elo.common.fields import Fields
from elo.model.rotary import read_rope, rotary_frequencies, rotary_table

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SETTINGS = {
    "Llama-3.1-8B": (128, 500000.0, LLAMA31),
    "Llama-3.2-1B": (64, 500000.0, {**LLAMA31, "factor": 32.0}),
    "other corners": (128, 500000.0, {**LLAMA31, "low_freq_factor": 2.0, "high_freq_factor": 3.0}),
    "Qwen2.5 with YaRN": (128, 1000000.0, YARN),
    "other betas": (128, 1000000.0, {**YARN, "beta_fast": 20.0, "beta_slow": 2.0}),
    "corners as they are": (64, 10000.0, {**YARN, "truncate": False}),
    "an attention factor": (64, 10000.0, {**YARN, "attention_factor": 0.9}),
    "DeepSeek's scales": (64, 10000.0, {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.5}),
    "linear": (128, 10000.0, {"rope_type": "linear", "factor": 4.0}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_are_those_of_transformers(name):
    head_dim, theta, scaling = SETTINGS[name]
    scaling = {**scaling, "rope_theta": theta}
    theirs = LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=scaling)
    expected, attention_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu")
    rope = read_rope(Fields({"rope_parameters": scaling}, "config.json"), 131072)
    torch.testing.assert_close(rotary_frequencies(rope, head_dim), expected, rtol=1e-6, atol=0)
    cos, sin = rotary_table(rope, head_dim, 4, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(cos[3], (3 * expected).cos() * attention_factor)
    torch.testing.assert_close(sin[3], (3 * expected).sin() * attention_factor)
    if scaling["rope_type"] == "llama3":  # all three kinds of frequencies are there
        ratio = rotary_frequencies(read_rope(Fields({"rope_theta": theta}, "config.json"), 131072), head_dim) / expected
        assert ratio.min() == 1
        assert ratio.max() == scaling["factor"]
        assert ((ratio > 1.01) & (ratio < scaling["factor"] - 0.01)).any()
