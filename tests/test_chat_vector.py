"""The chat vector against the formula computed with transformers' state dicts, and models that do not fit."""

import json
import re

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tokenizer import write_tokenizer
from small_vectors import BITS, EMBEDDING, HEAD, NORM, UP, assert_same_bits, formula, merge, weights, write
from transformers import AutoModelForCausalLM

from elo import chat_vector
from elo.chat_vector import add
from elo.common.errors import UserError
from elo.model import saving
from elo.model.checkpoint import load_model

TOKENS = torch.arange(30).view(2, 15)


@pytest.fixture
def trio(tmp_path):
    """A model, a base and an instruct checkpoint of one architecture."""
    return [write(tmp_path / name, seed) for seed, name in enumerate(("model", "base", "instruct"))]


# ---------------------------------------------------------------------------------------------------------------------
# The sum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", [*families.ONE_EACH, "qwen2"])
def test_the_formula_and_the_logits(variant, dtype, tmp_path, monkeypatch):
    model = families.write(variant, tmp_path / "model", 0, dtype)
    base = families.write(variant, tmp_path / "base", 1, torch.float32)
    instruct = families.write(variant, tmp_path / "instruct", 2, dtype, max_shard_size="40KB")
    monkeypatch.setattr(chat_vector, "BLOCK", 1000)
    monkeypatch.setattr(saving, "SHARD_BYTES", 50_000)
    out = merge(monkeypatch, tmp_path / "out", model, base, instruct, "--scale", "0.3")

    theirs = [weights(directory) for directory in (model, base, instruct)]
    expected = {name: formula(*(one[name] for one in theirs), 0.3) for name in theirs[0]}
    assert_same_bits(weights(out), expected)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference.load_state_dict(expected)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(merged(TOKENS).logits, reference(TOKENS).logits)
    ours = load_model(out, "cpu", torch.float32)
    torch.testing.assert_close(ours(TOKENS), reference(TOKENS).logits, atol=1e-4, rtol=1e-4)


def finite(dtype, count):
    """Random bit patterns: every exponent, subnormal numbers and both zeros."""
    bits = torch.iinfo(BITS[dtype])
    numbers = torch.randint(bits.min, bits.max + 1, (count,), dtype=BITS[dtype]).view(dtype)
    specials = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal, 1.0], dtype=dtype)
    numbers[: 5 * len(specials)] = specials.repeat(5)
    return torch.where(numbers.isfinite() & (numbers.abs() < torch.finfo(dtype).max / 2), numbers, -0.0)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_scale_1_on_the_base_gives_instruct_bit_for_bit(dtype):
    torch.manual_seed(0)
    base, instruct = finite(dtype, 10**6), finite(dtype, 10**6)[torch.randperm(10**6)]
    found = add(base.float(), instruct.float(), base.float(), 1.0).to(dtype)
    assert_same_bits({"": found}, {"": instruct})
    plain = formula(base, base, instruct, 1.0)
    assert not torch.equal(plain, instruct), "then nothing more than the formula would be needed"


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_scale_1_on_the_base_writes_the_instruct_model(dtype, tmp_path, monkeypatch):
    base, instruct = (write(tmp_path / str(seed), seed, dtype=dtype) for seed in (1, 2))
    for directory in (base, instruct):
        tensors = load_file(directory / "model.safetensors")
        tensors[UP] = finite(dtype, tensors[UP].numel()).view_as(tensors[UP])
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    out = merge(monkeypatch, tmp_path / "out", base, base, instruct)
    assert_same_bits(load_file(out / "model.safetensors"), load_file(instruct / "model.safetensors"))


@pytest.mark.parametrize(("scales", "used"), [((), (1, 1)), ((0.5,), (0.5, 0.5)), ((0.25, -1), (0.25, -1))])
def test_several_vectors(scales, used, trio, tmp_path, monkeypatch):
    more = [write(tmp_path / name, seed) for seed, name in enumerate(("base2", "instruct2"), start=5)]
    options = ["--instruct", more[1], "--base", more[0], *(word for scale in scales for word in ("--scale", scale))]
    out = merge(monkeypatch, tmp_path / "out", *trio, *options)
    theta, base, instruct, base2, instruct2 = (weights(directory) for directory in (*trio, *more))
    expected = {}
    for name in theta:
        first = theta[name].float() + used[0] * (instruct[name].float() - base[name].float())
        expected[name] = (first + used[1] * (instruct2[name].float() - base2[name].float())).bfloat16()
    assert_same_bits(weights(out), expected)
    notes = json.loads((out / "chat_vector.json").read_text())
    assert [vector["scale"] for vector in notes["vectors"]] == list(used)


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        (["--layers", "1-2,4"], lambda name: re.match(r"model\.layers\.[013]\.", name)),
        (["--layers", "-3,-1"], lambda name: re.match(r"model\.layers\.[13]\.", name)),
        (["--skip-embeddings"], lambda name: name not in (EMBEDDING, HEAD)),
        (["--layers", "3", "--skip-embeddings"], lambda name: name.startswith("model.layers.2.")),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
