"""Chat vectors of small models: the command, and the formula computed with transformers' state dicts."""

import sys

import families
import torch
from transformers import AutoModelForCausalLM

import merge_chat_vector

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def write(directory, seed, family=families.llama, dtype=torch.bfloat16, shards=None, **fields):
    families.VARIANTS["chat"] = lambda: family(**fields)
    return families.write("chat", directory, seed, dtype, **({"max_shard_size": shards} if shards else {}))


def merge(monkeypatch, out, model, base, instruct, *options):
    arguments = ["--model", model, "--base", base, "--instruct", instruct, "--out", out, *options]
    monkeypatch.setattr(sys, "argv", ["merge_chat_vector.py", *map(str, arguments)])
    merge_chat_vector.main()
    return out


def weights(directory):
    """What transformers reads, in the stored dtype."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    return model.state_dict()


def formula(theta, base, instruct, scale):
    return (theta.float() + scale * (instruct.float() - base.float())).to(theta.dtype)


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(BITS[tensor.dtype]), tensor.view(BITS[tensor.dtype])), name
