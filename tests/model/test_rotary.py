"""Rotary frequencies against transformers, for the settings of published models and some that nobody has."""

import families
import pytest
import torch
from small_tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from elo.common.errors import UserError
from elo.common.fields import Fields
from elo.generation.chat import Writer
from elo.generation.engine import generate
from elo.generation.sampling import GREEDY
from elo.model.cache import KVCache
from elo.model.checkpoint import load_model
from elo.model.config import ModelConfig
from elo.model.packed import pack_weights
from elo.model.rotary import read_rope, rotary_frequencies, rotary_table
from elo.text.tokenizer import load_tokenizer
from eval.likelihood.choice import prepare
from eval.likelihood.loglikelihood import Scorer
from eval.tasks import Question, Task

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
    "null for false": (64, 10000.0, {**YARN, "truncate": None}),
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
    rope = read_rope(Fields({"rope_parameters": scaling}, "config.json"), 131072, head_dim)
    torch.testing.assert_close(rotary_frequencies(rope, head_dim), expected, rtol=1e-6, atol=0)
    cos, sin = rotary_table(rope, head_dim, 4, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(cos[3], (3 * expected).cos() * attention_factor)
    torch.testing.assert_close(sin[3], (3 * expected).sin() * attention_factor)
    if scaling["rope_type"] == "llama3":  # all three kinds of frequencies are there
        ratio = (
            rotary_frequencies(read_rope(Fields({"rope_theta": theta}, "config.json"), 131072, head_dim), head_dim)
            / expected
        )
        assert ratio.min() == 1
        assert ratio.max() == scaling["factor"]
        assert ((ratio > 1.01) & (ratio < scaling["factor"] - 0.01)).any()


# ---- frequencies that depend on the sequence's length

LONG = [1.0, 1.5, 2.0, 5.0]  # of a head of 8 dimensions
VARYING = {
    "dynamic": (40, {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0}),
    "longrope": (
        160,
        {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": LONG, "rope_theta": 10000.0}
        | {"original_max_position_embeddings": 40},
    ),
    "longrope with its own factors": (
        160,
        {"rope_type": "longrope", "short_factor": LONG, "long_factor": LONG[::-1], "rope_theta": 10000.0}
        | {"original_max_position_embeddings": 40, "factor": 2.5, "attention_factor": 1.3},
    ),
}


@pytest.fixture(params=VARYING)
def varying(request, tmp_path):
    positions, rope = VARYING[request.param]
    families.VARIANTS["varying"] = lambda: families.llama(max_position_embeddings=positions, rope_parameters=rope)
    families.write("varying", tmp_path)
    return tmp_path


@pytest.mark.parametrize("length", [1, 39, 40, 41, 100])
def test_logits_and_gradients_of_any_length(varying, length):
    """Up to the original length of 40 tokens, and beyond it."""
    theirs, ours = AutoModelForCausalLM.from_pretrained(varying), load_model(varying, "cpu", torch.float32)
    ours.train().requires_grad_()
    tokens = torch.randint(300, (2, length), generator=torch.Generator().manual_seed(0))
    expected, found = theirs(tokens).logits, ours(tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for logits in (expected, found):
        logits.square().sum().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("first", [30, 45])
def test_a_cache_that_grows_beyond_the_original_length(varying, first):
    """Every token is turned as the sequence's length then demands, and those before it stay as they are."""
    theirs, ours = AutoModelForCausalLM.from_pretrained(varying), load_model(varying, "cpu", torch.float32)
    tokens = torch.randint(300, (1, 60), generator=torch.Generator().manual_seed(0))
    mine, other = KVCache(ours.config, 1, torch.device("cpu"), torch.float32), DynamicCache(config=theirs.config)
    parts = [tokens[:, :first], *tokens[:, first:].split(1, 1)]
    with torch.inference_mode():
        for part in parts:
            expected = theirs(part, past_key_values=other).logits[:, -1:]
            found = ours(part, cache=mine, lengths=[part.shape[1]])
            torch.testing.assert_close(found.reshape(-1), expected.reshape(-1), atol=1e-5, rtol=0)


def test_generation_beyond_the_original_length(varying):
    theirs = AutoModelForCausalLM.from_pretrained(varying)
    prompt = torch.randint(300, (1, 30), generator=torch.Generator().manual_seed(0))
    expected = theirs.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=-1)[0, 30:].tolist()
    ours = pack_weights(load_model(varying, "cpu", torch.float32))
    assert generate(ours, prompt.tolist(), [[]], 40) == [expected]


def test_a_conversation_that_grows_beyond_the_original_length(varying):
    """The cache of a shorter conversation is no use then: its keys were rotated for that length."""
    write_tokenizer(varying, vocab_size=300)
    model, tokenizer = pack_weights(load_model(varying, "cpu", torch.float32)), load_tokenizer(varying)
    tokens = torch.randint(300, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    after_others, alone = (Writer(model, tokenizer, 0, GREEDY) for _ in range(2))
    for writer, prompts in ((after_others, (tokens[:20], tokens[:35], tokens)), (alone, (tokens,))):
        for prompt in prompts:
            writer.max_new_tokens = 1
            writer.answer(prompt, ())
    for (keys, values), (expected_keys, expected_values) in zip(
        after_others.cache.layers, alone.cache.layers, strict=True
    ):
        torch.testing.assert_close(keys[:, :, :60], expected_keys[:, :, :60], atol=1e-5, rtol=0)
        torch.testing.assert_close(values[:, :, :60], expected_values[:, :, :60], atol=1e-5, rtol=0)


def test_questions_beyond_the_original_length_are_refused(varying):
    tokenizer = load_tokenizer(write_tokenizer(varying, vocab_size=300))
    scorer = Scorer(load_model(varying, "cpu", torch.float32))
    task = Task("made_up", lambda record: record, (), ())
    short, long = Question("some text", ["a", "b"], 0), Question("some more text " * 9, ["a", "b"], 0)
    if scorer.model.config.max_position_embeddings > 40:  # else it is cut to as many
        with pytest.raises(UserError, match="made_up: rotary .* up to the original length of 40 tokens"):
            prepare(task, [short, long], set(), tokenizer, scorer, 512)
    assert len(prepare(task, [short], set(), tokenizer, scorer, 512)) == 1


def test_the_context_is_what_the_factor_makes_of_the_positions(varying):
    config = ModelConfig.load(varying)
    assert config.context == {40: 120, 160: 160}[config.max_position_embeddings]
    config.check_seq_len(config.context)
    with pytest.raises(UserError, match=f"--seq-len 161: the model has {config.context} positions"):
        config.check_seq_len(161)