def test_what_the_options_leave_as_it_is(options, moves, trio, tmp_path, monkeypatch):
    out = merge(monkeypatch, tmp_path / "out", *trio, *options)
    theirs = [weights(directory) for directory in trio]
    expected = {n: formula(*(one[n] for one in theirs), 1) if moves(n) else theirs[0][n] for n in theirs[0]}
    assert_same_bits(weights(out), expected)
    assert json.loads((out / "chat_vector.json").read_text())["tensors_moved"] == sum(map(bool, map(moves, expected)))


@pytest.mark.parametrize("text", ["1-5", "0-2", "3-1", "2,1-3", "1--1", "x", "1-99999999999"])
def test_layers_that_are_none(text, trio, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--layers .*the model has 4 layers"):
        merge(monkeypatch, tmp_path / "out", *trio, f"--layers={text}")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [(307, 320, 330), (320, 307, 330), (330, 320, 307), (320, 307, 307)])
def test_vocabularies_of_other_sizes(sizes, tied, tmp_path, monkeypatch):
    trio = [
        write(tmp_path / name, seed, vocab_size=rows, tie_word_embeddings=tied)
        for seed, (name, rows) in enumerate(zip(("model", "base", "instruct"), sizes, strict=True))
    ]
    with pytest.raises(UserError, match=rf"has {sizes[1]} rows, that of .*model {sizes[0]}; --shared-vocabulary-rows"):
        merge(monkeypatch, tmp_path / "out", *trio)
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr(chat_vector, "BLOCK", 48 * 11)
    out = merge(monkeypatch, tmp_path / "out", *trio, "--shared-vocabulary-rows")
    theirs = [weights(directory) for directory in trio]
    expected = dict(theirs[0])
    for name in expected:
        rows = min(len(one[name]) for one in theirs)
        expected[name] = torch.cat([formula(*(one[name][:rows] for one in theirs), 1), theirs[0][name][rows:]])
    assert_same_bits(weights(out), expected)

    out = merge(monkeypatch, tmp_path / "out", *trio, "--skip-embeddings", "--overwrite")
    for name in (EMBEDDING, HEAD):
        assert torch.equal(weights(out)[name], theirs[0][name])


def test_a_tokenizer_needs_a_row_for_every_token(tmp_path, monkeypatch, capsys):
    model, base = (write(tmp_path / name, seed) for seed, name in enumerate(("model", "base")))
    instruct = write(tmp_path / "instruct", 2, vocab_size=400)
    write_tokenizer(instruct, vocab_size=300)
    merge(monkeypatch, tmp_path / "fits", model, base, instruct, "--shared-vocabulary-rows")
    assert "note" not in capsys.readouterr().err
    write_tokenizer(instruct, vocab_size=310)
    with pytest.raises(UserError, match=r"instruct has 310 tokens, but .*model has only 307 rows"):
        merge(monkeypatch, tmp_path / "out", model, base, instruct, "--shared-vocabulary-rows")
    (instruct / "tokenizer.json").write_text("{}")
    merge(monkeypatch, tmp_path / "unknown", model, base, instruct, "--shared-vocabulary-rows")
    assert "note: whether all tokens have one of the 307 rows is not known" in capsys.readouterr().err


