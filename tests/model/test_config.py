"""config.json in both dialects, and what is refused by name."""

import json

import families
import pytest
from transformers import AutoConfig

from elo.common.errors import UserError
from elo.model.architectures import ARCHITECTURES
from elo.model.config import ModelConfig

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
EVERY = [{"architectures": [known.name], "model_type": known.model_type} for known in ARCHITECTURES]


@pytest.mark.parametrize("fields", EVERY, ids=lambda fields: fields["model_type"])
def test_missing_fields_take_the_defaults_of_transformers(fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours, theirs = ModelConfig.load(tmp_path), AutoConfig.from_pretrained(tmp_path)
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps tie_word_embeddings"
    )
    for name in names.split():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"] == 10000.0
    assert set(ours.sliding_windows) == {4096 if fields["model_type"] == "mistral" else None}


def test_every_architecture_has_variants():
    """Over which the tests of everything else run."""
    assert {build()[0].__name__ for build in families.VARIANTS.values()} == {known.name for known in ARCHITECTURES}


def test_both_dialects_say_the_same():
    rope = families.LLAMA3_ROPE
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}}
    new = {**LLAMA, "rope_parameters": {**rope, "rope_theta": 5e5}}
    assert ModelConfig.from_json(old) == ModelConfig.from_json(new)
    oldest = {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert ModelConfig.from_json(oldest).rope.type == "linear"


def test_sliding_windows_by_layer():
    def windows(fields):
        return ModelConfig.from_json({**fields, "num_hidden_layers": 4}).sliding_windows

    assert windows({**MISTRAL, "sliding_window": None}) == (None,) * 4
    assert windows({**MISTRAL, "sliding_window": 9}) == (9,) * 4
    assert windows({**MISTRAL, "sliding_window": 9, "layer_types": ["sliding_attention"] * 4}) == (9,) * 4
    assert windows({**MISTRAL, "sliding_window": None, "layer_types": ["full_attention"] * 4}) == (None,) * 4
    qwen = {**QWEN2, "sliding_window": 9, "max_window_layers": 3}
    assert windows(qwen) == (None,) * 4
    assert windows({**qwen, "use_sliding_window": True}) == (None, None, None, 9)
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert windows({**qwen, "use_sliding_window": True, "layer_types": types}) == (9, None, None, 9)


REFUSED = [
    ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({}, "architecture None"),
    ({"model_type": "gemma2"}, "gemma2"),
    ({**LLAMA, "model_type": "qwen2"}, "qwen2"),
    ({**LLAMA, "hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({**MISTRAL, "attention_bias": True}, "attention_bias"),
    ({**QWEN2, "attention_bias": True}, "attention_bias"),
    ({**LLAMA, "is_causal": False}, "is_causal = False"),
    ({**LLAMA, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({**LLAMA, "mlp_bias": True}, "mlp_bias"),
    ({**LLAMA, "attention_dropout": 0.1}, "attention_dropout"),
    ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config"),
    ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({**LLAMA, "logit_scale": 0.1}, "logit_scale"),
    ({**LLAMA, "sliding_window": 128}, "sliding_window"),
    ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 0.5}}, "a factor of at least 1"),
    ({**LLAMA, "head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "heads of 4 dimensions"),
    ({**LLAMA, "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 1}}, "must be more than 1"),
    ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 8}}, "alpha is not implemented"),
    ({**LLAMA, "rope_parameters": {"rope_type": "longrope", "short_factor": [1]}}, "short_factor must be a list of"),
    ({**LLAMA, "rope_parameters": {"rope_type": "proportional"}}, "'proportional'"),
    ({**LLAMA, "rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor must be a number above 0"),
    ({**LLAMA, "rope_scaling": {"type": "yarn"}}, "rope_scaling: factor must be a number above 0"),
    ({**QWEN2, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention is not implemented"),
    ({**LLAMA, "rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
    (
        {**LLAMA, "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        "low_freq_factor must be below high_freq_factor",
    ),
    ({**LLAMA, "hidden_size": "4096"}, "hidden_size must be a whole number"),
    ({**LLAMA, "hidden_size": -1}, "not -1"),
    ({**LLAMA, "num_hidden_layers": 10**12}, "num_hidden_layers"),
    ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({**LLAMA, "num_key_value_heads": 5}, "not a multiple of num_key_value_heads = 5"),
    ({**LLAMA, "hidden_size": 4095}, "not a multiple of num_attention_heads"),
    ({**LLAMA, "head_dim": 3}, "head_dim = 3 is odd"),
    ({**QWEN2, "layer_types": ["full_attention"]}, "layer_types"),
    ({**MISTRAL, "sliding_window": 9, "layer_types": ["full_attention"] * 32}, "layer_types without the window"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_refused_by_name(fields, named):
    with pytest.raises(UserError) as error:
        ModelConfig.from_json(fields, "DIR/config.json")
    assert named in str(error.value)
    assert str(error.value).startswith("DIR/config.json: ")


@pytest.mark.parametrize("fields", EVERY, ids=lambda fields: fields["model_type"])
def test_what_transformers_writes_is_known(fields, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    ModelConfig.load(tmp_path)
    assert capsys.readouterr().err == ""


def test_unknown_fields_are_named_once(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "warp_factor": 9, "a\x1b[2J": 1, "use_cache": True}))
    for _ in range(2):
        ModelConfig.load(tmp_path)
    said = capsys.readouterr().err
    assert said == (f"{tmp_path}/config.json: a\\x1b[2J, warp_factor: not known here, and taken to change no logits\n")


def test_config_file_errors(tmp_path):
    with pytest.raises(UserError, match="config.json: not found"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 4')
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="must be a JSON object"):
        ModelConfig.load(tmp_path)
