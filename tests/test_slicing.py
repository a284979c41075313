"""Detached layers: their numbers, their checkpoint, and their logits against transformers."""

import copy
import json

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from elo.common.errors import UserError
from elo.model.checkpoint import Checkpoint
from elo.model.config import ModelConfig
from elo.model.decoder import build
from elo.model.saving import export
from elo.slicing import base_name, detach, freeze_all_but_layers, parse_layers


def test_layer_numbers():
    assert parse_layers("1,32", 32) == (1, 32)
    assert parse_layers("1,-1", 30) == (1, 30)
    assert parse_layers("-2,-1", 4) == (3, 4)
    assert parse_layers(" 1, 2 ,3", 3) == (1, 2, 3)
    assert parse_layers("1", 1) == (1,)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ("0,1", "there is no layer 0"),
        ("1,31", "there is no layer 31"),
        ("1,-31", "there is no layer -31"),
        ("2,2", "named twice"),
        ("1,-30", "named twice"),
        ("30,1", "ascending order"),
        ("-1,1", "ascending order"),
        ("1,x", "'x' is not a layer number"),
        ("", "is not a layer number"),
        ("1,", "is not a layer number"),
    ],
)
def test_layer_mistakes_state_the_number_of_layers(layers, problem):
    with pytest.raises(UserError, match=problem) as error:
        parse_layers(layers, 30)
    assert "the model has 30 layers" in str(error.value)


@pytest.mark.parametrize(
    ("variant", "layers"),
    [*((variant, (1, 4)) for variant in families.VARIANTS), ("qwen2-sliding", (2, 3, 4)), ("llama3", (3,))],
    ids=str,
)
def test_slice_equals_the_same_slice_in_transformers(variant, layers, tmp_path):
    families.write(variant, tmp_path / "base")
    check_slice(layers, tmp_path)


@pytest.mark.parametrize(
    ("variant", "layers"),
    [("qwen2-sliding", (1, 4)), ("qwen2-sliding", (4,)), ("qwen3-bias-sliding", (1, 3, 4))],
    ids=str,
)
def test_windows_of_a_slice_whose_base_has_no_layer_types(variant, layers, tmp_path):
    """As transformers 4 wrote it: a layer's index alone tells whether it has a window."""
    path = families.write(variant, tmp_path / "base") / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in fields.items() if name != "layer_types"}))
    check_slice(layers, tmp_path)


def check_slice(layers, tmp_path):
    base = Checkpoint(tmp_path / "base")
    ours = build(detach(base.config, layers)).to_empty(device="cpu")
    ours.tie_weights()
    base.load_into(ours, lambda name: base_name(name, layers))
    freeze_all_but_layers(ours)
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {
        name for name, _ in ours.named_parameters() if name.startswith("model.layers.")
    }

    theirs = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    theirs.model.layers = torch.nn.ModuleList(theirs.model.layers[number - 1] for number in layers)
    theirs.config = theirs.model.config = copy.deepcopy(theirs.config)
    theirs.config.num_hidden_layers = len(layers)
    if getattr(theirs.config, "layer_types", None):
        theirs.config.layer_types = [theirs.config.layer_types[number - 1] for number in layers]
    tokens = torch.arange(60).view(2, 30)
    torch.testing.assert_close(ours(tokens), theirs(tokens, use_cache=False).logits, atol=1e-5, rtol=0)

    (tmp_path / "out").mkdir()
    export(tmp_path / "out", ours, base, lambda name: base_name(name, layers))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(reloaded(tokens).logits, theirs(tokens, use_cache=False).logits, atol=1e-6, rtol=0)
    assert Checkpoint(tmp_path / "out").config == ours.config


def test_a_slice_keeps_its_own_layers_types():
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    fields = {**families.SMALL, "use_sliding_window": True, "sliding_window": 5, "layer_types": kinds}
    config = ModelConfig.from_json({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **fields})
    for layers in ((2, 3), (1, 2), (3, 4), (1, 4), (2,)):
        sliced = detach(config, layers)
        assert sliced.sliding_windows == tuple(config.sliding_windows[number - 1] for number in layers)
        assert sliced.json["layer_types"] == [kinds[number - 1] for number in layers]
