"""align.py --scale: how far the layers are moved, also as validation prefers it."""

import json
import shutil
from pathlib import Path

import families
import pytest
import torch
from commands import status_of
from safetensors.torch import load_file, save_file
from small_tokenizer import write_tokenizer

import align
import train
from elo.common.errors import UserError
from elo.model.checkpoint import Checkpoint
from eval import __main__ as evaluation

COMMON = ["--seq-len", "32", "--batch-tokens", "128", "--lr", "1e-2", "--dtype", "fp32"]


def run(script, monkeypatch, *words):
    return status_of(monkeypatch, script.main, script.__name__, *COMMON, *words)


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
        status_of(monkeypatch, evaluation.main, *words, "--dtype", "fp32", "--json", "measured.json")
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


@pytest.mark.parametrize("changed", ["base", "elo"])
def test_scales_found_of_another_model_are_not_taken(changed, scaled, monkeypatch, capfd):
    """By a run that only puts the layers back, stopped while it wrote and called again."""
    align_with, base, slice_ = scaled
    Path("held.txt").write_text("A sentence that is new.")
    with monkeypatch.context() as patch:
        patch.setattr(align, "save", lambda *_: (_ for _ in ()).throw(UserError("stopped")))
        align_with("--scale", "auto", "--validation", "held.txt", status=2)
    tensors = {"base": base, "elo": slice_}[changed]
    tensors["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(tensors, f"{changed}/model.safetensors", {"format": "pt"})
    align_with("--scale", "auto", "--validation", "held.txt", status=2)
    model = {"base": "base", "elo": "stage-1"}[changed]
    assert f"since the run there began, its {model} model changed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", "0.5,0.5,1"], "--scale: 3 values for the 2 layers of elo; give one, or one for each"),
        (["--scale", "nan"], "'nan' is not a number, 0 or more"),
        (["--scale", "half"], "'half' is not a number"),
        (["--scale", "0.5,"], "'' is not a number"),
        (["--scale", "auto"], "--scale auto needs --validation PATH"),
        (["--scale", "1e39"], "would have values that are not finite in torch.bfloat16"),
    ],
)
def test_mistakes_in_scales(words, message, scaled, capfd):
    scaled[0](*words, status=2)
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
