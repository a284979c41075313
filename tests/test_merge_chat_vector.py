"""merge_chat_vector.py: what becomes of the directory, what it is not given, and the memory that it takes."""

import json
import math
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_vectors import EMBEDDING, NORM, UP, assert_same_bits, formula, merge, write
from transformers import AutoModelForCausalLM

import merge_chat_vector
from elo import chat_vector
from elo.common.errors import UserError, exit_status
from elo.model import saving
from elo.model.checkpoint import Checkpoint, expected_shapes, load_model
from elo.model.config import ModelConfig
from elo.runs.replacing import replacing

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def trio(tmp_path):
    """A model, a base and an instruct checkpoint of one architecture."""
    return [write(tmp_path / name, seed) for seed, name in enumerate(("model", "base", "instruct"))]


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit


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


LARGE = {"architectures": ["LlamaForCausalLM"], "vocab_size": 16000, "hidden_size": 2048, "intermediate_size": 8192}
LARGE |= {"num_hidden_layers": 7, "num_attention_heads": 16}


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
    with open(tmp_path / "large-instruct/model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")  # or there is no vector
    nothing = peak_memory(*trio, tmp_path / "small-out")
    out = tmp_path / "large-out"
    try:
        large = peak_memory(tmp_path / "large-model", tmp_path / "large-base", tmp_path / "large-instruct", out)
        assert Checkpoint(out).shape(EMBEDDING) == (16000, 2048)
    finally:
        (out / "model.safetensors").unlink(missing_ok=True)
    assert large - nothing < 3 * max(sizes) < sum(sizes) / 5
