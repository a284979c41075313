"""Hugging Face directories in and out: what is read, what is written, and what is refused."""

import json
import re

import families
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from elo.common.errors import UserError, message_line
from elo.model import saving
from elo.model.checkpoint import Checkpoint, load_model
from elo.model.saving import export

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

    tensors["lm_head.weight"][5, 5] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("variant", ["llama3.2-tied", "mistral-v0.3"])
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_export_is_a_checkpoint_for_transformers(variant, shard_bytes, tmp_path, monkeypatch):
    base = families.write(variant, tmp_path / "base", dtype=torch.bfloat16)
    (base / "tokenizer.json").write_bytes("{토큰}".encode())
    monkeypatch.setattr(saving, "SHARD_BYTES", shard_bytes)
    out = tmp_path / "out"
    out.mkdir()
    model = load_model(base, "cpu", torch.float32).requires_grad_()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(3)
    export(out, model, Checkpoint(base), notes={"elo.json": {"layers": [1]}})

    files = sorted(path.name for path in out.iterdir())
    assert ("model.safetensors.index.json" in files) == (shard_bytes == 30_000)
    assert {"config.json", "generation_config.json", "tokenizer.json", "elo.json"} <= set(files)
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert not [name for name in files if name.startswith(".")]
    shards = {path: load_file(path) for path in out.glob("*.safetensors")}
    sizes = [[tensor.nbytes for tensor in shard.values()] for shard in shards.values()]
    assert all(sum(shard) <= shard_bytes or len(shard) == 1 for shard in sizes)
    if len(shards) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(map(sum, sizes))
        assert index["weight_map"] == {name: path.name for path, shard in shards.items() for name in shard}
    theirs, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert Checkpoint(out).dtype("model.norm.weight") == torch.bfloat16
    ours = load_model(out, "cpu", torch.float32)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=0)
    before = load_model(base, "cpu", torch.float32)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)) == ("layers.2.mlp.up" not in name)


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


def test_a_directory_with_a_failed_save_is_no_checkpoint(tmp_path, monkeypatch):
    base = families.write("llama3", tmp_path / "base")
    model = load_model(base, "cpu", torch.float32).requires_grad_()
    out = tmp_path / "out"
    out.mkdir()

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full_disk)
    with pytest.raises(UserError, match="the model cannot be written: No space left"):
        export(out, model, Checkpoint(base))
    assert list(out.iterdir()) == []


def break_truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return r"model\.safetensors: not a complete safetensors file"


def break_header(directory):
    (directory / "model.safetensors").write_bytes(b"\xff" * 64)
    return r"model\.safetensors: not a complete safetensors file"


def break_missing(directory):
    edit(directory, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    return r"tensor model\.layers\.2\.mlp\.up_proj\.weight of shape \(112, 48\) is missing"


def break_unexpected(directory):
    edit(directory, lambda tensors: tensors.update({"model.layers.9.extra": torch.zeros(2)}))
    return r"model\.safetensors: tensor model\.layers\.9\.extra is unexpected"


def break_bias(directory):
    edit(directory, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}))
    return r"tensor model\.layers\.0\.self_attn\.q_proj\.bias is unexpected"


def break_shape(directory):
    edit(directory, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(49)}))
    return r"model\.safetensors: tensor model\.norm\.weight has shape \(49,\), config\.json says \(48,\)"


def break_dtype(directory):
    edit(directory, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}))
    return r"tensor model\.norm\.weight is I8, not F32, F16, BF16"


def break_no_config(directory):
    (directory / "config.json").unlink()
    return r"config\.json: not found"


def break_no_weights(directory):
    (directory / "model.safetensors").unlink()
    return r"neither model\.safetensors nor model\.safetensors\.index\.json"


def break_only_gguf(directory):
    (directory / "model.safetensors").rename(directory / "model-q8.gguf")
    return r"model-q8\.gguf has the weights in another format"


