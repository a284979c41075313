"""Hugging Face directories as they are read, what is refused, and their fingerprints."""

import json
import re

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from elo.common.errors import UserError
from elo.model.checkpoint import Checkpoint, load_model

TOKENS = torch.arange(30).view(2, 15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["llama3.2-tied", "qwen2"])
def test_sharded_and_single_files_of_every_dtype(variant, dtype, tmp_path):
    single = families.write(variant, tmp_path / "single", dtype=dtype)
    sharded = families.write(variant, tmp_path / "sharded", dtype=dtype, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(single, dtype=torch.float32)
    for directory in (single, sharded):
        ours = load_model(directory, "cpu", torch.float32)
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=0)


def test_a_tied_head_may_be_stored_as_well(tmp_path):
    families.write("llama3.2-tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    logits = load_model(tmp_path, "cpu", torch.float32)(TOKENS)

    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path, "cpu", torch.float32)(TOKENS), logits)

    head_only = {name: tensor for name, tensor in tensors.items() if name != "model.embed_tokens.weight"}
    save_file(head_only, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path, "cpu", torch.float32)(TOKENS), logits)

    embedding = tensors["model.embed_tokens.weight"]
    for head, wrong in ((torch.tensor(1.0), "has shape ()"), (embedding.to(torch.float8_e4m3fn), "is F8_E4M3")):
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=re.escape(f"tensor lm_head.weight {wrong}")):
            Checkpoint(tmp_path)

    tensors["lm_head.weight"][5, 5] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        Checkpoint(tmp_path)


def test_a_slice_reads_only_its_own_tensors(tmp_path, monkeypatch):
    families.write("llama3", tmp_path)
    opened = Checkpoint(tmp_path)
    read = []
    monkeypatch.setattr(opened, "rows", lambda name, *rows: read.append(name) or Checkpoint.rows(opened, name, *rows))
    from elo.model.decoder import build
    from elo.slicing import base_name, detach

    model = build(detach(opened.config, (1, 4))).to_empty(device="cpu")
    opened.load_into(model, lambda name: base_name(name, (1, 4)))
    layers = {name.split(".")[2] for name in read if ".layers." in name}
    assert layers == {"0", "3"}


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def add(**tensors):
    return lambda directory: edit(directory, lambda there: there.update(tensors))


def cut_off(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def rename_tensors(directory):
    tensors = load_file(directory / "model.safetensors")
    save_file({f"transformer.{name}": value for name, value in tensors.items()}, directory / "model.safetensors")


def go_one_level_up(directory):
    (directory / "snapshots" / "0a1b").mkdir(parents=True)
    (directory / "config.json").rename(directory / "snapshots" / "0a1b" / "config.json")


UP, NORM = "model.layers.2.mlp.up_proj.weight", "model.norm.weight"
DAMAGE = {
    # what is said: what is done
    r"model\.safetensors: not a complete safetensors file": cut_off,
    r"model\.safetensors: not a complete .* file": lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64),
    r"tensor model\.layers\.2\.mlp\.up_proj\.weight of shape \(112, 48\) is missing": (
        lambda directory: edit(directory, lambda tensors: tensors.pop(UP))
    ),
    r"model\.safetensors: tensor model\.layers\.9\.extra is unexpected": (
        add(**{"model.layers.9.extra": torch.zeros(2)})
    ),
    r"tensor model\.layers\.0\.self_attn\.q_proj\.bias is unexpected": (
        add(**{"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})
    ),
    r"model\.safetensors: tensor model\.norm\.weight has shape \(49,\), config\.json says \(48,\)": (
        add(**{NORM: torch.zeros(49)})
    ),
    r"tensor model\.norm\.weight is I8, not F32, F16, BF16": add(**{NORM: torch.zeros(48, dtype=torch.int8)}),
    r"config\.json: not found": lambda d: (d / "config.json").unlink(),
    r"neither model\.safetensors nor model\.safetensors\.index\.json": lambda d: (d / "model.safetensors").unlink(),
    r"model-q8\.gguf has the weights in another format": (
        lambda d: (d / "model.safetensors").rename(d / "model-q8.gguf")
    ),
    r"embed_tokens\.weight of shape .* is missing; what is there instead: transformer\.": rename_tensors,
    r"embed_tokens\.weight of shape \(\d+, 48\) is missing$": lambda d: save_file({}, d / "model.safetensors"),
    r"this is a run that has not finished": lambda d: (d / "config.json").rename(d / "run.json"),
    r"config\.json: not found; there is one in .*/snapshots/0a1b$": go_one_level_up,
}


@pytest.mark.parametrize("expected", DAMAGE)
def test_damage_is_named(expected, tmp_path):
    families.write("llama3", tmp_path)
    DAMAGE[expected](tmp_path)
    with pytest.raises(UserError, match=expected):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("shard", "expected"),
    [
        ("../elsewhere.safetensors", "points outside of the directory"),
        ("/etc/passwd", "points outside of the directory"),
        ("sub/model.safetensors", "points outside of the directory"),
        ("absent.safetensors", "shard absent.safetensors is not in the directory"),
    ],
)
def test_index_must_stay_inside(shard, expected, tmp_path):
    directory = families.write("llama3", tmp_path / "model", max_shard_size="40KB")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=expected):
        Checkpoint(directory)


