"""Checkpoints as they are written: for transformers, for other readers, tensor by tensor."""

import json

import families
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_vectors import assert_same_bits
from transformers import AutoModelForCausalLM

from elo.common.errors import UserError
from elo.model import saving
from elo.model.checkpoint import Checkpoint, load_model
from elo.model.saving import export

TOKENS = torch.arange(30).view(2, 15)


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


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 1e5), (torch.bfloat16, torch.inf)])
def test_no_model_is_written_with_values_that_its_dtype_cannot_hold(dtype, value, tmp_path):
    """The last step has no loss after it that would tell."""
    base = families.write("llama3", tmp_path / "base", dtype=dtype)
    model = load_model(base, "cpu", torch.float32).requires_grad_()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = value
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=rf"layers\.2\.mlp\.up_proj\.weight has values .* not finite in {dtype}"):
        export(tmp_path / "out", model, Checkpoint(base))
    assert list((tmp_path / "out").iterdir()) == []


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


def test_metadata_for_other_readers(tmp_path):
    base = families.write("llama3", tmp_path / "base")
    (tmp_path / "out").mkdir()
    export(tmp_path / "out", load_model(base, "cpu", torch.float32), Checkpoint(base))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0  # the numbers behind it are aligned for readers that map the file


def test_a_file_written_tensor_by_tensor_is_read_by_safetensors(tmp_path):
    tensors = {
        "turned": torch.randn(4, 3).T,
        "one": torch.randn(1),
        "토큰": torch.randn(3, 5).bfloat16(),
        "last": torch.randn(7).half(),
    }
    asked = []
    saving.save_file(
        tmp_path / "file",
        {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()},
        lambda name: asked.append(name) or tensors[name].float(),
    )
    assert asked == list(tensors)
    assert_same_bits(load_file(tmp_path / "file"), {name: tensor.contiguous() for name, tensor in tensors.items()})
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(ValueError, match=r"last has shape \(7,\), not \(2,\)"):
        saving.save_file(tmp_path / "bad", {"last": ((2,), torch.float32)}, tensors.get)