def break_other_names(directory):
    tensors = load_file(directory / "model.safetensors")
    save_file({f"transformer.{name}": value for name, value in tensors.items()}, directory / "model.safetensors")
    return r"embed_tokens\.weight of shape .* is missing; what is there instead: transformer\."


def break_nothing_in_it(directory):
    save_file({}, directory / "model.safetensors")
    return r"embed_tokens\.weight of shape \(\d+, 48\) is missing$"


def break_unfinished(directory):
    (directory / "config.json").rename(directory / "run.json")
    return r"this is a run that has not finished"


def break_one_level_up(directory):
    (directory / "snapshots" / "0a1b").mkdir(parents=True)
    (directory / "config.json").rename(directory / "snapshots" / "0a1b" / "config.json")
    return r"config\.json: not found; there is one in .*/snapshots/0a1b$"


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


BREAKS = [value for name, value in sorted(globals().items()) if name.startswith("break_")]


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_damage_is_named(damage, tmp_path):
    families.write("llama3", tmp_path)
    expected = damage(tmp_path)
    with pytest.raises(UserError, match=expected):
        Checkpoint(tmp_path)


def told(directory):
    """The command in the message about a directory, carried out."""
    with pytest.raises(UserError) as error:
        Checkpoint(directory)
    command = re.search(r'python -c "(.*)"', message_line(error.value))[1]
    exec(command, {})
    return message_line(error.value)


def test_pickled_weights_are_converted_by_the_command_in_the_message(tmp_path):
    families.write("qwen2", tmp_path)
    expected = {name: Checkpoint(tmp_path).tensor(name) for name in Checkpoint(tmp_path).names()}
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    torch.save({}, tmp_path / "optimizer.pt")
    (tmp_path / "model.safetensors").unlink()
    assert "is here; pytorch_model.bin is pickled, and nothing is unpickled here. transformers" in told(tmp_path)
    assert all(torch.equal(Checkpoint(tmp_path).tensor(name), value) for name, value in expected.items())


@pytest.mark.parametrize("name", ["_orig_mod.{}", "module.{}", "module._orig_mod.{}", "in the middle"])
@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_names_of_wrapped_modules_are_shown_and_renamed(name, size, tmp_path):
    families.write("llama3", tmp_path, max_shard_size=size)
    expected = {tensor: Checkpoint(tmp_path).tensor(tensor) for tensor in Checkpoint(tmp_path).names()}

    def renamed(tensor):
        return re.sub(r"layers\.(\d+)\.", r"layers.\1._orig_mod.", tensor) if "{" not in name else name.format(tensor)

    shards = sorted(tmp_path.glob("*.safetensors"))
    for path in shards:
        save_file({renamed(tensor): value for tensor, value in load_file(path).items()}, path, {"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {renamed(tensor): file for tensor, file in content["weight_map"].items()}
        index.write_text(json.dumps(content))
    message = told(tmp_path)
    assert "are those of a wrapped module, such as " in message
    assert renamed("model.layers.0.mlp.up_proj.weight").split("model.")[0] in message
    assert all(torch.equal(Checkpoint(tmp_path).tensor(tensor), value) for tensor, value in expected.items())


def test_an_adapter_is_no_model(tmp_path):
    """tests/variants/test_adapted.py carries the command out."""
    (tmp_path / "a lora").mkdir()
    (tmp_path / "a lora/adapter_config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        Checkpoint(tmp_path / "a lora")
    assert "config.json: not found; this is a LoRA adapter, no model: train.py --method lora --merge" in str(
        error.value
    )
    assert f"`python align.py --model '{tmp_path}/a lora' --gb 0 --out MERGED` does" in str(error.value)


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


def test_metadata_for_other_readers(tmp_path):
    base = families.write("llama3", tmp_path / "base")
    (tmp_path / "out").mkdir()
    export(tmp_path / "out", load_model(base, "cpu", torch.float32), Checkpoint(base))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0  # the numbers behind it are aligned for readers that map the file


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
