"""Directories that are no checkpoint: what they are instead, and the command that makes one of them."""

import json
import re

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from elo.common.errors import UserError, message_line
from elo.model.checkpoint import Checkpoint
from elo.variants.adapted import open_checkpoint


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


def test_an_adapter_beside_a_model_is_not_passed_over_without_a_word(tmp_path, capsys):
    """transformers adds it."""
    families.write("llama3", tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    get_peft_model(theirs, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert any("lora_A" in name for name, _ in read.named_parameters())
    capsys.readouterr()
    for opened in (Checkpoint, open_checkpoint):
        assert type(opened(tmp_path)) is Checkpoint
    told = f"{tmp_path}: the LoRA adapter beside the model is not read; transformers would add it\n"
    assert capsys.readouterr().err == told
