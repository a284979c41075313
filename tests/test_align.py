"""align.py: the layers back in place, new documents only, and every parameter trained."""

import json
import shutil
import sys
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM

import align
import train
from elo.common.errors import UserError, exit_status
from elo.model.checkpoint import Checkpoint, load_model
from eval import __main__ as evaluation

COMMON = ["--seq-len", "32", "--batch-tokens", "128", "--lr", "1e-2", "--dtype", "fp32"]


def run(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [script.__name__, *COMMON, *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        exit_status(script.main)
    return exit_.value.code


@pytest.fixture(params=["llama3.2-tied", "mistral-v0.3", "qwen2-sliding"])
def project(request, tmp_path, monkeypatch):
    """A base model of each family, two corpora, and a stage-1 result on 4 kB of them."""
    variant = families.VARIANTS[request.param]

    def sized():
        architecture, config = variant()
        config.vocab_size = 400
        return architecture, config

    monkeypatch.setitem(families.VARIANTS, "sized", sized)
    base = families.write("sized", tmp_path / "base", dtype=torch.bfloat16)
    write_tokenizer(base)
    for name in ("ko", "en"):
        texts = [f"{name} {number} " * (number % 9 + 2) for number in range(300)]
        lines = [json.dumps({"text": text, "upper": text.upper()}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    text = ["--model", base, "--target", tmp_path / "ko.jsonl", "--source", tmp_path / "en.jsonl"]
    assert run(train, monkeypatch, *text, "--gb", "0.000004", "--out", tmp_path / "elo", "--layers", "1,4") == 0
    return tmp_path, text


def test_replacement_changes_the_trained_layers_only(project, monkeypatch):
    directory, text = project
    out = directory / "replaced"
    assert run(align, monkeypatch, *text, "--elo", directory / "elo", "--gb", "0", "--out", out) == 0
    base, elo, replaced = (load_file(directory / name / "model.safetensors") for name in ("base", "elo", "replaced"))
    assert replaced.keys() == base.keys()
    for name, tensor in replaced.items():
        in_slice = name.replace("layers.3.", "layers.1.")
        trained = "layers.0." in name or "layers.3." in name
        assert torch.equal(tensor, elo[in_slice] if trained else base[name])
    assert not torch.equal(replaced["model.layers.3.mlp.up_proj.weight"], base["model.layers.3.mlp.up_proj.weight"])
    tokens = torch.arange(60).view(2, 30)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(load_model(out, "cpu", torch.float32)(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


@pytest.fixture
def scaled(tmp_path, monkeypatch):
    """Runs align.py --gb 0 on a base and a slice of its layers 1 and 4 that were moved at random: gives the tensors."""
    families.VARIANTS["small"] = lambda: families.llama(vocab_size=400)
    families.write("small", tmp_path / "base", dtype=torch.bfloat16)
    write_tokenizer(tmp_path / "base")
    for name in ("ko", "en"):
        lines = [json.dumps({"text": f"{name} {number} some text " * 3}) for number in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    text = ["--model", "base", "--target", "ko.jsonl", "--source", "en.jsonl"]
    assert run(train, monkeypatch, *text, "--max-steps", "0", "--out", "elo") == 0
    slice_ = load_file("elo/model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in (name for name in slice_ if ".layers." in name):
        slice_[name] += 0.02 * torch.randn(slice_[name].shape, generator=generator).bfloat16()
    save_file(slice_, "elo/model.safetensors", {"format": "pt"})
    base = load_file("base/model.safetensors")

    def align_with(*words, out="out", status=0):
        options = ["--elo", "elo", "--gb", "0", "--out", out, "--overwrite"]
        assert run(align, monkeypatch, *text, *options, *words) == status
        return load_file(f"{out}/model.safetensors") if status == 0 else None

    return align_with, base, slice_


def test_headers_are_read_once(scaled, monkeypatch):
    read, locate = [], Checkpoint._locate
    monkeypatch.setattr(Checkpoint, "_locate", lambda self: read.append(str(self.directory)) or locate(self))
    scaled[0]()
    assert sorted(read) == ["base", "elo"]


@pytest.mark.parametrize("given", ["0", "1", "0.25", "0,1", "0.5,0.125", "2"])
def test_scales(given, scaled):
    align_with, base, slice_ = scaled
    values = [float(part) for part in given.split(",")]
    found = align_with("--scale", given)
    assert json.loads(Path("out/elo.json").read_text())["scale"] == (values * 2)[:2]
    for name, before in base.items():
        layer = {"layers.0.": 0, "layers.3.": 1}.get(name[6:15])
        if layer is None:
            assert torch.equal(found[name], before)
            continue
        after, a = slice_[name.replace("layers.3.", "layers.1.")], (values * 2)[layer]
        exact = before.double() + a * (after.double() - before.double())
        wanted = {0: before, 1: after}.get(a, exact.bfloat16())
        assert torch.equal(found[name], wanted)


def test_the_scales_that_validation_prefers(scaled, monkeypatch, capfd):
    """They are found by forward passes of the replaced model, and are what the alignment starts from."""
    align_with, _, slice_ = scaled
    for name in (name for name in slice_ if name.endswith("3.mlp.up_proj.weight")):
        slice_[name] *= 3
    for name in ("ko", "en"):
        Path(f"held.{name}.jsonl").write_text(json.dumps({"text": f"A sentence that is new, {name}. " * 5}))
    held_out = ["--validation", "held.ko.jsonl", "held.en.jsonl"]
    automatic = align_with("--scale", "auto", *held_out, out="auto")
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("--scale auto: "))
    said = {part.split(" at ")[1]: float(part.split(" at ")[0]) for part in line.split("byte ")[1].split("; ")}
    steps = ("0", "0.1", "0.25", "0.5", "1")
    common = min(steps, key=lambda scale: said[f"{scale},{scale}"])
    first = min(steps, key=lambda scale: said[f"{scale},{common}"])
    best = min((f"{first},{scale}" for scale in steps), key=said.get)
    assert len(said) == 13
    assert line.startswith(f"--scale auto: {best}, of")
    for value in ("0,0", "1,1", best):
        align_with("--scale", value, out=f"at-{value}")
        words = ["eval", "perplexity", "--model", f"at-{value}", "--data", *held_out[1:], "--seq-len", "32"]
        monkeypatch.setattr(sys, "argv", [*words, "--dtype", "fp32", "--json", "measured.json"])
        with pytest.raises(SystemExit):
            exit_status(evaluation.main)
        files = json.loads(Path("measured.json").read_text())["files"]
        measured = sum(file["bits_per_byte"] * file["bytes"] for file in files) / sum(file["bytes"] for file in files)
        assert said[value] == pytest.approx(measured, abs=0.01)  # the model's values are rounded to bf16 in the files
    assert json.loads(Path("auto/elo.json").read_text())["scale"] == [float(scale) for scale in best.split(",")]
    by_hand = load_file(f"at-{best}/model.safetensors")
    assert all(torch.equal(automatic[name], by_hand[name]) for name in by_hand)

    begun = {}
    original = align.train

    def spy(model, *rest):
        begun.update({name: value.full_tensor().bfloat16() for name, value in model.named_parameters()})
        return original(model, *rest)

    monkeypatch.setattr(align, "train", spy)
    align_with("--scale", "auto", *held_out, "--gb", "0.000003", "--max-steps", "1", out="aligned")
    assert all(torch.equal(begun[name], by_hand[name]) for name in by_hand)


def test_a_run_that_goes_on_keeps_the_scales_it_began_with(scaled, monkeypatch, capfd):
    """Whatever --validation is now; not so one that begins anew."""
    align_with, _, _ = scaled
    Path("held.txt").write_text("A sentence that is new.")
    command = ["--scale", "auto", "--validation", "held.txt", "--gb", "0.000003", "--max-steps", "2"]

    def stop(*_):
        raise UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(align, "train", stop)
        align_with(*command, status=2)
    notes = json.loads(Path("out/run.json").read_text())
    for known in ([0.5, 0.125], [0.5], [0.5, "x"], 0.5):
        Path("out/run.json").write_text(json.dumps({**notes, "scale": known}))
        capfd.readouterr()
        align_with(*command, status=0 if known == [0.5, 0.125] else 2, out="out")
        said = capfd.readouterr()
        if known == [0.5, 0.125]:
            assert "--scale auto:" not in said.out
            assert json.loads(Path("out/elo.json").read_text())["scale"] == known
            shutil.rmtree("out/checkpoints", ignore_errors=True)
            Path("out/config.json").unlink()
        else:
            assert "run.json: scale must have a number for each of the layers (1, 4)" in said.err
    align_with(*command, "--restart")
    assert "--scale auto: " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", "0.5,0.5,1"], "--scale: 3 values for the 2 layers of elo; give one, or one for each"),
        (["--scale", "nan"], "'nan' is not a number, 0 or more"),
        (["--scale", "half"], "'half' is not a number"),
        (["--scale", "0.5,"], "'' is not a number"),
        (["--scale", "auto"], "--scale auto needs --validation PATH"),
        (
            ["--scale", "1e39"],
            "would have values that are not finite in torch.bfloat16",
        ),
    ],
)
def test_mistakes_in_scales(words, message, scaled, capfd):
    scaled[0](*words, status=2)
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line


def test_alignment_trains_everything_on_new_documents(project, monkeypatch):
    directory, text = project
    seen = []
    original = align.pretraining.PackedBatches.__init__

    def spy(self, windows, *rest):
        original(self, windows, *rest)
        seen.append({name for index in range(len(windows)) for name in windows.documents(index)})

    monkeypatch.setattr(align.pretraining.PackedBatches, "__init__", spy)
    again = [*text, "--gb", "0.000004"]
    assert run(train, monkeypatch, *again, "--out", directory / "again") == 0
    aligned = [*text, "--elo", directory / "elo", "--gb", "0.000003", "--out", directory / "aligned"]
    assert run(align, monkeypatch, *aligned) == 0
    control = [*text, "--after", directory / "elo", "--gb", "0.000003", "--out", directory / "control"]
    assert run(align, monkeypatch, *control) == 0
    stage_1, stage_2, stage_2_control = seen
    assert stage_1
    assert stage_2
    assert not stage_1 & stage_2
    assert stage_2 == stage_2_control

    base, aligned, control = (load_file(directory / d / "model.safetensors") for d in ("base", "aligned", "control"))
    assert all(not torch.equal(aligned[name], base[name]) for name in base)
    assert not torch.equal(aligned["model.layers.0.mlp.up_proj.weight"], control["model.layers.0.mlp.up_proj.weight"])
    losses = [json.loads(line)["loss"] for line in (directory / "aligned" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_memory_options_change_no_number(project, monkeypatch):
    directory, text = project
    runs = {
        "plain": [],
        "in-backward": ["--optimizer-in-backward"],
        "checkpointing": ["--activation-checkpointing"],
        "offload": ["--cpu-offload"],
    }
    for name, options in runs.items():
        fixed = ["--gb", "0.000003", "--clip", "0", "--micro-batch", "4", "--max-steps", "4"]
        assert (
            run(align, monkeypatch, *text, *fixed, "--after", directory / "elo", "--out", directory / name, *options)
            == 0
        )
    plain = (directory / "plain" / "model.safetensors").read_bytes()
    for name in runs:
        assert (directory / name / "model.safetensors").read_bytes() == plain, name


def damage_frozen(elo):
    tensors = load_file(elo / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 3] += 1
    save_file(tensors, elo / "model.safetensors")
    return "model.embed_tokens.weight, which stage 1 froze, differs"


def damage_config(elo):
    config = json.loads((elo / "config.json").read_text())
    (elo / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    return "rms_norm_eps is 0.5"


def damage_layers(elo):
    notes = json.loads((elo / "elo.json").read_text())
    (elo / "elo.json").write_text(json.dumps({**notes, "layers": [1, 9]}))
    return "there is no layer 9; the model has 4 layers"


def damage_one_layer(elo):
    notes = json.loads((elo / "elo.json").read_text())
    (elo / "elo.json").write_text(json.dumps({**notes, "layers": [1]}))
    return "num_hidden_layers is 2"


def damage_missing(elo):
    tensors = load_file(elo / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, elo / "model.safetensors")
    return "tensor model.layers.1.mlp.up_proj.weight of shape (112, 48) is missing"


def damage_shape(elo):
    tensors = load_file(elo / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(112, 47)
    save_file(tensors, elo / "model.safetensors")
    return "has shape (112, 47), config.json says (112, 48)"


def damage_notes(elo):
    (elo / "elo.json").unlink()
    return "elo.json: cannot be read"


@pytest.mark.parametrize("project", ["llama3.2-tied"], indirect=True)
def test_what_does_not_fit_is_refused(project, monkeypatch, capfd):
    directory, text = project
    for damage in [value for name, value in sorted(globals().items()) if name.startswith("damage_")]:
        broken = directory / damage.__name__
        shutil.copytree(directory / "elo", broken)
        expected = damage(broken)
        capfd.readouterr()
        assert run(align, monkeypatch, *text, "--elo", broken, "--gb", "0.000003", "--out", directory / "out") == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert expected in line
    for options, message in {
        ("--seed", "7"): "other seed",
        ("--target", directory / "en.jsonl"): "other documents",
        ("--target-field", "upper"): "other documents",
        ("--source-field", "upper"): "other documents",
        ("--gb", "1"): "GB of an earlier stage: 0.9",
        ("--optimizer-in-backward",): "give --clip 0",
    }.items():
        capfd.readouterr()
        fixed = [*text, "--elo", directory / "elo", "--gb", "0.000003", "--out", directory / "out", *options]
        assert run(align, monkeypatch, *fixed) == 2
        assert message in capfd.readouterr().err
    assert not (directory / "out").exists()
