"""merge_chat_vector.py against the formula computed with transformers' state dicts."""

import json
import math
import pickle
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import families
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM

import merge_chat_vector
from elo import chat_vector
from elo.chat_vector import add
from elo.common.errors import UserError, exit_status
from elo.model import saving
from elo.model.checkpoint import Checkpoint, expected_shapes, load_model
from elo.model.config import ModelConfig
from elo.runs.replacing import replacing

ROOT = Path(__file__).resolve().parents[1]
TOKENS = torch.arange(30).view(2, 15)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def write(directory, seed, family=families.llama, dtype=torch.bfloat16, shards=None, **fields):
    families.VARIANTS["chat"] = lambda: family(**fields)
    return families.write("chat", directory, seed, dtype, **({"max_shard_size": shards} if shards else {}))


@pytest.fixture
def trio(tmp_path):
    """A model, a base and an instruct checkpoint of one architecture."""
    return [write(tmp_path / name, seed) for seed, name in enumerate(("model", "base", "instruct"))]


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
        (
            families.llama,
            {"intermediate_size": 96},
            r"mlp\.gate_proj\.weight has shape \(96, 48\) in .*, but \(112, 48\) in",
        ),
        (families.llama, {"hidden_size": 96}, r"embed_tokens\.weight has shape \(307, 96\) in .*, but \(307, 48\) in"),
        (
            families.llama,
            {"num_key_value_heads": 6},
            r"self_attn\.k_proj\.weight has shape \(48, 48\) in .*, but \(16, 48\) in",
        ),
        (
            families.llama,
            {"num_attention_heads": 3, "num_key_value_heads": 1},
            "num_attention_heads is 3 in .*, but 6 in",
        ),
        (
            families.llama,
            {"tie_word_embeddings": True},
            "tie_word_embeddings is True in .*, but False in .*; --skip-embeddings",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("which", ["base", "instruct"])
def test_other_models_are_refused(which, family, fields, expected, trio, tmp_path, monkeypatch):
    other = write(tmp_path / "other", 7, family, **fields)
    model, base, instruct = trio
    directories = (model, other, instruct) if which == "base" else (model, base, other)
    with pytest.raises(UserError, match=expected):
        merge(monkeypatch, tmp_path / "out", *directories)
    assert not (tmp_path / "out").exists()


def test_a_tie_matters_only_to_embedding_and_head(trio, tmp_path, monkeypatch):
    tied = write(tmp_path / "tied", 7, tie_word_embeddings=True)
    out = merge(monkeypatch, tmp_path / "out", trio[0], trio[1], tied, "--skip-embeddings")
    theirs = [weights(directory) for directory in (trio[0], trio[1], tied)]
    assert torch.equal(weights(out)[HEAD], theirs[0][HEAD])
    assert torch.equal(weights(out)[NORM], formula(*(one[NORM] for one in theirs), 1))


def test_other_mathematics_is_said(trio, tmp_path, monkeypatch, capsys):
    other = write(tmp_path / "other", 7, rms_norm_eps=1e-5)
    merge(monkeypatch, tmp_path / "out", trio[0], trio[1], other)
    assert re.search(r"note: rms_norm_eps differs between .*model, .* and .*other", capsys.readouterr().err)


class Malicious:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("which", range(3), ids=["model", "base", "instruct"])
def test_a_pickle_is_refused_and_never_executed(which, trio, tmp_path, monkeypatch):
    (trio[which] / "model.safetensors").unlink()
    witness = tmp_path / "executed"
    (trio[which] / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(witness)))
    with pytest.raises(UserError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json is here"):
        merge(monkeypatch, tmp_path / "out", *trio)
    assert not witness.exists()
    pickle.loads((trio[which] / "pytorch_model.bin").read_bytes())
    assert witness.exists(), "loading it does execute"


# ---------------------------------------------------------------------------------------------------------------------
# The directory


def edit(path, **changes):
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def test_the_result_speaks_like_the_instruct_model(trio, tmp_path, monkeypatch):
    model, base, instruct = trio
    for directory in trio:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (directory / name).write_text(json.dumps(f"{name} of {directory.name}, 토큰"))
    (model / "added_tokens.json").write_text("{}")
    edit(instruct / "generation_config.json", eos_token_id=[7, 9])
    edit(instruct / "config.json", eos_token_id=7, bos_token_id=..., pad_token_id=5, max_position_embeddings=64)
    edit(model / "config.json", eos_token_id=3, bos_token_id=4)
    out = merge(monkeypatch, tmp_path / "out", *trio)

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (instruct / name).read_bytes()
    assert not (out / "added_tokens.json").exists()
    config = json.loads((model / "config.json").read_text()) | {"eos_token_id": 7, "pad_token_id": 5}
    del config["bos_token_id"]
    assert json.loads((out / "config.json").read_text()) == config
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [7, 9]
    notes = json.loads((out / "chat_vector.json").read_text())
    assert notes["model"] == str(model)
    assert notes["vectors"] == [{"instruct": str(instruct), "base": str(base), "scale": 1.0}]
    assert (notes["layers"], notes["skip_embeddings"], notes["shared_vocabulary_rows"]) == (None, False, False)


def test_out_is_replaced_only_on_request(trio, tmp_path, monkeypatch):
    out = merge(monkeypatch, tmp_path / "out", *trio)
    before = (out / "model.safetensors").read_bytes()
    for name in ("chat_template.jinja", "elo.json", "mine.txt"):
        (out / name).write_text("{}")
    with pytest.raises(UserError, match="--out .*out: .* is there already; use --overwrite"):
        merge(monkeypatch, out, *trio, "--scale", "2")
    assert (out / "model.safetensors").read_bytes() == before
    merge(monkeypatch, out, *trio, "--scale", "2", "--overwrite")
    assert (out / "model.safetensors").read_bytes() != before
    left = {path.name for path in out.iterdir()}
    model = {"chat_vector.json", "config.json", "generation_config.json", "model.safetensors"}
    assert left == model | {"run.json", "mine.txt"}
    assert json.loads((out / "run.json").read_text())["written"] == sorted(model)

    (out / "run.json").write_text('{"options": {}, "data": {}, "resumed": []}')
    with pytest.raises(UserError, match="a training run is there"):
        merge(monkeypatch, out, *trio, "--overwrite")


def test_an_adapter_is_replaced_only_on_request_and_a_killed_merge_goes_on(trio, tmp_path, monkeypatch):
    """peft's, and a tokenizer; what else is there stays. Killed half-way, the merge needs no --overwrite."""
    out = tmp_path / "out"
    out.mkdir()
    mine = ["adapter/notes", "epoch-1/config.json", "checkpoints-old/x"]
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", *mine):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("precious")
    before = {path: path.read_text() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="adapter_config.json is there already; use --overwrite"):
        merge(monkeypatch, out, *trio)
    assert {path: path.read_text() for path in out.rglob("*") if path.is_file()} == before
    with monkeypatch.context() as patch:
        patch.setattr(chat_vector, "add", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="No space left on device"):
            merge(patch, out, *trio, "--overwrite")
    assert {path: path.read_text() for path in out.rglob("*") if path.is_file()} == before

    replace, moved, begun = saving.os.replace, [], []

    def begin_only(*arguments):  # and nothing after a failure: a kill lets nothing be done
        begun.append(replacing(*arguments))
        begun[0].__enter__()
        return nullcontext()

    def kill(source, destination):
        moved.append(destination)
        if destination == out / "config.json":
            raise KeyboardInterrupt
        replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(saving.os, "replace", kill)
        patch.setattr(merge_chat_vector, "replacing", begin_only)
        with pytest.raises(KeyboardInterrupt):
            merge(patch, out, *trio, "--overwrite")
    assert out / "model.safetensors" in moved and not (out / "config.json").exists()
    merge(monkeypatch, out, *trio)
    assert not (out / "adapter_config.json").exists() and load_model(out, "cpu", torch.float32)
    assert all((out / name).read_text() == "precious" for name in mine)


def test_a_failed_replacement_leaves_the_old_model(trio, tmp_path, monkeypatch):
    out = merge(monkeypatch, tmp_path / "out", *trio)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(chat_vector.Merge, "config", lambda self: self.model.config)
        patch.setattr(chat_vector, "add", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="out: the model cannot be written: No space left on device"):
            merge(patch, out, *trio, "--scale", "2", "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("which", range(3), ids=["model", "base", "instruct"])
def test_out_is_none_of_the_inputs(which, trio, tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to(trio[which])
    for out in (trio[which], link):
        with pytest.raises(UserError, match=rf"--out .*: this is --{trio[which].name}; give another"):
            merge(monkeypatch, out, *trio, "--overwrite")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--instruct", "x"], "--instruct is given 2 and --base 1 times"),
        (["--scale", "1", "--scale", "2"], "--scale is given 2 times for 1 vectors; give one for all, or one for each"),
        (["--scale", "nan"], "--scale nan: not a finite number"),
        (["--scale", "half"], "argument --scale: invalid float value: 'half'"),
        (["--base", "absent", "--instruct", "absent"], "absent: no such directory"),
    ],
)
def test_mistakes_are_one_line_and_status_2(options, expected, trio, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        exit_status(lambda: merge(monkeypatch, tmp_path / "out", *trio, *options))
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and expected in line


# ---------------------------------------------------------------------------------------------------------------------
# Memory


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


def test_tensors_of_several_dtypes_in_one_file(tmp_path, monkeypatch):
    odd = {"hidden_size": 45, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8}
    trio = [write(tmp_path / name, seed, **odd) for seed, name in enumerate(("model", "base", "instruct"))]
    tensors = load_file(trio[0] / "model.safetensors")
    tensors[NORM] = tensors[NORM].float()
    save_file(tensors, trio[0] / "model.safetensors", metadata={"format": "pt"})
    out = merge(monkeypatch, tmp_path / "out", *trio)
    opened = Checkpoint(out)
    assert opened.dtype(NORM) == torch.float32 and opened.dtype(UP) == torch.bfloat16
    theirs = [load_file(directory / "model.safetensors") for directory in trio]
    expected = {name: formula(*(one[name] for one in theirs), 1) for name in tensors}
    assert_same_bits(load_file(out / "model.safetensors"), expected)
    data = (out / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":  # readers that map a file want every number at a multiple of its size
            assert (8 + length + entry["data_offsets"][0]) % expected[name].itemsize == 0


LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
}


def write_zeros(directory):
    """A checkpoint of 1.07 GB that takes no space on the disk: a sparse file. Returns the sizes of its tensors."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LARGE))
    header, sizes = {}, []
    for name, shape in expected_shapes(ModelConfig.load(directory)).items():
        start = sum(sizes)
        sizes.append(2 * math.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, start + sizes[-1]]}
    encoded = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + sum(sizes))
    return sizes


def peak_memory(model, base, instruct, out):
    """The most bytes of memory that a merge ever occupies: VmHWM, which has private and mapped pages alike.

    (ru_maxrss would be wrong: it begins with what the parent process had.)
    """
    code = """if True:
        import re, merge_chat_vector
        merge_chat_vector.main()
        print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
    """
    options = ["--model", model, "--base", base, "--instruct", instruct, "--out", out, "--scale", "0.5"]
    command = [sys.executable, "-c", code, *map(str, options)]
    return 1024 * int(
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=300).stdout.split()[-1]
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_is_that_of_the_largest_tensor(trio, tmp_path):
    sizes = [write_zeros(tmp_path / name) for name in ("large-model", "large-base", "large-instruct")][0]
    assert sum(sizes) > 10**9
    nothing = peak_memory(*trio, tmp_path / "small-out")
    out = tmp_path / "large-out"
    try:
        large = peak_memory(tmp_path / "large-model", tmp_path / "large-base", tmp_path / "large-instruct", out)
        assert Checkpoint(out).shape(EMBEDDING) == (16000, 2048)
    finally:
        (out / "model.safetensors").unlink(missing_ok=True)
    assert large - nothing < 3 * max(sizes) < sum(sizes) / 5