def test_index_that_promises_what_the_shard_lacks(tmp_path):
    directory = families.write("llama3", tmp_path, max_shard_size="40KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    first, last = min(index.values()), max(index.values())
    name = next(name for name, file in index.items() if file == last)
    index[name] = first
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match=f"{first}: tensor {name}.* is not in this file"):
        Checkpoint(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "added_tokens.json", "chat_template.jinja"])
def test_a_link_that_leads_nowhere_is_no_missing_file(name, tmp_path):
    """As in a copy of Hugging Face's cache without its blobs; an index beside it would be read in its place."""
    families.write("llama3", tmp_path, max_shard_size="40KB")
    (tmp_path / name).symlink_to("../../blobs/0a1b")
    (tmp_path / "README.md").symlink_to("../../blobs/2c3d")
    with pytest.raises(UserError, match=f"{name}: a link that leads nowhere; copy what links lead to"):
        Checkpoint(tmp_path)
    (tmp_path / name).unlink()
    Checkpoint(tmp_path)


def test_a_single_file_beside_an_index_is_read_as_by_transformers(tmp_path, capsys):
    families.write("llama3", tmp_path, max_shard_size="40KB")
    assert Checkpoint(tmp_path) and "index.json" not in capsys.readouterr().err
    families.write("llama3", tmp_path / "other", seed=1)
    (tmp_path / "other/model.safetensors").rename(tmp_path / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_model(tmp_path, "cpu", torch.float32)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=0)
    assert "index.json: neither this nor its shards are read, but model.safetensors" in capsys.readouterr().err


def test_a_fingerprint_is_of_all_tensors_and_of_the_configuration(tmp_path):
    """Of a small file to the last number."""
    base = families.write("qwen2", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    before = Checkpoint(base).fingerprint()
    found = {before}
    for name in tensors:
        changed = {**tensors, name: tensors[name].clone()}
        changed[name].view(-1)[-1] += 1e-3
        save_file(changed, base / "model.safetensors", {"format": "pt"})
        found.add(Checkpoint(base).fingerprint())
    assert len(found) == 1 + len(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert Checkpoint(base).fingerprint() == before
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert Checkpoint(base).fingerprint() not in found


def test_the_fingerprint_of_a_large_file(tmp_path, monkeypatch):
    """Of several megabytes only samples are read, which no change of many rows escapes."""
    monkeypatch.setitem(families.VARIANTS, "large", lambda: families.llama(vocab_size=40_000))
    base = families.write("large", tmp_path / "base")
    found = {Checkpoint(base).fingerprint()}
    tensors = load_file(base / "model.safetensors")
    large = [tensor for tensor in tensors.values() if len(tensor) == 40_000]
    assert len(large) == 2
    for tensor in large:
        for part in tensor.chunk(16):
            part += 1e-3
            save_file(tensors, base / "model.safetensors", {"format": "pt"})
            found.add(Checkpoint(base).fingerprint())
    assert len(found) == 33