def test_a_value_too_large_for_the_dtype(tmp_path, monkeypatch):
    trio = [write(tmp_path / name, seed, dtype=torch.float16) for seed, name in enumerate(("m", "b", "i"))]
    with pytest.raises(UserError, match=r"model\.\S+: the sum has values that are not finite in torch.float16"):
        merge(monkeypatch, tmp_path / "out", *trio, "--scale", "1e6")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        (families.mistral, {}, "architecture is MistralForCausalLM in .*, but LlamaForCausalLM in"),
        (families.llama, {"num_hidden_layers": 3}, "num_hidden_layers is 3 in .*, but 4 in"),
        (families.llama, {"intermediate_size": 96}, r"mlp\.gate_proj\.weight has shape \(96, 48\) .* \(112, 48\) in"),
        (families.llama, {"hidden_size": 96}, r"embed_tokens\.weight has shape \(307, 96\) in .*, but \(307, 48\) in"),
        (families.llama, {"num_key_value_heads": 6}, r"k_proj\.weight has shape \(48, 48\) in .*, but \(16, 48\) in"),
        (families.llama, {"num_attention_heads": 3, "num_key_value_heads": 1}, "num_attention_heads is 3 .*, but 6 in"),
        (families.llama, {"attention_bias": True}, "qkv_bias is True in .*, but False in"),
        (families.llama, {"tie_word_embeddings": True}, "is True in .*, but False in .*; --skip-embeddings"),
    ],
)
@pytest.mark.parametrize("which", ["base", "instruct"])
def test_other_models_are_refused(which, family, fields, expected, trio, tmp_path, monkeypatch):
    other = write(tmp_path / "other", 7, family, **fields)
    model, base, instruct = trio
    directories = (model, other, instruct) if which == "base" else (model, base, other)
    with pytest.raises(UserError, match=expected):
        merge(monkeypatch, tmp_path / "out", *directories)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("instruct", "scale", "note"),
    [
        (1, "1", "note: .*base and .*base have the same weights.* and none is added"),
        (2, "0", "note: --scale 0: the chat vector between .*instruct and .*base is not added"),
    ],
)
def test_where_there_is_no_vector_nothing_is_moved(instruct, scale, note, trio, tmp_path, monkeypatch, capsys):
    model, base, *_ = trio
    out = merge(monkeypatch, tmp_path / "out", model, base, trio[instruct], "--scale", scale)
    said = capsys.readouterr()
    assert re.search(note, said.err) and said.out.startswith("0 tensors of 39 were moved")
    assert json.loads((out / "chat_vector.json").read_text())["tensors_moved"] == 0
    assert_same_bits(weights(out), weights(model))


def test_a_model_with_biases_takes_no_vector_without(trio, tmp_path, monkeypatch):
    biased = write(tmp_path / "biased", 7, attention_bias=True)
    with pytest.raises(UserError, match="qkv_bias is False in .*, but True in"):
        merge(monkeypatch, tmp_path / "out", biased, *trio[1:])


def test_a_tie_matters_only_to_embedding_and_head(trio, tmp_path, monkeypatch):
    tied = write(tmp_path / "tied", 7, tie_word_embeddings=True)
    out = merge(monkeypatch, tmp_path / "out", trio[0], trio[1], tied, "--skip-embeddings")
    theirs = [weights(directory) for directory in (trio[0], trio[1], tied)]
    assert torch.equal(weights(out)[HEAD], theirs[0][HEAD])
    assert torch.equal(weights(out)[NORM], formula(*(one[NORM] for one in theirs), 1))


def test_a_tokenizer_of_other_tokens_is_said(trio, tmp_path, monkeypatch, capsys):
    """Of as many; special ones may have other names."""
    for directory in (trio[0], trio[2]):
        write_tokenizer(directory, vocab_size=300)
    path = trio[2] / "tokenizer.json"
    merge(monkeypatch, tmp_path / "same", *trio)
    path.write_text(path.read_text().replace("<|endoftext|>", "</s>"))
    merge(monkeypatch, tmp_path / "renamed", *trio)
    assert "other tokens" not in capsys.readouterr().err
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    path.write_text(json.dumps(content))
    merge(monkeypatch, tmp_path / "other", *trio)
    said = f"in which 2 ids, such as {min(vocab['A'], vocab['B'])}, are other tokens than in that of {trio[0]}"
    assert said in capsys.readouterr().err


def test_other_mathematics_is_said(trio, tmp_path, monkeypatch, capsys):
    other = write(tmp_path / "other", 7, rms_norm_eps=1e-5)
    merge(monkeypatch, tmp_path / "out", trio[0], trio[1], other)
    assert re.search(r"note: rms_norm_eps differs between .*model, .* and .*other", capsys.readouterr().err)
